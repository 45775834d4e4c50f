"""Ops that join, cut and pick: cat, stack, split, chunk, slice, select, unbind, index and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..axis import Axis, Conflict, concat, cut
from .relation import Atoms, Dims, Here, Resize, by_dimension, carried, dimension, is_wide, of_first, relation
from .shape import tie_view

_PICKED = "picked by index"


def _pieces(here: Here, axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Consecutive pieces of an axis; None, and the axis frozen, where its structure does not allow them."""
    try:
        wide = iter(cut(axis, [size for size in sizes if size]))
    except Conflict as conflict:
        here.freeze(axis, str(conflict))
        return None
    return [next(wide) if size else Axis(0) for size in sizes]


def _join(here: Here, out: Axis, parts: Sequence[Axis]) -> None:
    if any(part.root().size.symbols for part in (out, *parts)):
        for part in (out, *parts):
            here.freeze(part, "a concatenation of symbolic sizes")
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
        for i, (a, b) in enumerate(zip(x.axes, out.axes)):
            if i != at:
                here.tie(a, b)
    _join(here, out[at], [x[at] for x in full])


@relation("hstack", "vstack", "dstack", "column_stack")
def stack_by_name(here: Here, out: Dims, tensors: list[Dims], **_: Any) -> None:
    """joins that freeze"""
    here.freeze_all([out, *tensors], "no rule that shrinks it")


@relation("stack", zero=carried)
def stack(here: Here, out: Dims, tensors: list[Dims], dim: int = 0, **_: Any) -> None:
    """tensors side by side along a new dimension"""
    at = dimension(dim, out)
    rest = [axis for i, axis in enumerate(out.axes) if i != at]
    for x in tensors:
        for a, b in zip(x.axes, rest):
            here.tie(a, b)
    here.freeze(out[at], _PICKED)


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
        for i, (a, b) in enumerate(zip(self.axes, piece.axes)):
            if i != at:
                here.tie(a, b)
    if self[at].root().size.symbols:
        for axis in (self[at], *(piece[at] for piece in out)):
            here.freeze(axis, "a cut through a symbolic size")
        return
    found = _pieces(here, self[at], _split_sizes(out, at))
    for piece, axis in zip(out, found or []):
        here.tie(piece[at], axis)
    if found is None:
        for piece in out:
            here.freeze(piece[at], "a cut that goes through a view")


def _bounds(size: int, start: Any, end: Any) -> tuple[int, int] | None:
    if not all(isinstance(v, int) or v is None for v in (start, end)):
        return None
    first = 0 if start is None else max(start + size, 0) if start < 0 else min(start, size)
    last = size if end is None else max(end + size, 0) if end < 0 else min(end, size)
    return first, max(first, last)


def _resize_slice(
    sizes: Resize, out: Dims, self: Dims, dim: int = 0, start: Any = None, end: Any = None, **_: Any
) -> dict[str, Any]:
    at = dimension(dim, self)
    if not sizes.changed(self[at]):
        return {}
    bounds = _bounds(sizes.old(self[at]), start, end)
    if bounds is None:
        return {}
    kept = sizes.indices(self[at])
    return {"start": int((kept < bounds[0]).sum()), "end": int((kept < bounds[1]).sum())}


@relation("slice", zero=carried, resize=_resize_slice)
def slice_(
    here: Here, out: Dims, self: Dims, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1, **_: Any
) -> None:
    """a run of indices along a dimension"""
    at = dimension(dim, self)
    for i, (a, b) in enumerate(zip(self.axes, out.axes)):
        if i != at:
            here.tie(a, b)
    tie_slice(here, self[at], out[at], start, end, step)


def tie_slice(here: Here, x: Axis, y: Axis, start: Any, end: Any, step: Any) -> None:
    """`y` is the run start:end of `x`."""
    size = x.root().size
    bounds = None if size.symbols else _bounds(size.number, start, end)
    if bounds is None:
        if size == y.root().size and not start and step == 1:
            here.tie(x, y)
            return
        here.freeze(x, "a cut through a symbolic size")
        here.freeze(y, "a cut through a symbolic size")
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
        here.freeze(inner, _PICKED)
        tie_view(here, [x], [y, inner])
        return
    here.freeze(x, "a strided slice")
    here.freeze(y, "a strided slice")


