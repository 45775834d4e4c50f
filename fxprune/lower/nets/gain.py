"""gain: how many times faster a net is than its ops one by one, measured on random inputs of the example's sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fxprune.graph.compat import example_size
from fxprune.graph.program import Program, fetch
from fxprune.measure.timing import interleave_steady

from ..layouts.nonzeros import Nonzeros
from ..layouts.site import Site
from ..layouts.tiles import TilesLayout
from .masks import with_four_dimensions
from .part import Part, dtype_of
from .regions import Region

_LAYOUTS = {torch.float32: Nonzeros(), torch.bfloat16: TilesLayout()}

SECONDS = 0.3
# Ops around packed linears lose less by running one by one than others do: what else is compiled with them is little.
PACKED = 1.13


def places_of(node: Node) -> tuple[int, int]:
    """Rows and columns of a map; of tokens one row."""
    sizes = sizes_of(node)
    return (sizes[2], sizes[3]) if len(sizes) == 4 else (1, sizes[1])


def sizes_of(node: Node) -> list[int]:
    """The sizes of a node's tensor, symbolic ones as in the example."""
    return [example_size(size) for size in node.meta["val"].shape]


@torch.no_grad()
def measure_gain(program: Program, region: Region, operands: Sequence[Any]) -> tuple[float, bool]:
    """Seconds of the region's ops, in the best memory format and with linears packed, over the net's.

    And whether that is worth keeping: whether nobody else wanted the cores meanwhile.
    """
    # A generator of its own, so that the user's random numbers go on as if nothing had been timed.
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sizes_of(node), generator=generator).to(dtype_of(node)) for node in region.inputs]
    if not all(x.numel() for x in inputs):
        return 0.0, True
    given = dict(zip(region.inputs, inputs, strict=True))
    masks = [with_four_dimensions(torch.zeros(sizes_of(node))) for node in region.masks]
    packed = any(part.kind == "linear" for part in region.parts.values())
    dtype = dtype_of(region.outputs[0])

    def net() -> list[Tensor]:
        found = torch.ops.fxprune.net([*(x.float() for x in inputs), *masks], *operands)
        return [y.to(dtype) for y in found]

    ways = [
        net,
        _ops(program, region, given, torch.contiguous_format),
    ]
    if packed:
        ways.append(_ops(program, region, given, torch.contiguous_format, packed=True))
    else:
        last = {node: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for node, x in given.items()}
        ways.append(_ops(program, region, last, torch.channels_last))
    found, steady = interleave_steady(ways, seconds=SECONDS)
    ours, plain, other = (samples.typical for samples in found)
    return min(plain, other * (PACKED if packed else 1.0)) / ours, steady


def _ops(
    program: Program, region: Region, given: Mapping[Node, Tensor], layout: torch.memory_format, *, packed: bool = False
) -> Callable[[], Any]:
    """A call of the region's ops, weights in this memory format, those of linears `packed` by their nonzeros."""
    order = [node for node in program.graph.nodes if node in region.nodes]
    constants = {
        source: fetch(program, str(source.target))
        for node in order
        for source in node.all_input_nodes
        if source.op == "get_attr"
    }
    constants = {node: t.to(memory_format=layout) if t.dim() == 4 else t for node, t in constants.items()}
    linears = {node: part for node, part in region.parts.items() if packed and part.kind == "linear"}
    calls = {node: _packed(program, node, part) for node, part in linears.items()}

    def call() -> None:
        values: dict[Node, Any] = {**constants, **given}

        def value(node: Node) -> Any:
            return values[node] if node in values else _made_up(node)

        for node in order:
            if node in calls:
                values[node] = calls[node](values[linears[node].maps[0]])
                continue
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    return call


def _made_up(node: Node) -> Any:
    """A size as in the example, or a mask that hides nothing."""
    made = node.meta["val"]
    if not isinstance(made, Tensor):
        return example_size(made)
    return (
        torch.zeros(sizes_of(node), dtype=made.dtype) == 0 if made.dtype == torch.bool else torch.zeros(sizes_of(node))
    )


def _packed(program: Program, node: Node, part: Part) -> Callable[[Tensor], Tensor]:
    """A linear whose weight is stored as it is without nets, where it can be."""
    bias = None if part.bias is None else fetch(program, str(part.bias.target))
    site = Site("", node.name, weight_of(program, part), bias, (math.prod(sizes_of(node)[:2]),))
    layout = _LAYOUTS[dtype_of(node)]
    if not layout.fits(site).ok:
        return lambda x: F.linear(x, site.weight, bias)
    packed = layout.pack(site)
    return lambda x: layout.call(x, packed, bias)


def weight_of(program: Program, part: Part) -> Tensor:
    """The weight [o, ...] of a convolution or a linear."""
    assert part.weight is not None
    weight = fetch(program, str(part.weight.target))
    return weight.t().contiguous() if part.transposed else weight
