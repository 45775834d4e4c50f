"""lower: regions of a folded program become calls of fxprune::net."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import cast

import torch
from torch.fx import Graph, Node

from fxprune.graph.program import Program, arguments, fetch

from ..layouts.site import LEAST_ZEROS
from .build import Builder, Net, is_of_tokens, weights_in
from .gain import places_of, sizes_of
from .lines import lift_lines
from .part import WEIGHED, Part
from .regions import Region, regions
from .tiles import lanes

aten = torch.ops.aten

# Multiply-adds of linears, zeros included, under which other kernels are as good.
LEAST_WORK = 4_000_000


def lower_nets(program: Program, names: Collection[str], *, forced: bool = False, rounds: bool = False) -> list[Net]:
    """Puts a call in place of each region where it measures faster, in place; `forced` measures nothing.

    Tried are regions in which weights of `names` have zeros enough. Where it `rounds`, products may be of bfloat16
    numbers.
    """
    _drop_dropouts(program.graph)
    lift_lines(program, names)
    found: list[Net] = []
    tried: set[Node] = set()
    zeros: dict[Node, float] = {}

    def wanted(part: Part) -> bool:
        # Linears have other kernels as well; what those are forced to, and dense ones, are left to them.
        if part.kind not in ("linear", "layer norm", "attention"):
            return True
        if part.kind == "linear" and part.weight is not None and part.weight not in zeros:
            zeros[part.weight] = _zeros_of(program, part)
        return not forced and (part.kind != "linear" or zeros[cast(Node, part.weight)] >= LEAST_ZEROS)

    def next_region() -> Region | None:
        return next((r for r in regions(program.graph, wanted) if tried.isdisjoint(r.parts)), None)

    while (region := next_region()) is not None:
        tried.update(region.parts)
        if not any(name in names for name in weights_in(region)):
            continue
        share = _zeros(program, region)
        if share < LEAST_ZEROS:
            few = f"{share:.1%} zeros are too few; {LEAST_ZEROS:.0%} is the least that is tried"
            found.append(Net(False, few, weights_in(region), {}))
        elif not is_of_tokens(region) or _is_worth_a_try(region):
            found.append(Builder(program, region, rounds=rounds).build(forced=forced))
    return found


def _is_worth_a_try(region: Region) -> bool:
    """Whether linears have tokens enough for the lanes, and work enough that a gain could be felt."""
    linears = {node: part for node, part in region.parts.items() if part.kind == "linear"}
    images = sizes_of(next(iter(linears)))[0]
    tokens = images * max(math.prod(places_of(node)) for node in linears)
    return 2 * tokens >= lanes() and images * sum(_work(*each) for each in linears.items()) >= LEAST_WORK


def _drop_dropouts(graph: Graph) -> None:
    """Takes out dropouts that drop nothing, so that they part no neighbours."""
    for node in list(graph.nodes):
        if node.target is aten.dropout.default and not arguments(node)["train"]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _work(node: Node, part: Part) -> int:
    """Multiply-adds of a convolution or a linear for an image, zeros included."""
    assert part.weight is not None
    # Each tap of a transposed convolution meets each place of its input.
    places = places_of(part.maps[0] if part.kind == "transposed conv" else node)
    return part.weight.meta["val"].numel() * math.prod(places)


def _zeros(program: Program, region: Region) -> float:
    """The share of zeros in the weights of convolutions and linears, each weighed by its work."""
    work = zeros = 0.0
    for node, part in region.parts.items():
        if part.kind in WEIGHED:
            work += _work(node, part)
            zeros += _work(node, part) * _zeros_of(program, part)
    return zeros / max(work, 1.0)


def _zeros_of(program: Program, part: Part) -> float:
    assert part.weight is not None
    weight = fetch(program, str(part.weight.target))
    return 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