@relation(
    "narrow",
    zero=carried,
    resize=lambda sizes, out, self, dim, start, length, **_: _resize_narrow(sizes, self, dim, start, length),
)
def narrow(here: Here, out: Dims, self: Dims, dim: int, start: Any, length: Any, **_: Any) -> None:
    """a run of indices along a dimension"""
    end: Any = start + length if isinstance(start, int) and isinstance(length, int) else length
    slice_(here, out, self, dim, start, end)


def _resize_narrow(sizes: Resize, self: Dims, dim: int, start: int, length: int) -> dict[str, Any]:
    changed = _resize_slice(sizes, self, self, dim, start, start + length) if isinstance(length, int) else {}
    return {"start": changed["start"], "length": changed["end"] - changed["start"]} if changed else {}


@relation("select", zero=carried)
def select(here: Here, out: Dims, self: Dims, dim: int, index: Any, **_: Any) -> None:
    """one index along a dimension"""
    at = dimension(dim, self)
    rest = [axis for i, axis in enumerate(self.axes) if i != at]
    for a, b in zip(rest, out.axes):
        here.tie(a, b)
    here.freeze(self[at], _PICKED)


@relation("unbind", zero=carried)
def unbind(here: Here, out: list[Dims], self: Dims, dim: int = 0, **_: Any) -> None:
    """each index along a dimension by itself"""
    for piece in out:
        select(here, piece, self, dim, 0)


def _zero_of_index(here: Here, out: Dims, **a: Any) -> Atoms:
    return a["self"].zero & out.atoms()


@relation("index", "_unsafe_index", zero=_zero_of_index)
def index(here: Here, out: Dims, self: Dims, indices: list[Dims | None], **_: Any) -> None:
    """advanced indexing: the dimensions indexed by tensors freeze, the others stay"""
    picked = [i for i, given in enumerate(indices) if given is not None]
    for i in picked:
        here.freeze(self[i], _PICKED)
    given = [x for x in indices if isinstance(x, Dims)]
    rest = [axis for i, axis in enumerate(self.axes) if i not in picked]
    if not picked or len(given) != len(picked):
        here.freeze_all([out, self, *given], "an index that is no tensor")
        return
    wide = len(out) - len(rest)
    together = picked == list(range(picked[0], picked[-1] + 1))
    at = picked[0] if together else 0
    block, others = out.axes[at : at + wide], [*out.axes[:at], *out.axes[at + wide :]]
    if wide < 0 or len(others) != len(rest) or any(len(x) > wide for x in given):
        # a mask takes several dimensions at once
        here.freeze_all([out, self, *given], "an index that is a mask")
        return
    for a, b in zip(rest, others):
        here.tie(a, b)
    for x in given:
        for a, b in zip(reversed(x.axes), reversed(block)):
            here.tie(a, b)


@relation("index_select", zero=_zero_of_index)
def index_select(here: Here, out: Dims, self: Dims, dim: int, index: Dims, **_: Any) -> None:
    """indices along a dimension, picked by a tensor"""
    at = dimension(dim, self)
    for i, (a, b) in enumerate(zip(self.axes, out.axes)):
        if i != at:
            here.tie(a, b)
    here.freeze(self[at], _PICKED)
    if len(index):
        here.tie(out[at], index[0])


@relation("gather", "take_along_dim", zero=_zero_of_index)
def gather(here: Here, out: Dims, self: Dims, dim: int | None = None, index: Dims | None = None, **a: Any) -> None:
    """elements picked along a dimension by a tensor of indices"""
    index = index if index is not None else a["indices"]
    if dim is None or len(index) != len(out):
        here.freeze_all([out, self, index], _PICKED)
        return
    at = dimension(dim, self)
    for i, (x, chosen, y) in enumerate(zip(self.axes, index.axes, out.axes)):
        here.tie(chosen, y)
        if i == at:
            here.freeze(x, _PICKED)
        elif x.root().size == y.root().size:
            here.tie(x, y)
        else:
            here.freeze(x, "only the first of its indices are read")
            here.freeze(y, "only the first of its indices are read")


