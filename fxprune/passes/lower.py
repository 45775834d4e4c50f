"""lower: each masked weight of a linear goes to the layout that measured fastest; dense always fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, cast

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Node

from ..capture import Program
from ..compat import symbol_hint
from ..layouts import LAYOUTS, Packed, Site
from ..layouts.choose import Choice, Chooser
from ..weights import Use, uses
from .edit import copy_program, drop_unused, owner

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What became of one weight: where it is used, the choice, and its bytes dense and as stored."""

    name: str
    nodes: tuple[str, ...]
    choice: Choice
    dense_bytes: int
    bytes: int


def lower(
    program: Program,
    names: Iterable[str],
    chooser: Chooser,
    batches: Mapping[sympy.Symbol, tuple[int, ...]] | None = None,
) -> tuple[Program, list[Lowered]]:
    """A copy of a folded program in which the weights `names` are packed where that is faster.

    `batches` gives the sizes to tune for, symbol by symbol; a symbol that is not named counts with its example's size.
    """
    result = copy_program(program)
    found = uses(result)
    lowered = [_lower_weight(result, name, found.get(name, []), chooser, batches or {}) for name in names]
    result.graph.lint()
    drop_unused(result)
    result.recompile()
    return result, lowered


def _lower_weight(
    program: Program,
    name: str,
    weight_uses: list[Use],
    chooser: Chooser,
    batches: Mapping[sympy.Symbol, tuple[int, ...]],
) -> Lowered:
    module, leaf = owner(program, name)
    weight = getattr(module, leaf).detach()
    size = weight.numel() * weight.element_size()
    nodes = tuple(u.node.name for u in weight_uses)
    reason = _cannot_pack(weight_uses)
    if reason:
        choice = Choice("dense", reason, {layout: reason for layout in LAYOUTS}, ())
        return Lowered(name, nodes, choice, size, size)
    transposed = weight_uses[0].transposed
    tokens = sorted({t for u in weight_uses for t in _tokens(u, batches)})
    activations = {_activation(u.node)[0] for u in weight_uses}
    site = Site(
        name=name,
        node=nodes[0],
        weight=weight.t().contiguous() if transposed else weight,
        bias=_constant(program, weight_uses[0].bias),
        tokens=tuple(tokens),
        activation=activations.pop() if len(activations) == 1 else "",
    )
    choice, packed = chooser.choose(site)
    if packed is None:
        return Lowered(name, nodes, choice, size, size)
    _register(program, name, packed)
    for use in weight_uses:
        _replace(program, name, use, packed)
    return Lowered(name, nodes, choice, size, packed.bytes())


def _cannot_pack(weight_uses: list[Use]) -> str:
    """Why a weight with these uses must stay dense, or nothing."""
    if not weight_uses:
        return "the graph does not read it"
    other = next((u for u in weight_uses if u.kind != "linear"), None)
    if other is not None:
        what = f"a {other.kind}" if other.kind else f"the op {other.node.target}"
        return f"it is read by {what} (node {other.node.name}), which has no sparse kernel yet"
    if len({u.transposed for u in weight_uses}) > 1:
        return "it is used both as [o, i] and as [i, o]"
    return ""


def _tokens(use: Use, batches: Mapping[sympy.Symbol, tuple[int, ...]]) -> list[int]:
    """Rows of the activations at a use: for the example's sizes, or for each declared size."""
    shape = use.x.meta["val"].shape[:-1]
    expression = sympy.Integer(1)
    hints: dict[sympy.Symbol, int] = {}
    for size in shape:
        if isinstance(size, int):
            expression *= size
        else:
            expression *= size.node.expr
            hints.update({s: symbol_hint(size.node.shape_env, s) for s in size.node.expr.free_symbols})
    count = max((len(batches[s]) for s in hints if s in batches), default=1)
    result = []
    for index in range(count):
        values = {s: batches[s][index] if s in batches else hint for s, hint in hints.items()}
        result.append(max(1, int(cast(Any, expression).subs(values))))
    return result


def _activation(node: Node) -> tuple[str, Node | None]:
    """The activation that alone reads a linear's output, and its node."""
    if len(node.users) != 1:
        return "", None
    user = next(iter(node.users))
    if user.target in (aten.relu.default, aten.silu.default):
        return ("relu" if user.target is aten.relu.default else "silu"), user
    if user.target is aten.gelu.default:
        approximate = user.kwargs.get("approximate", user.args[1] if len(user.args) > 1 else "none")
        return ("gelu_tanh" if approximate == "tanh" else "gelu"), user
    return "", None


def _constant(program: Program, node: Node | None) -> Tensor | None:
    if node is None or node.op != "get_attr":
        return None
    module, leaf = owner(program, str(node.target))
    return getattr(module, leaf).detach()


def _register(program: Program, name: str, packed: Packed) -> None:
    """Replaces the parameter by a module of the packed tensors, as buffers `<name>.<tensor's name>`."""
    module, leaf = owner(program, name)
    del module._parameters[leaf]
    holder = nn.Module()
    for key, tensor in packed.tensors.items():
        holder.register_buffer(key, tensor)
    module.add_module(leaf, holder)


def _replace(program: Program, name: str, use: Use, packed: Packed) -> None:
    activation, activated = _activation(use.node)
    last = activated or use.node
    with program.graph.inserting_before(last):
        tensors = {key: program.graph.get_attr(f"{name}.{key}") for key in packed.tensors}
        node = LAYOUTS[packed.layout].lower(program.graph, packed, tensors, use.x, use.bias, activation)
    node.meta = dict(last.meta)
    last.replace_all_uses_with(node)
    _erase(last)


def _erase(node: Node) -> None:
    """Erases a node and whatever fed only it: the linear under its activation, the weight's get_attr and transposes."""
    inputs = list(node.all_input_nodes)
    node.graph.erase_node(node)
    for source in inputs:
        if not source.users and source.op in ("get_attr", "call_function") and not source.is_impure():
            _erase(source)
