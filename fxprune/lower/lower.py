"""lower: each masked weight of a linear goes to the layout that measured fastest; dense always fits.

Weights whose linears read the same activations are then stored together and multiplied in one call (share.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.capture.capture import Capture
from fxprune.errors import InputError
from fxprune.graph.compat import symbol_hint
from fxprune.graph.environment import warn_of_one_thread
from fxprune.graph.program import Program, copy_program, drop_unused, fetch, owner
from fxprune.graph.weights import Use, uses
from fxprune.lower.layouts.choose import Chooser
from fxprune.lower.layouts.site import Choice, Packed, Site

from .layouts import LAYOUTS
from .nets import lower_nets
from .share import Chosen, groups, merge

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
    *,
    rounds: bool = False,
) -> tuple[Program, list[Lowered]]:
    """A copy of a folded program in which the weights `names` are packed where that is faster.

    `batches` gives the sizes to tune for, symbol by symbol; a symbol that is not named counts with its example's size.
    Where it `rounds`, products may be of bfloat16 numbers.
    """
    warn_of_one_thread()
    result = copy_program(program)
    found = uses(result)
    lowered: dict[str, Lowered] = {}
    chosen: list[Chosen] = []
    names = list(names)
    refused: dict[str, str] = {}
    if chooser.only in (None, "nonzeros"):
        lowered |= _nets(result, names, refused, forced=chooser.only is not None, rounds=rounds)
    for name in names:
        if name in lowered:
            continue
        lowered[name] = _choose(result, name, found.get(name, []), chooser, batches or {}, chosen, rounds)
        if name in refused:
            # A convolution has no other kernel; a linear was chosen one for by itself.
            choice, is_linear = lowered[name].choice, all(use.kind == "linear" for use in found.get(name, []))
            known = {**choice.refused, "net" if is_linear else "nonzeros": refused[name]}
            choice = dataclasses.replace(choice, why=choice.why if is_linear else refused[name], refused=known)
            lowered[name] = dataclasses.replace(lowered[name], choice=choice)
    waiting = groups(result, chosen)
    chosen.clear()
    while waiting:
        # Popped, so that what was packed apart goes as soon as it is stored together.
        _store(result, waiting.pop(0), lowered)
    result.graph.lint()
    drop_unused(result)
    result.recompile()
    return result, [lowered[name] for name in names]


def _nets(
    program: Program, names: Sequence[str], refused: dict[str, str], *, forced: bool, rounds: bool
) -> dict[str, Lowered]:
    """What became of the weights that went into nets; `refused` gets what did not, and why."""
    sizes = {name: fetch(program, name).nbytes for name in names}
    lowered = {}
    made_nets = lower_nets(program, names, forced=forced, rounds=rounds)
    # What something else reads as well is there twice.
    kept = uses(program)
    for made in made_nets:
        for name in (name for name in names if name in made.nodes):
            if not made.is_net:
                refused[name] = made.why
                continue
            choice = Choice("nonzeros", made.why, {}, ())
            stored = made.bytes[name] + (sizes[name] if kept.get(name) else 0)
            lowered[name] = Lowered(name, (made.nodes[name],), choice, sizes[name], stored)
    return lowered


def _choose(
    program: Program,
    name: str,
    weight_uses: list[Use],
    chooser: Chooser,
    batches: Mapping[sympy.Symbol, tuple[int, ...]],
    chosen: list[Chosen],
    rounds: bool,
) -> Lowered:
    """What becomes of one weight; adds it to `chosen` unless it stays dense."""
    weight = fetch(program, name)
    size = weight.numel() * weight.element_size()
    nodes = tuple(u.node.name for u in weight_uses)
    reason = _cannot_pack(weight_uses)
    if reason:
        choice = Choice("dense", reason, {layout: reason for layout in LAYOUTS}, ())
        return Lowered(name, nodes, choice, size, size)
    tokens = sorted({t for u in weight_uses for t in _tokens(u, batches)})
    activations = {_activation(u.node)[0] for u in weight_uses}
    if rounds and weight.dtype == torch.float32:
        # What needs no more bits is stored in fewer.
        weight = weight.bfloat16().float()
    bias = weight_uses[0].bias
    site = Site(
        name=name,
        node=nodes[0],
        weight=weight.t().contiguous() if weight_uses[0].transposed else weight,
        bias=fetch(program, str(bias.target)) if bias is not None and bias.op == "get_attr" else None,
        tokens=tuple(tokens),
        activation=activations.pop() if len(activations) == 1 else "",
    )
    choice, packed = chooser.choose(site)
    if packed is None:
        return Lowered(name, nodes, choice, size, size)
    chosen.append(Chosen(name, weight_uses, site.tokens, site.activation, packed))
    return Lowered(name, nodes, choice, size, packed.bytes())


def _store(program: Program, group: list[Chosen], lowered: dict[str, Lowered]) -> None:
    """Puts one weight, or several that share a call, into the program in their layout."""
    first = group[0]
    if len(group) == 1:
        _register(program, first.name, first.packed.tensors)
        for use in first.uses:
            _replace(program, first.name, first.packed, [use], use.bias, first.packed.shape[:1])
        return
    packed, bias, sizes = merge(program, group)
    _register(program, first.name, {**packed.tensors, **({} if bias is None else {"bias": bias})})
    linears = [member.uses[0] for member in group]
    with program.graph.inserting_before(linears[0].node):
        bias_node = None if bias is None else program.graph.get_attr(f"{first.name}.bias")
    _replace(program, first.name, packed, linears, bias_node, tuple(member.packed.shape[0] for member in group))
    others = ", ".join(member.name for member in group[1:])
    for member, size in zip(group, sizes, strict=True):
        row = lowered[member.name]
        why = f"{row.choice.why}; stored with {others if member is first else first.name}"
        choice = dataclasses.replace(row.choice, why=why)
        lowered[member.name] = dataclasses.replace(row, choice=choice, bytes=size)


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
        values = {s: batches[s][min(index, len(batches[s]) - 1)] if s in batches else n for s, n in hints.items()}
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


def _register(program: Program, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Replaces the parameter by a module of tensors, as buffers `<name>.<tensor's name>`."""
    module, leaf = owner(program, name)
    del module._parameters[leaf]
    holder = nn.Module()
    for key, tensor in tensors.items():
        holder.register_buffer(key, tensor)
    module.add_module(leaf, holder)


