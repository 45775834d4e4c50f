"""residual: the way from a block's output back to its input through sums.

Searched backwards from the output. A way may pass sums, norms, activations, dropout, casts, constant scales, and views
and transposes that are undone before the input.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxprune.graph.memory import DROPOUTS
from fxprune.graph.ops import NORMS, SUMS
from fxprune.graph.program import same_shape, sizes

aten = torch.ops.aten

DIVISIONS = {aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar}
_SCALES = {
    *DIVISIONS,
    aten.mul.Tensor,
    aten.mul_.Tensor,
    aten.mul.Scalar,
    aten.mul_.Scalar,
    aten.add.Scalar,
    aten.add_.Scalar,
}
_ACTIVATIONS = {
    aten.relu.default,
    aten.relu_.default,
    aten.relu6.default,
    aten.relu6_.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.clamp.default,
    aten.clamp_.default,
    aten.gelu.default,
    aten.gelu_.default,
    aten.silu.default,
    aten.silu_.default,
    aten.mish.default,
    aten.mish_.default,
    aten.elu.default,
    aten.elu_.default,
    aten.selu.default,
    aten.selu_.default,
    aten.celu.default,
    aten.celu_.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
    aten.hardswish.default,
    aten.hardswish_.default,
    aten.hardsigmoid.default,
    aten.hardsigmoid_.default,
    aten.sigmoid.default,
    aten.sigmoid_.default,
    aten.tanh.default,
    aten.tanh_.default,
    aten.softplus.default,
    aten.prelu.default,
    aten._prelu_kernel.default,
}
CASTS = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
}
# Elements stay in their order in memory as long as the whole way is such views.
VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
PERMUTES = {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.numpy_T.default,
    aten.mT.default,
}
# They hand a tensor on whole where its shape stays the same.
PARTS = {aten.slice.Tensor, aten.expand.default, aten.expand_as.default}


@dataclasses.dataclass
class Ways:
    """What the search back from a block's output met.

    entries   node outside -> the fewest norms on a way to it that has a sum; same shape, dtype and device. Constants
              (the zeros that a decoder starts from) are entries only where no other tensor is.
    sumless   nodes outside reached by ways that have no sum
    changed   nodes outside reached, but of another shape, dtype or device, or in another order of dimensions
    ends      nodes inside that no way leads through
    """

    entries: dict[Node, int] = dataclasses.field(default_factory=dict)
    sumless: list[Node] = dataclasses.field(default_factory=list)
    changed: list[Node] = dataclasses.field(default_factory=list)
    ends: list[Node] = dataclasses.field(default_factory=list)


# What is left to undo, outermost last: ("view", the shape it must come back to) or ("permute", its order).
_Undo = tuple[tuple[str, tuple[Any, ...]], ...]


@dataclasses.dataclass(frozen=True)
class _Step:
    """One op passed backwards to `node`."""

    node: Node
    norms: int = 0
    sum: bool = False
    moves: str = ""


def ways_back(exit: Node, nodes: Sequence[Node], varying: set[Node]) -> Ways:
    """Searches from `exit` back through a block's `nodes`; `varying` are the graph's tensors that its inputs change."""
    inside = set(nodes)
    fed = _fed(nodes, inside)
    found = Ways()
    order = itertools.count()
    waiting: list[tuple[int, int, Node, _Undo, bool]] = [(0, next(order), exit, (), False)]
    seen: set[tuple[Node, _Undo, bool]] = set()
    while waiting:
        norms, _, node, undo, summed = heapq.heappop(waiting)
        if (node, undo, summed) in seen:
            continue
        seen.add((node, undo, summed))
        if node not in inside:
            if node.op != "get_attr":
                _arrive(found, node, exit, norms, bool(undo), summed)
            continue
        steps = list(_steps(node, fed, varying))
        if not steps and node in fed:
            found.ends.append(node)
        for step in steps:
            left = _after(undo, node, step)
            heapq.heappush(waiting, (norms + step.norms, next(order), step.node, left, summed or step.sum))
    changing = {node: norms for node, norms in found.entries.items() if node in varying}
    found.entries = changing or found.entries
    return found


def _fed(nodes: Sequence[Node], inside: set[Node]) -> set[Node]:
    """The nodes of a block that hang on tensors computed outside, and not on parameters alone."""
    found: set[Node] = set()
    for node in nodes:
        for read in node.all_input_nodes:
            outer = read not in inside and read.op != "get_attr" and isinstance(read.meta.get("val"), Tensor)
            if outer or read in found:
                found.add(node)
    return found


def varying_tensors(graph: Graph) -> set[Node]:
    """The nodes whose tensors depend on the values, not only on the sizes, of the graph's inputs."""
    found: set[Node] = set()
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
                found.add(node)
    return found


