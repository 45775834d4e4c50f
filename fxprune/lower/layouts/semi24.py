"""The semi24 layout: two values of each four and their places, for few tokens on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.kernels.triton import gemv24, prune24

from .gpu import GpuLayout
from .site import Site


class Semi24(GpuLayout):
    """Half the values and four bits for each four; `triton_kernels.prune24` has the format."""

    name = "semi24"
    tensors = ("values", "meta")
    most = 64

    def refuses(self, site: Site) -> str:
        """Weights that have more than two nonzeros in some four, or -0.0, which the format does not keep."""
        return refuse_24(site.weight)

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Its values and meta."""
        return prune24.pack(weight) if weight.is_cuda else prune24.reference_pack(weight)

    def join(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        """The weight."""
        return prune24.unpack(*tensors) if tensors[0].is_cuda else prune24.reference_unpack(*tensors)

    def launch(
        self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, shape: tuple[int, int], activation: str
    ) -> Tensor:
        """By `triton_kernels.gemv24`."""
        return gemv24.linear(x, tensors[0], tensors[1], bias, activation)

    def bytes_of(self, weight: Tensor) -> float:
        """Half the values and an eighth of a byte an element."""
        return weight.numel() * (weight.element_size() / 2 + 1 / 8)


def refuse_24(weight: Tensor) -> str:
    """Why a weight [o, i] cannot be stored by two of each four; nothing if it can."""
    o, i = weight.shape
    if i % 4:
        return f"i={i} is not a multiple of 4"
    over = int(((weight.reshape(-1, 4) != 0).sum(1) > 2).sum())
    if over:
        return f"{over} of {o * i // 4} fours have more than two nonzeros"
    negative = (weight == 0) & torch.signbit(weight)
    return "it holds -0.0, which the format does not keep" if bool(negative.any()) else ""