def _replace(
    program: Program,
    name: str,
    packed: Packed,
    linears: list[Use],
    bias: Node | None,
    out_features: tuple[int, ...],
) -> None:
    """Puts one call where the first of the linears stands, which all read the same x, in place of them and of the
    activation that follows each.
    """
    graph = program.graph
    followed = [_activation(use.node) for use in linears]
    lasts = [activated or use.node for use, (_, activated) in zip(linears, followed, strict=True)]
    with graph.inserting_before(linears[0].node):
        tensors = {key: graph.get_attr(f"{name}.{key}") for key in packed.tensors}
        nodes = LAYOUTS[packed.layout].lower(graph, packed, tensors, linears[0].x, bias, followed[0][0], out_features)
    if len(nodes) > 1:
        call = nodes[0].all_input_nodes[0]
        call.meta = {**lasts[0].meta, "val": [last.meta["val"] for last in lasts]}
    for node, last in zip(nodes, lasts, strict=True):
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


def batches(
    capture: Capture, examples: Sequence[Mapping[str, int]], sizes: tuple[int, ...]
) -> dict[sympy.Symbol, tuple[int, ...]]:
    """The sizes to tune for, by symbol: those of the examples, and `sizes` for dim 0 where there are any.

    `examples` are the sizes of each example call by the names of their symbols.
    """
    result: dict[sympy.Symbol, tuple[int, ...]] = {}
    tuned = False
    for node in capture.program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            for symbol in size.node.expr.free_symbols if isinstance(size, torch.SymInt) else ():
                if sizes and dim == 0:
                    result[symbol], tuned = sizes, True
                elif all(str(symbol) in example for example in examples):
                    result.setdefault(symbol, tuple(example[str(symbol)] for example in examples))
    if sizes and not tuned:
        raise InputError(
            "cannot tune for several sizes",
            where='options["tune_for"]',
            why="dim 0 of no input is dynamic: " + ("; ".join(capture.notes) or "every size was fixed"),
            do="Leave it out, or make dim 0 dynamic with dynamic_shapes=.",
        )
    return result
