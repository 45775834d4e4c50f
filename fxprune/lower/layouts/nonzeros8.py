"""The nonzeros8 layout: nonzero values and their 8-bit columns, for few tokens on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.kernels.triton import nonzeros

from .gpu import GpuLayout
from .site import Site


class Nonzeros8(GpuLayout):
    """Pays from about 70% zeros; `triton_kernels.nonzeros` has the format."""

    name = "nonzeros8"
    tensors = ("values", "columns", "chunks", "order", "starts")
    most = 64

    def refuses(self, site: Site) -> str:
        """More columns than 256 chunks of 256."""
        columns, most = site.weight.shape[1], 256 * nonzeros.CHUNK
        return f"{columns} columns are more than {most}" if columns > most else ""

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Its values, columns, chunks, order and starts."""
        packed = nonzeros.pack(weight)
        return packed.values, packed.columns, packed.chunks, packed.order, packed.starts

    def join(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        """The weight."""
        packed = nonzeros.Nonzeros(shape, *tensors)
        return nonzeros.unpack(packed) if tensors[0].is_cuda else nonzeros.reference_unpack(packed)

    def launch(
        self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, shape: tuple[int, int], activation: str
    ) -> Tensor:
        """By `triton_kernels.nonzeros`."""
        return nonzeros.linear(x, nonzeros.Nonzeros(shape, *tensors), bias, activation)

    def bytes_of(self, weight: Tensor) -> float:
        """A value, a column and an eighth of a chunk for each nonzero, and half a group left over in each chunk."""
        slots = (
            int(torch.count_nonzero(weight)) + len(weight) * -(-weight.shape[1] // nonzeros.CHUNK) * nonzeros.GROUP / 2
        )
        return slots * (weight.element_size() + 1 + 1 / nonzeros.GROUP)
