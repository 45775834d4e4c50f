"""The bitmap layout: one bit an element and the nonzero values, for few tokens on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.kernels.triton import bitmap, operands

from .gpu import GpuLayout
from .site import Site


class Bitmap(GpuLayout):
    """Pays from about half zeros; `triton_kernels.bitmap` has the format."""

    name = "bitmap"
    tensors = ("bits", "values", "starts", "ranks")
    most = 64

    def refuses(self, site: Site) -> str:
        """Rows too long to be ranked by 16 bits."""
        longest = int((operands.as_integers(site.weight) != 0).sum(1).max())
        return f"a row of {longest} nonzeros is too long" if longest > 65535 else ""

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Its bits, values, starts and ranks."""
        packed = bitmap.pack(weight)
        return packed.bits, packed.values, packed.starts, packed.ranks

    def join(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        """The weight."""
        packed = bitmap.Bitmap(shape, *tensors)
        return bitmap.unpack(packed) if tensors[0].is_cuda else bitmap.reference_unpack(packed)

    def launch(
        self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, shape: tuple[int, int], activation: str
    ) -> Tensor:
        """By `triton_kernels.bitmap`."""
        return bitmap.linear(x, bitmap.Bitmap(shape, *tensors), bias, activation)

    def bytes_of(self, weight: Tensor) -> float:
        """A bit an element, 2 bytes each 64 columns, 8 a row, and the values."""
        nonzeros = int(torch.count_nonzero(weight))
        return weight.numel() / 8 + weight.numel() / 32 + 8 * len(weight) + nonzeros * weight.element_size()
