"""layer: where a weight meets its input, and what its output may be corrected by."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from fxprune.graph.memory import DROPOUTS, written
from fxprune.graph.ops import SUMS
from fxprune.graph.program import Program, arguments, names_of_parameters, same_shape
from fxprune.graph.weights import Use, norm_behind, uses

aten = torch.ops.aten

# What may stand between a weight's output and the sum that takes it in: the elements stay what they are, in any order,
# or are scaled by constants.
_CARRIED = DROPOUTS | {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.unsqueeze.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.roll.default,
    aten.slice.Tensor,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.batch_norm.default,
}
# These may also repeat the elements for a larger constant, and then have no inverse.
_SCALING = SUMS | {aten.mul.Tensor, aten.div.Tensor}
_CARRIED |= {aten.mul.Tensor, aten.div.Tensor}


@dataclasses.dataclass(frozen=True)
class Branch:
    """The way of a weight's output into sums: its nodes in order, the last one a sum.

    `others` holds, for each sum on the way, what it adds that the inputs change: sum -> operand.
    """

    way: tuple[Node, ...]
    others: Mapping[Node, Node]

    def before(self, end: Node) -> Branch | None:
        """The way up to the last sum before `end`; None where there is none."""
        nodes = self.way[: self.way.index(end)]
        sums = [index for index, node in enumerate(nodes) if node in self.others]
        if not sums:
            return None
        nodes = nodes[: sums[-1] + 1]
        return Branch(nodes, {node: self.others[node] for node in nodes if node in self.others})


@dataclasses.dataclass(frozen=True)
class Shift:
    """Where a constant for each output can be put: a bias, or with `sign` -1 the running mean of a batch-norm."""

    name: str
    sign: int = 1


@dataclasses.dataclass(frozen=True)
class Layer:
    """The one place where a weight is multiplied with activations.

    name    the weight's first name
    node    the linear or convolution; `x` is its input and `bias` what it adds
    inputs  the weight's dimension that is summed over
    shift   where a constant can go, if anywhere
    norm    the batch-norm that alone reads the output, if any
    branch  the way of the output into sums, if there are any
    """

    name: str
    node: Node
    x: Node
    kind: str
    inputs: int
    bias: Node | None = None
    shift: Shift | None = None
    norm: Node | None = None
    branch: Branch | None = None


def find_layers(
    program: Program, names: Iterable[str], held: Collection[str] = ()
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers of weights by name, and why the others have none.

    A weight has one where exactly one linear or convolution reads it, as it is or transposed. Biases that are `held`
    must stay as they are.
    """
    found = uses(program)
    vectors = _own_vectors(program).difference(held)
    layers, without = {}, {}
    for name in names:
        why = _why_not(program, name, found.get(name, []))
        if why:
            without[name] = why
            continue
        layers[name] = _layer(name, found[name][0], vectors)
    return layers, without


def _why_not(program: Program, name: str, found: list[Use]) -> str:
    if not found:
        return "the graph does not read it"
    if not all(is_weight(program, name, use) for use in found):
        return f"it is no weight of {found[0].node.name}"
    kinds = {use.kind for use in found}
    if not kinds <= {"linear", "conv"}:
        what = next((use.node.target for use in found if use.kind not in ("linear", "conv")), "")
        return f"{getattr(what, '_opname', what)} reads it, which is no linear or convolution"
    if len(found) > 1:
        return f"it is read at {len(found)} places"
    return "a transposed convolution reads it" if found[0].kind == "conv" and found[0].inputs == 0 else ""


def _layer(name: str, use: Use, vectors: set[str]) -> Layer:
    node, bias = use.node, use.bias
    norm = norm_behind(node) if use.kind == "conv" else None
    shift = None
    if bias is not None:
        shift = Shift(str(bias.target)) if str(bias.target) in vectors else None
    elif norm is not None:
        mean = str(arguments(norm)["running_mean"].target)
        shift = Shift(mean, -1) if mean in vectors else None
    return Layer(name, node, use.x, use.kind, use.inputs, bias, shift, norm, _branch(node))


def is_weight(program: Program, name: str, use: Use) -> bool:
    """Whether a use of kind "conv" has the parameter as its weight, and not as its bias or its input."""
    if use.kind != "conv":
        return True
    at = arguments(use.node)["weight"]
    while at.op == "call_function" and at.all_input_nodes:
        at = at.all_input_nodes[0]
    return names_of_parameters(program).get(str(at.target)) == name


def is_routed(node: Node) -> bool:
    """Whether values decide how many elements a tensor has: the tokens of an expert, what a condition picks."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and bool(free_unbacked_symbols(value))


def _own_vectors(program: Program) -> set[str]:
    """The 1-D float parameters and buffers that have one name and that one node reads once."""
    readers: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] += sum(_count(user, node) for user in node.users)
    tensors = [*program.named_parameters(remove_duplicate=False), *program.named_buffers(remove_duplicate=False)]
    named_by = Counter(id(tensor) for _, tensor in tensors)
    return {
        name
        for name, tensor in tensors
        if readers[name] == 1 and named_by[id(tensor)] == 1 and tensor.dim() == 1 and tensor.is_floating_point()
    }


def _count(user: Node, node: Node) -> int:
    return sum(leaf is node for leaf in pytree.tree_leaves((user.args, user.kwargs)))


def _branch(node: Node) -> Branch | None:
    """The way of a node's output to the last sum before anything else reads it or happens to it."""
    way: list[Node] = []
    others: dict[Node, Node] = {}
    at = node
    while len(at.users) == 1:
        (user,) = at.users
        if is_sum(user):
            other = other_operand(user, at)
            if isinstance(other, Node) and other.op != "get_attr" and isinstance(other.meta.get("val"), Tensor):
                if other is at or not same_shape(other, at):
                    break
                others[user] = other
        elif not _carries(user, at):
            break
        if user.target in _SCALING and not same_shape(user, at):
            break
        way.append(user)
        at = user
    last = max((index for index, user in enumerate(way) if user in others), default=-1)
    return Branch(tuple(way[: last + 1]), others) if others else None


def is_sum(node: Node) -> bool:
    """Whether a node adds two operands as they are."""
    return node.target in SUMS and not node.kwargs


def other_operand(node: Node, one: Node) -> Any:
    """What a sum adds to one of its operands."""
    first, second = node.args[:2]
    return second if first is one else first


def _carries(user: Node, at: Node) -> bool:
    """Whether a node hands its operand `at` on, moved or scaled by constants."""
    if user.target not in _CARRIED or written(user):
        return False
    if user.args[0] is not at and not (user.target is aten.mul.Tensor and user.args[1] is at):
        return False
    if user.target is aten.batch_norm.default and _of_the_batch(user):
        return False
    return all(_is_constant(a) for a in (*user.all_input_nodes, user.args[0]) if a is not at)


def _of_the_batch(node: Node) -> bool:
    """Whether a batch-norm takes the statistics of the batch, which every element of it changes."""
    given = arguments(node)
    return given["running_mean"] is None or bool(given["training"])


def _is_constant(argument: object) -> bool:
    """Whether an argument is no tensor that inputs change: a number, a size, a parameter or what is made of it."""
    if not isinstance(argument, Node) or argument.op == "get_attr":
        return True
    if not isinstance(argument.meta.get("val"), Tensor):
        return True
    read = argument.all_input_nodes
    moved = argument.op == "call_function" and argument.target in _CARRIED - DROPOUTS and bool(read)
    return moved and all(_is_constant(node) for node in read)
