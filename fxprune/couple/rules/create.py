"""Ops that make tensors of literal sizes, or of positions."""

from __future__ import annotations

from typing import Any

from .relation import Atoms, Dims, Here, dimension, of_self, relation
from .shape import resize_view


def _zero_if_filled_with_zero(here: Here, out: Dims, fill_value: Any = 0, **_: Any) -> Atoms:
    return out.atoms() if isinstance(fill_value, (int, float)) and fill_value == 0 else set()


@relation("zeros", "new_zeros", "full", "new_full", zero=_zero_if_filled_with_zero, resize=resize_view)
def filled(here: Here, out: Dims, **_: Any) -> None:
    """one value in a literal shape, which follows what it meets"""


@relation("ones", "new_ones", "empty", "new_empty", resize=resize_view)
def ones(here: Here, out: Dims, **_: Any) -> None:
    """ones in a literal shape, which follows what it meets"""


@relation("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices", "scalar_tensor", "hann_window")
def positions(here: Here, out: Dims, **_: Any) -> None:
    """numbers that stand for positions"""
    here.freeze_all([out], "its values are positions")


@relation("tril", "triu", zero=of_self)
def triangle(here: Here, out: Dims, self: Dims, **_: Any) -> None:
    """half of each matrix, whose rows and columns freeze"""
    for i, (a, b) in enumerate(zip(self.axes, out.axes)):
        here.tie(a, b)
        if i >= len(self) - 2:
            here.freeze(a, "positions along it matter")


@relation("one_hot")
def one_hot(here: Here, out: Dims, self: Dims, **_: Any) -> None:
    """one new dimension of classes"""
    here.tie_rows(self.axes, out.axes)
    here.freeze(out[-1], "its indices are values of another tensor")


@relation("meshgrid")
def meshgrid(here: Here, out: list[Dims], tensors: list[Dims], indexing: str = "ij", **_: Any) -> None:
    """each vector along a dimension of its own, repeated along those of the others"""
    order = list(range(len(tensors)))
    if indexing == "xy" and len(order) > 1:
        order[0], order[1] = 1, 0
    for result in out:
        for vector, dim in zip(tensors, order):
            for axis in vector.axes:
                here.tie(axis, result[dim])


@relation("diag_embed", zero=of_self)
def diag_embed(here: Here, out: Dims, self: Dims, dim1: int = -2, dim2: int = -1, **_: Any) -> None:
    """the last dimension as the diagonal of two new ones; all three freeze"""
    chosen = {dimension(dim1, out), dimension(dim2, out)}
    here.tie_rows(self.axes, [axis for i, axis in enumerate(out.axes) if i not in chosen])
    here.freeze_each((self[-1], *(out[i] for i in chosen)), "positions along it matter")
