"""unfold: the inputs of a linear or a convolution as rows, one for each place that the weight is applied at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from fxprune.graph.program import Program, named_arguments
from fxprune.graph.weights import Use


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a convolution reads its input: all but `groups` have one number for each spatial dimension.

    `padding` is (before, after) for each.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def rows(self, x: Tensor) -> Tensor:
        """x [b, c, *s] -> [g, places, k * c / g]: what each output place reads, the channel fastest."""
        dims = len(self.kernel)
        x = x if x.dim() == dims + 2 else x.unsqueeze(0)
        flat = [side for pair in reversed(self.padding) for side in pair]
        x = functional.pad(x, flat) if any(flat) else x
        batch, channels, *sizes = x.shape
        spans = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        places = [(n - span) // s + 1 for n, span, s in zip(sizes, spans, self.stride, strict=True)]
        strides = x.stride()
        windows = x.as_strided(
            (batch, self.groups, channels // self.groups, *places, *self.kernel),
            (
                strides[0],
                strides[1] * (channels // self.groups),
                strides[1],
                *(stride * s for stride, s in zip(strides[2:], self.stride, strict=True)),
                *(stride * d for stride, d in zip(strides[2:], self.dilation, strict=True)),
            ),
            x.storage_offset(),
        )
        kernel_dims = range(3 + dims, 3 + 2 * dims)
        ordered = windows.permute(1, 0, *range(3, 3 + dims), *kernel_dims, 2)
        return ordered.reshape(self.groups, -1, channels // self.groups * math.prod(self.kernel))

    def out(self, y: Tensor) -> Tensor:
        """y [b, o, *s] -> [g, places, o / g], in the order of `rows`."""
        y = y if y.dim() == len(self.kernel) + 2 else y.unsqueeze(0)
        return y.unflatten(1, (self.groups, -1)).movedim(2, -1).movedim(1, 0).flatten(1, -2)


def windows_of(target: Any, args: Sequence[Any], kwargs: dict[str, Any], shape: Sequence[int]) -> Windows | None:
    """The windows of a call of a convolution whose weight has `shape`; None for a transposed one.

    Arguments other than numbers and lists of numbers may be anything.
    """
    dims = len(shape) - 2
    given = named_arguments(target, args, kwargs)
    if given.get("transposed"):
        return None
    kernel = tuple(shape[2:])
    dilation = _each(given.get("dilation", 1), dims)
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        whole = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        pairs = tuple((total // 2, total - total // 2) for total in whole)
    else:
        pairs = tuple((p, p) for p in _each(padding, dims))
    return Windows(kernel, _each(given.get("stride", 1), dims), pairs, dilation, given.get("groups", 1))


def windows_of_use(program: Program, name: str, use: Use) -> Windows | None:
    """The windows of a use of the weight `name`; None for a transposed convolution."""
    if "transpose" in str(use.node.target):
        return None
    return windows_of(use.node.target, use.node.args, dict(use.node.kwargs), program.get_parameter(name).shape)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * dims if len(values) == 1 else values
