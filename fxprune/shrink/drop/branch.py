"""branch: the way from a module's output on to the one sum that adds it to a residual stream.

Searched forwards from the output. A way may pass what hands zeros on as zeros: dropout, casts, views, transposes, parts
of a tensor, and scales that are not computed from the stream. Without the branch, the stream goes on as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Set

import torch
from torch.fx import Node

from fxprune.graph.memory import DROPOUTS
from fxprune.graph.ops import SUMS
from fxprune.graph.program import arguments, same_shape

from .facts import NO_WRITES, OUTPUT, Facts, Refusal, described, output_of, reader_beside
from .residual import CASTS, DIVISIONS, PARTS, PERMUTES, VIEWS, same_kind

aten = torch.ops.aten

_PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar}
# They make zeros of zeros, whatever their other arguments are.
_ALIKE = (
    DROPOUTS | CASTS | VIEWS | PERMUTES | PARTS | DIVISIONS | {aten.neg.default, aten.neg_.default, aten.roll.default}
)
# Reads a tensor and computes nothing.
_CHECK = aten._assert_tensor_metadata.default


@dataclasses.dataclass(frozen=True)
class Leaving:
    """What is zero where the branches that leave are: tensors in `zeros`. `inside` are the nodes of their modules."""

    zeros: Set[Node]
    inside: Set[Node]


@dataclasses.dataclass(frozen=True)
class Added:
    """A branch ends where `sum` adds it to `stream`; `tail` are the nodes from its output on, the sum among them."""

    stream: Node
    sum: Node
    tail: tuple[Node, ...]


@dataclasses.dataclass
class _Way:
    """What the search on from a branch's output met.

    streams  sum of the branch and of something else -> that other addend
    passed   nodes that hand its zeros on
    factors  tensors that it is multiplied with, or divided by
    ends     nodes outside of the module that no way leads through
    """

    streams: dict[Node, Node] = dataclasses.field(default_factory=dict)
    passed: list[Node] = dataclasses.field(default_factory=list)
    factors: list[Node] = dataclasses.field(default_factory=list)
    ends: list[Node] = dataclasses.field(default_factory=list)


def leaving_together(facts: Facts, paths: Iterable[str]) -> Leaving:
    """What is zero where all of these modules answer zeros: two of them may be addends of one sum."""
    calls = [nodes for path in paths for nodes in facts.calls[path]]
    zeros, waiting = set(), [exit for nodes in calls if isinstance(exit := output_of(facts, nodes), Node)]
    while waiting:
        node = waiting.pop()
        zeros.add(node)
        waiting += [user for user in node.users if user not in zeros and _hands_on(user, zeros)]
    return Leaving(zeros, {node for nodes in calls for node in nodes})


def added(facts: Facts, nodes: list[Node], leaving: Leaving) -> Added | Refusal:
    """The sum that adds one call of a module to a stream, or why there is none."""
    exit = output_of(facts, nodes)
    if isinstance(exit, Refusal):
        return exit
    way = _way_on(exit, set(nodes), leaving.zeros)
    if why := _why_not(facts, exit, way, leaving.zeros):
        return Refusal(why, ends=tuple(way.ends))
    (total, stream), *_ = way.streams.items()
    found = Added(stream, total, (*way.passed, total))
    if why := _written(facts, nodes, found, leaving):
        return Refusal(why, NO_WRITES)
    return found


def _way_on(exit: Node, inside: Set[Node], zeros: Set[Node]) -> _Way:
    way, waiting, seen = _Way(), [exit], {exit}
    while waiting:
        for user in waiting.pop().users:
            if user in seen or user.target is _CHECK:
                continue
            seen.add(user)
            if user in zeros:
                way.passed.append(user)
                if user.target in _PRODUCTS | DIVISIONS:
                    way.factors += [node for node in user.all_input_nodes if node not in zeros]
                waiting.append(user)
            elif user not in inside:
                stream = _other_addend(user, zeros)
                way.ends += [user] if stream is None else []
                way.streams.update({} if stream is None else {user: stream})
    return way


def _hands_on(node: Node, zeros: Set[Node]) -> bool:
    """Whether a node is zero where the tensors in `zeros` are."""
    first, second = _operands(node)
    if node.target in _PRODUCTS:
        return first in zeros or second in zeros
    if node.target in SUMS:
        return first in zeros and second in zeros
    return node.target in _ALIKE and first in zeros


def _other_addend(node: Node, zeros: Set[Node]) -> Node | None:
    """What a sum adds to a tensor in `zeros`."""
    operands = _operands(node) if node.target in SUMS else (None, None)
    others = [operand for operand in operands if operand is not None and operand not in zeros]
    return others[0] if len(others) == 1 and None not in operands else None


def _operands(node: Node) -> tuple[Node | None, Node | None]:
    first, second, *_ = [a if isinstance(a, Node) else None for a in node.args[:2]] + [None] * 2
    return first, second


def _why_not(facts: Facts, exit: Node, way: _Way, zeros: Set[Node]) -> str:
    """Why a module whose output is `exit` is no branch; "" where it is one."""
    if way.ends:
        end = way.ends[0]
        reader = OUTPUT if end.op == "output" else f"{end.name} ({end.target})"
        return f"{exit.name} leads to {reader}, and not only into a sum"
    if len(way.streams) != 1:
        sums = " and ".join(node.name for node in way.streams)
        return f"more than one sum adds {exit.name}: {sums}" if sums else f"no sum adds {exit.name}"
    (total, stream), *_ = way.streams.items()
    addend = next(node for node in _operands(total) if node is not None and node in zeros)
    if not same_kind(stream, total) or not same_shape(addend, total):
        return f"{total.name} broadcasts or casts: {described(addend)} and {described(stream)} are added"
    if total.args[1] is stream and (alpha := arguments(total)["alpha"]) != 1:
        return f"{total.name} takes {stream.name} times alpha={alpha}"
    for factor in way.factors:
        if _is_computed_from(factor, stream, facts):
            return f"it is multiplied with {factor.name}, which is computed from {stream.name}, to which it is added"
    return ""


def _is_computed_from(node: Node, origin: Node, facts: Facts) -> bool:
    waiting, seen = [node], set()
    while waiting:
        found = waiting.pop()
        if found is origin:
            return True
        if found not in seen and facts.place[found] > facts.place[origin]:
            seen.add(found)
            waiting += found.all_input_nodes
    return False


def _written(facts: Facts, nodes: list[Node], found: Added, leaving: Leaving) -> str:
    """Why writes in place keep a branch from leaving; "" where they do not.

    A write of the sum to the stream itself (x += branch), or of the module to its input (relu_ of a norm), leaves with
    the branch if nobody else looks at that memory afterwards.
    """
    for node in (*nodes, *found.tail):
        for memory in facts.memory.writes.get(node, ()):
            if memory in leaving.inside or memory in leaving.zeros:
                continue
            by_sum = node is found.sum and node.args[0] is found.stream
            if not by_sum and (node not in leaving.inside or memory.op != "call_function"):
                return f"{node.name} ({node.target}) writes to {memory.name}, which is computed outside"
            writers = [node] if by_sum else nodes
            reader = reader_beside(facts, memory, writers, set(writers), found.sum, writers[0])
            if reader is not None:
                return f"{node.name} ({node.target}) writes to {memory.name}, which {reader.name} reads later"
    return ""
