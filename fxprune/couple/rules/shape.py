"""Ops that only rearrange: views, permutations, expansion, repetition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxprune.couple.axis import ONE, Axis, Conflict, divide, line_up

from .relation import (
    Atoms,
    Dims,
    Here,
    Resize,
    by_dimension,
    carried,
    dimension,
    dimension_list,
    is_wide,
    of_first,
    of_self,
    relation,
    tie_broadcast,
)


def tie_view(here: Here, xs: Sequence[Axis], ys: Sequence[Axis]) -> None:
    """Two rows of axes that index the same elements in row-major order are tied, split where they must be."""
    rest, why = line_up(xs, ys, here.name)
    for axis in rest:
        here.freeze(axis, why)


def resize_view(sizes: Resize, out: Dims, **a: Any) -> dict[str, Any]:
    """The literal sizes of a view follow the axes of what it makes."""
    name = next((k for k in ("size", "shape") if k in a), None)
    return {} if name is None else {name: _sizes(sizes, out, a[name])}


def _sizes(sizes: Resize, out: Dims, given: Sequence[Any]) -> list[Any]:
    pad = len(out) - len(given)
    return [sizes.literal(out[pad + i], value) for i, value in enumerate(given)]


@relation("view", "reshape", "_unsafe_view", zero=carried, resize=resize_view)
def view(here: Here, out: Dims, self: Dims, dtype: Any = None, **_: Any) -> None:
    """the same elements in row-major order"""
    if dtype is not None:
        tie_broadcast(here, out, [self])
        if len(self) and self[-1].root().size != out[-1].root().size:
            here.freeze_all([self, out], "it reads bits as another type")
        return
    tie_view(here, self.axes, out.axes)


def _resize_squeeze(sizes: Resize, out: Dims, self: Dims, dim: Any = None, **_: Any) -> dict[str, Any]:
    """An axis that shrinks to one index stays: only what was squeezed before is squeezed."""
    chosen = [i for i in dimension_list(dim, self) if not is_wide(self[i])]
    left = any(sizes.number(axis) == 1 for axis in self.axes if sizes.changed(axis))
    return {"target": torch.ops.aten.squeeze.dims, "dim": chosen} if left else {}


def _resize_unflatten(sizes: Resize, out: Dims, /, self: Dims, dim: int, **a: Any) -> dict[str, Any]:
    first = dimension(dim, self)
    return {"sizes": [sizes.literal(out[first + i], value) for i, value in enumerate(a["sizes"])]}


@relation("flatten", "unsqueeze", "ravel", zero=carried)
@relation("squeeze", zero=carried, resize=_resize_squeeze)
@relation("unflatten", zero=carried, resize=_resize_unflatten)
def reshaped(here: Here, out: Dims, self: Dims, **_: Any) -> None:
    """the same elements in row-major order"""
    tie_view(here, self.axes, out.axes)


@relation("atleast_1d", "atleast_2d", "atleast_3d", zero=carried)
def atleast(here: Here, out: Dims | list[Dims], **a: Any) -> None:
    """the same elements in row-major order"""
    given = a["self"] if "self" in a else a["tensors"]
    if isinstance(out, Dims):
        tie_view(here, given.axes, out.axes)
        return
    for x, y in zip(given, out):
        tie_view(here, x.axes, y.axes)


def _resize_view_as(sizes: Resize, out: Dims, self: Dims, other: Dims, **_: Any) -> dict[str, Any]:
    """A weight that shrinks beside the other tensor takes its shape in numbers."""
    if not self.source or not any(sizes.changed(axis) for axis in out.axes):
        return {}
    return {"target": torch.ops.aten.reshape.default, "shape": [sizes.number(axis) for axis in out.axes]}


@relation("view_as", "reshape_as", zero=of_self, resize=_resize_view_as)
def view_as(here: Here, out: Dims, self: Dims, other: Dims, **_: Any) -> None:
    """the same elements in row-major order, in the shape of another tensor"""
    tie_view(here, self.axes, out.axes)
    if not self.source:
        here.tie_rows(other.axes, out.axes)


def _permuted(here: Here, out: Dims, self: Dims, order: Sequence[int]) -> None:
    for axis, dim in zip(out.axes, order):
        here.tie(axis, self[dim])
    out.source = self.source


@relation("permute", zero=carried)
def permute(here: Here, out: Dims, self: Dims, dims: Sequence[int], **_: Any) -> None:
    """dimensions in another order"""
    _permuted(here, out, self, [dimension(d, self) for d in dims])


@relation("transpose", "swapaxes", "swapdims", zero=carried)
def transpose(here: Here, out: Dims, self: Dims, **a: Any) -> None:
    """two dimensions change places"""
    i, j = (dimension(a[k], self) for k in a if k in ("dim0", "dim1", "axis0", "axis1"))
    order = list(range(len(self)))
    order[i], order[j] = order[j], order[i]
    _permuted(here, out, self, order)


@relation("numpy_T", zero=carried)
def numpy_t(here: Here, out: Dims, self: Dims, **_: Any) -> None:
    """dimensions in reverse order"""
    _permuted(here, out, self, list(reversed(range(len(self)))))


@relation("t", "mT", "mH", "matrix_H", "adjoint", zero=carried)
def t(here: Here, out: Dims, self: Dims, **_: Any) -> None:
    """the last two dimensions change places"""
    order = list(range(len(self)))
    if len(order) > 1:
        order[-1], order[-2] = order[-2], order[-1]
    _permuted(here, out, self, order)


@relation("movedim", "moveaxis", zero=carried)
def movedim(here: Here, out: Dims, self: Dims, source: Any, destination: Any, **_: Any) -> None:
    """dimensions move to other places"""
    sources, targets = dimension_list(source, self), dimension_list(destination, self)
    rest = iter([d for d in range(len(self)) if d not in sources])
    placed = dict(zip(targets, sources))
    _permuted(here, out, self, [placed[d] if d in placed else next(rest) for d in range(len(self))])


@relation("expand", "broadcast_to", zero=of_first, resize=resize_view)
def expand(here: Here, out: Dims, self: Dims, **_: Any) -> None:
    """dimensions of one index repeat"""
    tie_broadcast(here, out, [self])


@relation("expand_as", zero=of_first)
def expand_as(here: Here, out: Dims, self: Dims, other: Dims, **_: Any) -> None:
    """dimensions of one index repeat, as many times as another tensor has"""
    tie_broadcast(here, out, [self, other])


def _zero_of_broadcast(here: Here, out: list[Dims], tensors: list[Dims], **_: Any) -> Atoms:
    return by_dimension(out[0], tensors, every=True)


@relation("broadcast_tensors", zero=_zero_of_broadcast)
def broadcast_tensors(here: Here, out: list[Dims], tensors: list[Dims], **_: Any) -> None:
    """dimensions of one index repeat until all tensors have one shape"""
    for result, given in zip(out, tensors):
        tie_broadcast(here, result, [given])
        tie_broadcast(here, out[0], [result])


def _resize_repeat(sizes: Resize, out: Dims, self: Dims, **a: Any) -> dict[str, Any]:
    name = "repeats" if "repeats" in a else "dims"
    pad = len(out) - len(a[name])
    lead = len(out) - len(self)
    counts = []
    for i, value in enumerate(a[name], pad):
        one = i < lead or not is_wide(self[i - lead])
        counts.append(sizes.literal(out[i], value) if one else sizes.copies(out[i], self[i - lead], value))
    return {name: counts}


@relation("repeat", "tile", zero=of_first, resize=_resize_repeat)
def repeat(here: Here, out: Dims, self: Dims, **_: Any) -> None:
    """the whole tensor again and again along dimensions: the copy is the outer index"""
    for x, y in zip(reversed(self.axes), reversed(out.axes)):
        if is_wide(x):
            _copies(here, y, x, outer=True)


def _resize_repeat_interleave(
    sizes: Resize, out: Dims, self: Dims | None = None, dim: int | None = None, repeats: Any = None, **a: Any
) -> dict[str, Any]:
    if self is None or dim is None or not isinstance(repeats, int):
        return {}
    at = dimension(dim, self)
    changed = {"repeats": sizes.copies(out[at], self[at], repeats)}
    return (
        changed
        if a.get("output_size") is None
        else {**changed, "output_size": sizes.literal(out[at], a["output_size"])}
    )


def _zero_of_repeat_interleave(here: Here, out: Dims, self: Dims | None = None, **_: Any) -> Atoms:
    return set() if self is None else by_dimension(out, [self], every=True)


@relation("repeat_interleave", zero=_zero_of_repeat_interleave, resize=_resize_repeat_interleave)
def repeat_interleave(
    here: Here, out: Dims, self: Dims | None = None, dim: int | None = None, repeats: Any = None, **_: Any
) -> None:
    """each index repeated in place: the copy is the inner index"""
    if self is None or not isinstance(repeats, int) or dim is None:
        here.freeze_all([out, self, repeats if isinstance(repeats, Dims) else None], "repeats that are data")
        return
    at = dimension(dim, self)
    for i, (x, y) in enumerate(zip(self.axes, out.axes)):
        if i != at:
            here.tie(x, y)
        elif is_wide(x):
            _copies(here, y, x, outer=False)


def _copies(here: Here, out: Axis, x: Axis, outer: bool) -> None:
    """`out` is whole copies of `x`; which copy is an axis of its own."""
    count = out.root().size.over(x.root().size)
    if count == ONE:
        here.tie(out, x)
        return
    try:
        if count is None:
            raise Conflict("a number of copies that is not whole")
        parts = divide(out, [count, x.root().size] if outer else [x.root().size, count], here.name)
        here.tie(parts[1] if outer else parts[0], x)
    except Conflict as conflict:
        here.freeze_each((out, x), str(conflict))
