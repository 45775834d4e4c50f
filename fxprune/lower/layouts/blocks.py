"""The blocks layout: the tiles of a weight that are not zero, for any number of tokens on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxprune.kernels.triton import blocks

from .gpu import GpuLayout
from .site import LEAST_ZEROS, Site

# The largest tile that leaves enough of a weight out is taken: larger ones multiply faster.
_SIDES = (64, 32, 16)


class Blocks(GpuLayout):
    """Tiles of 64, 32 or 16 squared; `triton_kernels.blocks` has the format."""

    name = "blocks"
    tensors = ("values", "columns", "starts", "order")

    def refuses(self, site: Site) -> str:
        """Weights that no tile divides, or of which too few tiles are zero."""
        if _side(site.weight) is not None:
            return ""
        o, i = site.weight.shape
        if o % _SIDES[-1] or i % _SIDES[-1]:
            return f"no tile of {' or '.join(map(str, _SIDES))} squared divides [{o}, {i}]"
        return f"{_zero_tiles(site.weight, _SIDES[-1]):.0%} of its tiles are zero, {LEAST_ZEROS:.0%} is the least"

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Its values, columns, starts and order."""
        side = _side(weight) or next((s for s in _SIDES if not weight.shape[0] % s and not weight.shape[1] % s), 1)
        packed = blocks.pack(weight, (side, side))
        return packed.values, packed.columns, packed.starts, packed.order

    def join(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        """The weight."""
        return blocks.unpack(blocks.Tiles(shape, *tensors))

    def launch(
        self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, shape: tuple[int, int], activation: str
    ) -> Tensor:
        """By `triton_kernels.blocks`."""
        return blocks.linear(x, blocks.Tiles(shape, *tensors), bias, activation)

    def bytes_of(self, weight: Tensor) -> float:
        """The tiles that are left."""
        side = _side(weight) or _SIDES[-1]
        return weight.numel() * weight.element_size() * (1 - _zero_tiles(weight, side))


def _side(weight: Tensor) -> int | None:
    """The side of the tiles to store a weight by."""
    o, i = weight.shape
    return next((s for s in _SIDES if not o % s and not i % s and _zero_tiles(weight, s) >= LEAST_ZEROS), None)


def _zero_tiles(weight: Tensor, side: int) -> float:
    """The share of tiles that are zero."""
    o, i = weight.shape
    if o % side or i % side:
        return 0.0
    tiles = weight.reshape(o // side, side, i // side, side)
    return 1.0 - float((tiles != 0).any(3).any(1).float().mean())