def source(node: Node, written: set[Node]) -> Node:
    """The node that first held this value, followed back through ops that hand it on as it is.

    Nodes in `written` hold other values later, so they are their own source.
    """
    while node.target in CASTS | DROPOUTS | VIEWS | PARTS and node not in written:
        previous = node.args[0]
        if not isinstance(previous, Node) or previous in written or not same_kind(previous, node):
            return node
        node = previous
    return node


def same_kind(a: Node, b: Node) -> bool:
    """Whether two tensors have the same shape, symbolic sizes included, dtype and device."""
    x, y = a.meta.get("val"), b.meta.get("val")
    return same_shape(a, b) and x.dtype == y.dtype and x.device == y.device  # pyright: ignore


def _arrive(found: Ways, node: Node, exit: Node, norms: int, pending: bool, summed: bool) -> None:
    if not summed:
        found.sumless.append(node)
    elif pending or not same_kind(node, exit):
        found.changed.append(node)
    else:
        found.entries.setdefault(node, norms)


def _steps(node: Node, fed: set[Node], varying: set[Node]) -> Iterator[_Step]:
    """The ways on from a node, backwards."""
    target = node.target
    first, second, *_ = [a if isinstance(a, Node) else None for a in node.args[:2]] + [None] * 2
    if target in SUMS:
        for operand, other in ((first, second), (second, first)):
            if operand is not None and same_shape(operand, node):
                # A parameter only shifts, and a tensor that comes from outside as it is, is no branch of this block.
                branch = other is not None and other is not operand and source(other, set()) in fed
                yield _Step(operand, sum=branch)
    elif target in _SCALES:
        pairs = ((first, second),) if target in DIVISIONS else ((first, second), (second, first))
        for operand, other in pairs:
            if operand is not None and same_shape(operand, node) and other not in varying:
                yield _Step(operand)
    elif first is None:
        return
    elif target is operator.getitem:
        if node.args[1] == 0 and first.target in NORMS:
            yield _Step(first)
    elif target in NORMS:
        yield _Step(first, norms=1)
    elif target in _ACTIVATIONS | DROPOUTS | CASTS:
        yield _Step(first)
    elif target in VIEWS:
        yield _Step(first, moves="view")
    elif target in PERMUTES:
        yield _Step(first, moves="permute")
    elif target in PARTS and same_shape(first, node):
        yield _Step(first)


def _after(undo: _Undo, node: Node, step: _Step) -> _Undo:
    """What is left to undo after passing `node` backwards."""
    if not step.moves:
        return undo
    last = undo[-1][1] if undo and undo[-1][0] == step.moves else None
    if last is not None:
        undo = undo[:-1]
    before = step.node.meta["val"]
    if step.moves == "view":
        back = sizes(node.meta["val"].shape) if last is None else last
        undone = back == sizes(before.shape)
    else:
        order = _order(node, before.dim())
        back = order if last is None else tuple(order[d] for d in last)
        undone = back == tuple(range(len(back)))
    return undo if undone else (*undo, (step.moves, back))


def _order(node: Node, dims: int) -> tuple[int, ...]:
    """The order in which a transposing op takes its input's dimensions."""
    target: Any = node.target
    marked = torch.empty(*range(dims), device="meta")
    return tuple(target(marked, *node.args[1:], **node.kwargs).shape)