def _zero_of_scatter(here: Here, out: Dims, **a: Any) -> Atoms:
    given = [v for k, v in a.items() if k in ("self", "src", "value", "values", "source") and isinstance(v, Dims)]
    constant = any(isinstance(a.get(k), (int, float)) and a[k] != 0 for k in ("value", "src"))
    return set() if constant else by_dimension(out, given, every=True)


@relation("index_add", "index_copy", "index_fill", zero=_zero_of_scatter)
def index_add(here: Here, out: Dims, self: Dims, dim: int, index: Dims, source: Any = None, **_: Any) -> None:
    """rows written where a tensor of indices says"""
    at = dimension(dim, self)
    for i, (a, b) in enumerate(zip(self.axes, out.axes)):
        here.tie(a, b)
        if isinstance(source, Dims) and len(source) == len(self) and i != at:
            here.tie(source[i], b)
    here.freeze(self[at], _PICKED)
    if isinstance(source, Dims) and len(source) == len(self):
        here.freeze(source[at], _PICKED)


@relation("scatter", "scatter_add", "scatter_reduce", zero=_zero_of_scatter)
def scatter(here: Here, out: Dims, self: Dims, dim: int, index: Dims, src: Any = None, **_: Any) -> None:
    """elements written along a dimension where a tensor of indices says"""
    at = dimension(dim, self)
    rows = [index, *([src] if isinstance(src, Dims) else [])]
    for i, (a, b) in enumerate(zip(self.axes, out.axes)):
        here.tie(a, b)
        for row in rows:
            if i == at or row[i].root().size != a.root().size:
                here.freeze(row[i], _PICKED)
                here.freeze(a, _PICKED)
            else:
                here.tie(row[i], a)


@relation("index_put", zero=lambda here, out, **_: set())
def index_put(here: Here, out: Dims, self: Dims, indices: list[Dims | None], values: Dims, **_: Any) -> None:
    """elements written where tensors of indices say"""
    for i, (a, b) in enumerate(zip(self.axes, out.axes)):
        here.tie(a, b)
        if i < len(indices) and indices[i] is not None:
            here.freeze(a, _PICKED)
    for back, axis in enumerate(reversed(values.axes), 1):
        if back <= len(self) - len(indices):
            here.tie(axis, self[-back])
        else:
            here.freeze(axis, _PICKED)


@relation(
    "slice_scatter",
    "select_scatter",
    zero=lambda here, out, self, src, **_: (
        {a for a in self.zero if a in src.zero or a not in src.atoms()} & out.atoms()
    ),
)
def slice_scatter(
    here: Here,
    out: Dims,
    self: Dims,
    src: Dims,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: Any = 1,
    **a: Any,
) -> None:
    """a tensor written into a run of indices of another"""
    for x, y in zip(self.axes, out.axes):
        here.tie(x, y)
    if "index" in a:
        select(here, src, self, dim, a["index"])
        return
    # written like a slice, but its bounds would have to follow
    at = dimension(dim, self)
    here.freeze(self[at], _PICKED)
    for i, (x, y) in enumerate(zip(self.axes, src.axes)):
        if i != at:
            here.tie(x, y)


@relation("masked_select", "nonzero", "unique_dim", "_unique2")
def by_value(here: Here, out: Any, **a: Any) -> None:
    """indices that depend on values"""
    here.freeze_all([out, *(v for v in a.values() if isinstance(v, Dims))], "what it picks depends on values")


@relation("flip", "roll", zero=of_first)
def moved(here: Here, out: Dims, self: Dims, dims: Any = (), **_: Any) -> None:
    """indices in another order along some dimensions, which freeze"""
    wanted = [dims] if isinstance(dims, int) else list(dims)
    chosen = {dimension(d, self) for d in wanted} if wanted else set(range(len(self)))
    for i, (a, b) in enumerate(zip(self.axes, out.axes)):
        if i in chosen and is_wide(a):
            here.freeze(a, "its order matters")
            here.freeze(b, "its order matters")
        else:
            here.tie(a, b)
