"""Ops that join and cut: cat, stack, split, chunk, slice, select, unbind and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxprune.couple.axis import Axis, Conflict, concat, cut

from .relation import Dims, Here, Resize, carried, dimension, of_self, relation
from .shape import tie_view

PICKED = "picked by index"


def _pieces(here: Here, axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Consecutive pieces of an axis; None, and the axis frozen, where its structure does not allow them."""
    try:
        return cut(axis, sizes)
    except Conflict as conflict:
        here.freeze(axis, str(conflict))
        return None


def _join(here: Here, out: Axis, parts: Sequence[Axis]) -> None:
    if any(part.root().size.symbols for part in (out, *parts)):
        here.freeze_each((out, *parts), "a concatenation of symbolic sizes")
        return
    wide = [part for part in parts if part.root().size.number]
    if wide:
        here.tie(out, concat(wide))


@relation("cat", "concat", "concatenate", zero=carried)
def cat(here: Here, out: Dims, tensors: list[Dims], dim: int = 0, **_: Any) -> None:
    """tensors one after the other along a dimension"""
    at = dimension(dim, out)
    # Legacy: an empty 1-D tensor may stand among others of any rank.
    full = [x for x in tensors if len(x) == len(out)]
    for x in full:
        here.tie_rows(x.axes, out.axes, besides=[at])
    _join(here, out[at], [x[at] for x in full])


def _stack_by_name(op: str, at: int) -> None:
    @relation(op, zero=carried)
    def join(here: Here, out: Dims, tensors: list[Dims], **_: Any) -> None:
        """tensors one after the other along a dimension that the op's name says"""
        if any(len(x) != len(out) for x in tensors):
            here.freeze_all([out, *tensors], "a join that adds dimensions")
            return
        cat(here, out, tensors, min(at, len(out) - 1))


for _op, _at in (("hstack", 1), ("vstack", 0), ("dstack", 2), ("column_stack", 1)):
    _stack_by_name(_op, _at)


@relation("stack", zero=carried)
def stack(here: Here, out: Dims, tensors: list[Dims], dim: int = 0, **_: Any) -> None:
    """tensors side by side along a new dimension"""
    at = dimension(dim, out)
    rest = [axis for i, axis in enumerate(out.axes) if i != at]
    for x in tensors:
        here.tie_rows(x.axes, rest)
    here.freeze(out[at], PICKED)


def _split_sizes(out: list[Dims], at: int) -> list[int]:
    return [piece[at].root().size.number for piece in out]


def _resize_split(sizes: Resize, out: list[Dims], self: Dims, dim: int = 0, **a: Any) -> dict[str, Any]:
    at = dimension(dim, self)
    if not sizes.changed(self[at]):
        return {}
    return {"pieces": [sizes.number(piece[at]) for piece in out]}


@relation("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "split_copy",
          "unsafe_split_with_sizes", zero=carried, resize=_resize_split)  # fmt: skip
def split(here: Here, out: list[Dims], self: Dims, dim: int = 0, **_: Any) -> None:
    """consecutive pieces along a dimension"""
    at = dimension(dim, self)
    for piece in out:
        here.tie_rows(self.axes, piece.axes, besides=[at])
    if self[at].root().size.symbols:
        here.freeze_each((self[at], *(piece[at] for piece in out)), "a cut through a symbolic size")
        return
    whole = sum(_split_sizes(out, at)) == self[at].root().size.number
    found = _pieces(here, self[at], _split_sizes(out, at)) if whole else None
    if not whole:
        here.freeze(self[at], "pieces that overlap or leave gaps")
    pieces = [piece[at] for piece in out]
    here.tie_rows(pieces, found or [])
    if found is None:
        here.freeze_each(pieces, "a cut that goes through a view")


def _bounds(size: int, start: Any, end: Any) -> tuple[int, int] | None:
    if not all(isinstance(v, int) or v is None for v in (start, end)):
        return None
    first = 0 if start is None else max(start + size, 0) if start < 0 else min(start, size)
    last = size if end is None else max(end + size, 0) if end < 0 else min(end, size)
    return first, max(first, last)


