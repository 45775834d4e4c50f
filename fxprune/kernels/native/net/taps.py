"""taps: how a kernel lies over a map, and what becomes of its sums."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order of activations.h; relu is a clamp to [low, high].
ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "hardsigmoid", "hardswish")


@dataclasses.dataclass(frozen=True)
class Taps:
    """How a kernel lies over a map: its size, strides, zeros around the map, and steps between its taps."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # above, below, left, right
    dilation: tuple[int, int] = (1, 1)

    def columns(self, tile: int) -> list[int]:
        """The columns of the input, from the first output's, that a tile reads, in the order of its block."""
        result: list[int] = []
        (_, width), (_, stride), (_, step) = self.kernel, self.stride, self.dilation
        for phase in range(stride):
            most = max((k * step // stride for k in range(width) if k * step % stride == phase), default=None)
            if most is not None:
                result += [q * stride + phase for q in range(tile + most)]
        return result

    def offsets(self, tile: int) -> list[int]:
        """The vector of each tap in a channel's block."""
        columns = self.columns(tile)
        at = [columns.index(b * self.dilation[1]) for b in range(self.kernel[1])]
        return [a * len(columns) + b for a in range(self.kernel[0]) for b in at]

    def places(self, tile: int) -> int:
        """Vectors of a channel's block."""
        return self.kernel[0] * len(self.columns(tile))

    def out(self, size: Sequence[Any]) -> tuple[Any, Any]:
        """Height and width of what a map of this height and width becomes."""
        above, below, left, right = self.padding
        reach = [step * (k - 1) + 1 for step, k in zip(self.dilation, self.kernel, strict=True)]
        rows, columns = size[0] + above + below - reach[0], size[1] + left + right - reach[1]
        return rows // self.stride[0] + 1, columns // self.stride[1] + 1

    def integers(self) -> list[int]:
        """As a program has them."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Taps:
        """From a program's."""
        kh, kw, sh, sw, above, below, left, right, dh, dw = numbers
        return cls((kh, kw), (sh, sw), (above, below, left, right), (dh, dw))


@dataclasses.dataclass(frozen=True)
class Finish:
    """An activation; relu clamps to [low, high]. `adds_last` says that a residual comes after it."""

    activation: str = ""
    low: float = 0.0
    high: float = math.inf
    adds_last: bool = False

    def integers(self) -> list[int]:
        """As a program has them."""
        return [ACTIVATIONS.index(self.activation), bits_of(self.low), bits_of(self.high)]

    @classmethod
    def of(cls, numbers: Sequence[int], *, adds_last: int = 0) -> Finish:
        """From a program's."""
        activation, low, high = numbers
        return cls(ACTIVATIONS[activation], float_of(low), float_of(high), bool(adds_last))

    def apply(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """The activation and the residual, in their order."""
        if residual is not None and not self.adds_last:
            y = y + residual
        y = y.clamp(self.low, self.high) if self.activation == "relu" else _FUNCTIONS[self.activation](y)
        return y + residual if residual is not None and self.adds_last else y


_FUNCTIONS: dict[str, Any] = {
    "": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
}


def bits_of(value: float) -> int:
    """The bits of a number in float32, as a program has it."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def float_of(bits: int) -> float:
    """The number of these bits."""
    return struct.unpack("<f", struct.pack("<I", bits))[0]
