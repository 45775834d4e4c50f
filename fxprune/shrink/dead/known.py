"""known: what is known of a tensor whatever the inputs of its graph are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.graph.compat import example_size
from fxprune.graph.ops import HALF
from fxprune.graph.program import arguments

# The least that a symbolic size stands at: at one, broadcasting could not be told from a batch.
_LEAST = 2
# Units in the last place that one value may differ by where it was computed in several places.
ROUNDING = 16


class Known(NamedTuple):
    """A tensor of which some elements are known: `value` where `sure` (bool, same shape), and anything elsewhere."""

    value: Tensor
    sure: Tensor

    @classmethod
    def all(cls, value: Tensor) -> Known:
        """A tensor that is known throughout."""
        return cls(value, torch.ones((), dtype=torch.bool, device=value.device).expand(value.shape))

    @classmethod
    def none(cls, like: Tensor) -> Known:
        """A tensor of the shape of `like`, of which nothing is known."""
        return cls(torch.zeros_like(like), torch.zeros((), dtype=torch.bool, device=like.device).expand(like.shape))

    @property
    def zero(self) -> Tensor:
        """Where the tensor is known to be zero."""
        return self.sure & (self.value == 0)

    @property
    def is_whole(self) -> bool:
        """Whether every element is known."""
        # One flag that is broadcast says so for all.
        one = self.sure.numel() > 0 and not any(self.sure.stride())
        return bool(self.sure[(0,) * self.sure.dim()] if one else self.sure.all())


State = Known | list[Known | None] | None


def size_of(size: Any) -> Any:
    """A size as a number: each symbol stands at the example's value, or a little above."""
    return example_size(size, _LEAST)


def is_symbolic(node: Node) -> list[bool]:
    """For each dimension of a node's tensor, whether its size is symbolic."""
    value = node.meta.get("val")
    return [isinstance(size, torch.SymInt) for size in value.shape] if isinstance(value, Tensor) else []


def holds_tensors(value: Any) -> bool:
    """Whether a node's value is a tensor, or a list that holds one."""
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, Tensor) for item in value)
    return isinstance(value, Tensor)


def blank(node: Node, other: Known) -> Tensor:
    """A tensor without memory in the shape of a node's value."""
    value = node.meta["val"]
    dtype = torch.float32 if value.dtype in HALF else value.dtype
    shape = [size_of(size) for size in value.shape]
    return torch.zeros((), dtype=dtype, device=other.value.device).expand(shape)


def filled(known: Known) -> Tensor:
    """The known values, and zeros elsewhere."""
    return known.value if known.is_whole else torch.where(known.sure, known.value, torch.zeros_like(known.value))


def flat(values: Any) -> list[Any]:
    """The items of some values, those of lists one by one."""
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def is_even(value: Tensor, dim: int) -> Tensor:
    """Where a tensor has one value along a dimension, which goes: vector code and scalar code may round apart."""
    low, high = value.amin(dim), value.amax(dim)
    if not value.is_floating_point():
        return low == high
    return (high - low) <= ROUNDING * torch.finfo(value.dtype).eps * torch.maximum(low.abs(), high.abs())


def even_along_symbols(known: Known, node: Node, dims: Iterable[int] | None = None) -> Known:
    """What is known of a node's value and the same along each (of these) dimensions of symbolic size."""
    sure, symbolic = known.sure, is_symbolic(node)
    for dim in range(len(symbolic)) if dims is None else {d % len(symbolic) for d in dims}:
        if symbolic[dim] and known.value.shape[dim]:
            sure = sure & is_even(known.value, dim).unsqueeze(dim)
    return Known(known.value, sure)


def by_channel(vector: Tensor, shape: list[int]) -> Tensor:
    """vector [c] along dimension 1 of a shape [b, c, ...]."""
    return vector.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)


def has_argument(node: Node, name: str) -> bool:
    """Whether an op was given this argument."""
    return arguments(node).get(name) is not None
