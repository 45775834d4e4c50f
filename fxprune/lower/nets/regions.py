"""regions: the parts of a graph that can each be one call, in their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import sympy
import torch
from torch.fx import Graph, Node

from .part import WEIGHED, Part, dtype_of
from .read import read, written


@dataclasses.dataclass(frozen=True)
class Region:
    """Nodes that become one net: `parts` in the order of the graph, what they read from outside, what others read.

    `inputs` are maps, those of one image for all last; `masks` what is added to scores. `nodes` are the parts and all
    that they stand for.
    """

    parts: dict[Node, Part]
    inputs: tuple[Node, ...]
    masks: tuple[Node, ...]
    outputs: tuple[Node, ...]
    nodes: frozenset[Node]


def regions(graph: Graph, wanted: Callable[[Part], bool] = lambda _: True) -> list[Region]:
    """The largest parts that convolutions or linears begin and nothing outside lies between.

    A part joins the open region unless what it reads hangs on that region through something else; then the region is
    closed and another opened. Parts that are not `wanted` stay outside.
    """
    opened: list[dict[Node, Part]] = []
    of: dict[Node, int] = {}
    behind: dict[Node, set[int]] = {}  # the regions that a node outside them hangs on
    for node in graph.nodes:
        part = read(node)
        if part is not None and not wanted(part):
            part = None
        inputs = node.all_input_nodes if part is None else part.sources
        blocked = {number for source in inputs for number in behind[source] if of.get(source) != number}
        outside = blocked | {of[source] for source in inputs if source in of}
        if part is None or not _may_write(node, of):
            behind[node] = outside
            continue
        now = len(opened) - 1
        if now < 0 or now in blocked:
            opened.append({})
            now += 1
        opened[now][node] = part
        of[node] = now
        behind[node] = {number for number in outside if number != now}
    found = [piece for nodes in opened for piece in _pieces(nodes)]
    return [region for piece in found for region in _region(graph, piece)]


def _may_write(node: Node, of: dict[Node, int]) -> bool:
    """Whether a node writes to nothing, or to what only a region has made and nobody reads after it."""
    target = written(node)
    if target is None:
        return True
    # Whatever else reads it has done so, and none of these is a view that somebody reads later.
    return target in of and all(user is node or user in of for user in target.users)


def _pieces(nodes: dict[Node, Part]) -> list[dict[Node, Part]]:
    """Nodes that hang together and that a convolution is among or before, each as a dictionary in order."""
    begun: set[Node] = set()
    for node, part in nodes.items():
        if part.kind in (*WEIGHED, "depthwise") or any(source in begun for source in part.maps):
            begun.add(node)
    group: dict[Node, Node] = {}

    def first(node: Node) -> Node:
        while group[node] is not node:
            node = group[node]
        return node

    for node in nodes:
        if node in begun:
            group[node] = node
            for source in nodes[node].maps:
                if source in begun:
                    group[first(source)] = first(node)
    found: dict[Node, dict[Node, Part]] = {}
    for node in group:
        found.setdefault(first(node), {})[node] = nodes[node]
    return list(found.values())


def _region(graph: Graph, parts: dict[Node, Part]) -> list[Region]:
    """The region of these nodes, unless one call cannot stand for them."""
    weighs = any(part.kind in WEIGHED for part in parts.values())
    if not weighs or len({_images(node) for node in parts}) > 1:
        return []
    inputs = dict.fromkeys(source for part in parts.values() for source in part.maps if source not in parts)
    if len({dtype_of(node) for node in (*parts, *inputs)}) > 1:
        return []
    masks = dict.fromkeys(part.mask for part in parts.values() if part.mask is not None)
    nodes = _with_inside(parts)
    outputs = tuple(node for node in parts if any(user not in nodes for user in node.users))
    place = {node: number for number, node in enumerate(graph.nodes)}
    ready = max((place[node] for node in (*inputs, *masks) if node.op != "get_attr"), default=-1)
    images = _images(next(iter(parts)))
    if any(_images(node) not in (images, 1) for node in inputs) or all(_images(node) != images for node in inputs):
        return []
    if any(place[user] < ready for node in outputs for user in node.users if user not in nodes):
        return []
    # Between what is read and where it was read last somebody may write to it.
    last = max(place[node] for node in parts)
    for node in graph.nodes:
        if ready < place[node] < last and node not in parts and _mutates(node):
            return []
    # The first says how many images there are.
    ordered = sorted(inputs, key=lambda node: _images(node) != images)
    return [Region(parts, tuple(ordered), tuple(masks), outputs, nodes)]


def _with_inside(parts: dict[Node, Part]) -> frozenset[Node]:
    """The parts, and of the nodes that they stand for as well those that nobody else reads."""
    nodes = {*parts, *(node for part in parts.values() for node in part.inside)}
    while others := {node for node in nodes if node not in parts and any(user not in nodes for user in node.users)}:
        nodes -= others
    return frozenset(nodes)


def _images(node: Node) -> sympy.Expr | int:
    size = node.meta["val"].shape[0]
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
