"""segments: in which order the weights of a graph are fitted, and what must be remembered in between.

A weight is fitted on what the weights before it, already fitted, let through. Weights that do not depend on each other
(query, key and value) share a segment, but for those whose outputs meet in one sum: the last of them makes up for the
others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch.fx import Node

from fxprune.graph.memory import base, written
from fxprune.graph.program import Program

from .layer import Branch, Layer


@dataclasses.dataclass(frozen=True)
class Segment:
    """Nodes to run, in the graph's order, then layers to fit.

    `dense` and `pruned` are the nodes whose values the two sides must remember for later segments. The pruned side
    cannot run a layer before it is fitted, so it runs those of one segment at the start of the next.
    """

    nodes: tuple[Node, ...]
    layers: tuple[Layer, ...]
    dense: frozenset[Node]
    pruned: frozenset[Node]


def plan_segments(program: Program, layers: Iterable[Layer]) -> list[Segment]:
    """The segments of a program for these layers; nodes that no layer needs are in none of them."""
    by_node = {layer.node: layer for layer in layers}
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    before = _dependencies(program)
    level = _levels(before, by_node)
    for end, sides in _meetings(by_node, order).items():
        # Where two ways meet and neither output is known before the other, the later weight waits for the first.
        if not any(_is_known(branch, end, node, level, by_node, order) for node, branch in sides):
            node, branch = sides[-1]
            making = _making(branch, end, order)
            if not _needs(before, making, node):
                before[node] += making
                level = _levels(before, by_node)
    for node, layer in by_node.items():
        if (branch := layer.branch) is not None:
            unknown = [end for end in branch.others if not _is_known(branch, end, node, level, by_node, order)]
            if unknown:
                by_node[node] = dataclasses.replace(layer, branch=branch.before(unknown[0]))
    needed = _needed(by_node, before)
    count = 1 + max((level[node] for node in by_node), default=-1)
    segments = []
    for at in range(count):
        mine = [n for n in needed if level[n] == at and n.op not in ("placeholder", "get_attr")]
        mine.sort(key=order.__getitem__)
        later = {n for n in needed if level[n] > at}
        dense = {d for n in later for d in n.all_input_nodes if level[d] <= at}
        # A layer's own inputs are read once more, when the pruned side runs it.
        again = {d for n in mine if n in by_node for d in n.all_input_nodes}
        pruned = {d for d in dense | again if not (d in by_node and level[d] == at)}
        segments.append(
            Segment(
                tuple(n for n in mine if n not in by_node),
                tuple(by_node[n] for n in mine if n in by_node),
                frozenset(n for n in dense if n.op != "get_attr"),
                frozenset(n for n in pruned if n.op != "get_attr"),
            )
        )
    return segments


def _levels(before: Mapping[Node, list[Node]], by_node: Mapping[Node, Layer]) -> dict[Node, int]:
    """The segment at which each node can run, or be fitted: one more than that of the layers before it."""
    level: dict[Node, int] = {}
    waiting: list[Node] = list(before)[::-1]
    while waiting:
        node = waiting[-1]
        missing = [d for d in before[node] if d not in level] if node not in level else []
        if missing:
            waiting += missing
            continue
        waiting.pop()
        level.setdefault(node, max((level[d] + (d in by_node) for d in before[node]), default=0))
    return level


def _needs(before: Mapping[Node, list[Node]], nodes: list[Node], node: Node) -> bool:
    """Whether one of `nodes` can only run after `node`."""
    seen: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        at = waiting.pop()
        if at is node:
            return True
        if at not in seen:
            seen.add(at)
            waiting += before[at]
    return False


def _meetings(by_node: Mapping[Node, Layer], order: Mapping[Node, int]) -> dict[Node, list[tuple[Node, Branch]]]:
    """Sum -> the layers whose way leads through it, both in the graph's order."""
    found: dict[Node, list[tuple[Node, Branch]]] = {}
    for node in sorted(by_node, key=order.__getitem__):
        if (branch := by_node[node].branch) is not None:
            for end in branch.others:
                found.setdefault(end, []).append((node, branch))
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _is_known(
    branch: Branch,
    end: Node,
    node: Node,
    level: Mapping[Node, int],
    by_node: Mapping[Node, Layer],
    order: Mapping[Node, int],
) -> bool:
    """Whether what the sum `end` adds to a layer's output is known when the layer is fitted."""
    return all(level[n] + (n in by_node) <= level[node] for n in _making(branch, end, order))


def _making(branch: Branch, end: Node, order: Mapping[Node, int]) -> list[Node]:
    """What must have run for the other side of a sum to be what the sum reads: itself, and writes to its memory."""
    other = branch.others[end]
    memory = base(other)
    between = [n for n in order if order[other] < order[n] < order[end]]
    return [other, *(n for n in between if any(base(tensor) is memory for tensor in written(n)))]


def _dependencies(program: Program) -> dict[Node, list[Node]]:
    """What must run before each node: what it reads, and for writes in place also what reads the old values."""
    before = {node: list(node.all_input_nodes) for node in program.graph.nodes}
    touched: dict[Node, list[Node]] = {}
    wrote: dict[Node, Node] = {}
    for node in program.graph.nodes:
        memories = {base(read) for read in node.all_input_nodes}
        for memory in memories:
            if memory in wrote:
                before[node].append(wrote[memory])
        for tensor in written(node):
            memory = base(tensor)
            before[node] += [n for n in touched.get(memory, ()) if n is not node]
            wrote[memory] = node
        for memory in memories:
            touched.setdefault(memory, []).append(node)
    return before


def _needed(by_node: Mapping[Node, Layer], before: Mapping[Node, list[Node]]) -> set[Node]:
    """The layers, the sums that take in their outputs, and what all these need."""
    waiting = list(by_node)
    for layer in by_node.values():
        waiting += layer.branch.way[-1:] if layer.branch is not None else ()
    found: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += before[node]
    return found