def _resize_slice(
    sizes: Resize, out: Dims, self: Dims, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1, **_: Any
) -> dict[str, Any]:
    at = dimension(dim, self)
    if not sizes.changed(self[at]) or self[at].root().size.symbols:
        # Of a symbolic size only the whole may be taken, and the whole stays the whole.
        return {}
    bounds = _bounds(sizes.old(self[at]), start, end)
    if bounds is None:
        return {}
    if step != 1:
        # every index of the step is kept, so that the first one stands where it stood
        return {"start": bounds[0], "end": sizes.number(self[at])}
    kept = sizes.indices(self[at])
    return {"start": int((kept < bounds[0]).sum()), "end": int((kept < bounds[1]).sum())}


@relation("slice", zero=carried, resize=_resize_slice)
def slice_(
    here: Here, out: Dims, self: Dims, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1, **_: Any
) -> None:
    """a run of indices along a dimension"""
    at = dimension(dim, self)
    here.tie_rows(self.axes, out.axes, besides=[at])
    tie_slice(here, self[at], out[at], start, end, step)


def tie_slice(here: Here, x: Axis, y: Axis, start: Any, end: Any, step: Any) -> None:
    """`y` is the run start:end of `x`."""
    size = x.root().size
    bounds = None if size.symbols else _bounds(size.number, start, end)
    if bounds is None:
        if size == y.root().size and not start and step == 1:
            here.tie(x, y)
            return
        here.freeze_each((x, y), "a cut through a symbolic size")
        return
    first, last = bounds
    if step != 1:
        _tie_strided(here, x, y, first, last, step)
        return
    if (first, last) == (0, size.number):
        here.tie(x, y)
        return
    found = _pieces(here, x, [first, last - first, size.number - last])
    if found is None:
        here.freeze(y, "a cut that goes through a view")
    elif last > first:
        here.tie(found[1], y)


def _tie_strided(here: Here, x: Axis, y: Axis, first: int, last: int, step: Any) -> None:
    """Every step-th index: the inner index of a view is fixed, and the outer one goes on."""
    size = x.root().size.number
    if isinstance(step, int) and size % step == 0 and first < step and last > size - step + first:
        inner = Axis(step)
        here.freeze(inner, PICKED)
        tie_view(here, [x], [y, inner])
        return
    here.freeze_each((x, y), "a strided slice")


def _narrow_ends(self: Dims, dim: int, start: Any, length: Any) -> tuple[Any, Any]:
    """Start and end of a narrow as those of a slice; a symbolic one stays what it is, and freezes."""
    if not isinstance(start, int) or not isinstance(length, int):
        return start, length
    first = start + self[dimension(dim, self)].root().size.number if start < 0 else start
    return first, first + length


def _resize_narrow(sizes: Resize, out: Dims, self: Dims, dim: int, start: Any, length: Any, **_: Any) -> dict[str, Any]:
    first, end = _narrow_ends(self, dim, start, length)
    changed = _resize_slice(sizes, out, self, dim, first, end) if isinstance(length, int) else {}
    return {"start": changed["start"], "length": changed["end"] - changed["start"]} if changed else {}


@relation("narrow", zero=carried, resize=_resize_narrow)
def narrow(here: Here, out: Dims, self: Dims, dim: int, start: Any, length: Any, **_: Any) -> None:
    """a run of indices along a dimension"""
    slice_(here, out, self, dim, *_narrow_ends(self, dim, start, length))


@relation("select", zero=carried)
def select(here: Here, out: Dims, self: Dims, dim: int, index: Any, **_: Any) -> None:
    """one index along a dimension"""
    at = dimension(dim, self)
    here.tie_rows([axis for i, axis in enumerate(self.axes) if i != at], out.axes)
    here.freeze(self[at], PICKED)


@relation("unbind", zero=carried)
def unbind(here: Here, out: list[Dims], self: Dims, dim: int = 0, **_: Any) -> None:
    """each index along a dimension by itself"""
    for piece in out:
        select(here, piece, self, dim, 0)


@relation("glu", zero=of_self)
def glu(here: Here, out: Dims, self: Dims, dim: int = -1, **_: Any) -> None:
    """the first half of a dimension times the sigmoid of its second half"""
    at = dimension(dim, self)
    here.tie_rows(self.axes, out.axes, besides=[at])
    size = out[at].root().size
    halves = None if size.symbols else _pieces(here, self[at], [size.number, size.number])
    if halves is None:
        here.freeze_each((self[at], out[at]), "a cut through a symbolic size")
        return
    here.tie(halves[0], halves[1])
    here.tie(halves[0], out[at])
