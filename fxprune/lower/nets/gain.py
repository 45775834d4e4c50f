"""gain: how many times faster a net is than its ops one by one, measured on random images of the example's sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.graph.compat import symbol_hint
from fxprune.graph.program import Program, fetch
from fxprune.measure.timing import interleave_steady

from .regions import Region

SECONDS = 0.3


def sizes_of(node: Node) -> list[int]:
    """The sizes of a node's tensor, symbolic ones as in the example."""
    return [_hint(size) for size in node.meta["val"].shape]


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({s: symbol_hint(size.node.shape_env, s) for s in expression.free_symbols}))


@torch.no_grad()
def measure_gain(program: Program, region: Region, operands: Sequence[Any]) -> tuple[float, bool]:
    """Seconds of the region's ops, in the memory format that suits them better, over those of the net.

    And whether that is worth keeping: whether nobody else wanted the cores meanwhile.
    """
    # A generator of its own, so that the user's random numbers go on as if nothing had been timed.
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sizes_of(node), generator=generator) for node in region.inputs]
    if not all(x.numel() for x in inputs):
        return 0.0, True
    last = [x.to(memory_format=torch.channels_last) for x in inputs]
    ways = [
        _ops(program, region, inputs, torch.contiguous_format),
        _ops(program, region, last, torch.channels_last),
        lambda: torch.ops.fxprune.conv_net(inputs, *operands),
    ]
    found, steady = interleave_steady(ways, seconds=SECONDS)
    plain, images, ours = (samples.typical for samples in found)
    return min(plain, images) / ours, steady


def _ops(program: Program, region: Region, inputs: list[Tensor], layout: torch.memory_format) -> Callable[[], Any]:
    """A call of the region's ops, weights in this memory format."""
    constants = {
        source: fetch(program, str(source.target))
        for node in region.parts
        for source in node.all_input_nodes
        if source not in region.parts and source not in region.inputs
    }
    constants = {node: t.to(memory_format=layout) if t.dim() == 4 else t for node, t in constants.items()}
    given = dict(zip(region.inputs, inputs, strict=True))

    def call() -> None:
        values: dict[Node, Any] = {**constants, **given}
        for node in region.parts:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    return call
