"""stages: in which order the weights of a graph are fitted, and what must be remembered in between.

A weight is fitted on what the weights before it, already fitted, let through. Weights that do not depend on each other
(query, key and value) share a stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch.fx import Node

from ..alias import base, written
from ..capture import Program
from .site import Branch, Site


@dataclasses.dataclass(frozen=True)
class Stage:
    """Nodes to run, in the graph's order, then sites to fit.

    `dense` and `pruned` are the nodes whose values the two sides must remember for later stages. The pruned side cannot
    run a site before it is fitted, so it runs those of one stage at the start of the next.
    """

    nodes: tuple[Node, ...]
    sites: tuple[Site, ...]
    dense: frozenset[Node]
    pruned: frozenset[Node]


def plan_stages(program: Program, sites: Iterable[Site]) -> list[Stage]:
    """The stages of a program for these sites; nodes that no site needs are in none of them."""
    by_node = {site.node: site for site in sites}
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    before = _dependencies(program)
    level: dict[Node, int] = {}
    for node in program.graph.nodes:
        level[node] = max((level[d] + (d in by_node) for d in before[node]), default=0)
    # What is added to an output can only be allowed for where it is known before the output.
    known = {node: at + (node in by_node) for node, at in level.items()}
    for node, site in by_node.items():
        if site.branch is not None and any(known[n] > level[node] for n in _making(site.branch, order)):
            by_node[node] = dataclasses.replace(site, branch=None)
    needed = _needed(by_node, before)
    count = 1 + max((level[node] for node in by_node), default=-1)
    stages = []
    for at in range(count):
        mine = [n for n in needed if level[n] == at and n.op not in ("placeholder", "get_attr")]
        mine.sort(key=order.__getitem__)
        later = {n for n in needed if level[n] > at}
        dense = {d for n in later for d in n.all_input_nodes if level[d] <= at}
        # A site's own inputs are read once more, when the pruned side runs it.
        again = {d for n in mine if n in by_node for d in n.all_input_nodes}
        pruned = {d for d in dense | again if not (d in by_node and level[d] == at)}
        stages.append(
            Stage(
                tuple(n for n in mine if n not in by_node),
                tuple(by_node[n] for n in mine if n in by_node),
                frozenset(n for n in dense if n.op != "get_attr"),
                frozenset(n for n in pruned if n.op != "get_attr"),
            )
        )
    return stages


def _making(branch: Branch, order: Mapping[Node, int]) -> list[Node]:
    """What must have run for the other side of a sum to be what the sum reads: itself, and writes to its memory."""
    memory = base(branch.other)
    between = [n for n in order if order[branch.other] < order[n] < order[branch.sum]]
    return [branch.other, *(n for n in between if any(base(tensor) is memory for tensor in written(n)))]


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


def _needed(by_node: Mapping[Node, Site], before: Mapping[Node, list[Node]]) -> set[Node]:
    """The sites, the sums that take in their outputs, and what all these need."""
    waiting = list(by_node)
    for site in by_node.values():
        waiting += [site.branch.sum] if site.branch is not None else []
    found: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += before[node]
    return found
