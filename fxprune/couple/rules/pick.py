"""Ops that pick and place: index, gather, scatter and their kin, diagonals, and ops that move indices about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxprune.couple.axis import atoms

from .cut import PICKED, select
from .relation import Atoms, Dims, Here, by_dimension, carried, dimension, is_wide, of_first, of_self, relation


def _zero_of_index(here: Here, out: Dims, self: Dims, indices: list[Dims | None], **_: Any) -> Atoms:
    # What is picked by tensors is not zero along the dimensions of these, even where they have an axis of self.
    given = {atom for x in indices if isinstance(x, Dims) for atom in x.atoms()}
    return (self.zero & out.atoms()) - given


def _zero_of_pick(here: Here, out: Dims, self: Dims, dim: int | None = None, **_: Any) -> Atoms:
    if dim is None:
        return set()
    at = dimension(dim, self)
    picked = set(atoms(out[at])) if len(out) else set()
    return (self.zero & out.atoms()) - picked


@relation("index", "_unsafe_index", zero=_zero_of_index)
def index(here: Here, out: Dims, self: Dims, indices: list[Dims | None], **_: Any) -> None:
    """advanced indexing: the dimensions indexed by tensors freeze, the others stay"""
    picked = [i for i, given in enumerate(indices) if given is not None]
    for i in picked:
        here.freeze(self[i], PICKED)
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
    here.tie_rows(rest, others)
    for x in given:
        here.tie_rows(reversed(x.axes), reversed(block))


@relation("index_select", zero=_zero_of_pick)
def index_select(here: Here, out: Dims, self: Dims, dim: int, index: Dims, **_: Any) -> None:
    """indices along a dimension, picked by a tensor"""
    at = dimension(dim, self)
    here.tie_rows(self.axes, out.axes, besides=[at])
    here.freeze(self[at], PICKED)
    if len(index):
        here.tie(out[at], index[0])


@relation("gather", "take_along_dim", zero=_zero_of_pick)
def gather(here: Here, out: Dims, self: Dims, dim: int | None = None, index: Dims | None = None, **a: Any) -> None:
    """elements picked along a dimension by a tensor of indices"""
    index = a["indices"] if index is None else index
    if dim is None or index is None or len(index) != len(out):
        here.freeze_all([out, self, index], PICKED)
        return
    at = dimension(dim, self)
    for i, (x, chosen, y) in enumerate(zip(self.axes, index.axes, out.axes)):
        here.tie(chosen, y)
        if i == at:
            here.freeze(x, PICKED)
        elif x.root().size == y.root().size:
            here.tie(x, y)
        else:
            here.freeze_each((x, y), "only the first of its indices are read")


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
    here.freeze(self[at], PICKED)
    if isinstance(source, Dims) and len(source) == len(self):
        here.freeze(source[at], PICKED)


@relation("scatter", "scatter_add", "scatter_reduce", zero=_zero_of_scatter)
def scatter(here: Here, out: Dims, self: Dims, dim: int, index: Dims, src: Any = None, **_: Any) -> None:
    """elements written along a dimension where a tensor of indices says"""
    at = dimension(dim, self)
    rows = [index, *([src] if isinstance(src, Dims) else [])]
    for i, (a, b) in enumerate(zip(self.axes, out.axes)):
        here.tie(a, b)
        for row in rows:
            if i == at or row[i].root().size != a.root().size:
                here.freeze_each((row[i], a), PICKED)
            else:
                here.tie(row[i], a)


@relation("index_put", zero=lambda here, out, **_: set())
def index_put(here: Here, out: Dims, self: Dims, indices: list[Dims | None], values: Dims, **_: Any) -> None:
    """elements written where tensors of indices say"""
    here.freeze_all([x for x in indices if isinstance(x, Dims)], PICKED)
    # A mask takes as many dimensions as it has.
    taken = sum(max(1, len(x)) if isinstance(x, Dims) else 1 for x in indices)
    for i, (a, b) in enumerate(zip(self.axes, out.axes)):
        here.tie(a, b)
        if i < taken:
            here.freeze(a, PICKED)
    for back, axis in enumerate(reversed(values.axes), 1):
        if back <= len(self) - taken:
            here.tie(axis, self[-back])
        else:
            here.freeze(axis, PICKED)


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
    here.tie_rows(self.axes, out.axes)
    if "index" in a:
        select(here, src, self, dim, a["index"])
        return
    # written like a slice, but its bounds would have to follow
    at = dimension(dim, self)
    here.freeze_each((self[at], src[at]), PICKED)
    here.tie_rows(self.axes, src.axes, besides=[at])


@relation("masked_select", "masked_scatter", "nonzero", "nonzero_static", "unique_dim", "_unique2", "take", "put",
          "bincount", "histc")  # fmt: skip
def by_value(here: Here, out: Any, **a: Any) -> None:
    """indices that depend on values"""
    here.freeze_all([out, *(v for v in a.values() if isinstance(v, Dims))], "what it picks depends on values")


@relation("diagonal", zero=of_self)
def diagonal(here: Here, out: Dims, self: Dims, **a: Any) -> None:
    """the diagonal of two dimensions, which freeze, as a last one"""
    chosen = {dimension(a.get("dim1", 0), self), dimension(a.get("dim2", 1), self)}
    here.freeze_each((self[i] for i in chosen), "positions along it matter")
    rest = [axis for i, axis in enumerate(self.axes) if i not in chosen]
    here.tie_rows(rest, out.axes)
    here.freeze_each(out.axes[len(rest) :], "positions along it matter")


@relation("diff", zero=carried)
def diff(
    here: Here, out: Dims, self: Dims, dim: int = -1, prepend: Dims | None = None, append: Dims | None = None, **_: Any
) -> None:
    """differences of neighbours along a dimension, which freezes"""
    for row in (self, prepend, append):
        if row is not None:
            here.tie_or_freeze(row.axes, out.axes, [dimension(dim, self)], "its order matters")


@relation("rot90", zero=of_self)
def rot90(here: Here, out: Dims, self: Dims, dims: Sequence[int] = (0, 1), **_: Any) -> None:
    """a rotation in the plane of two dimensions, which freeze"""
    here.tie_or_freeze(self.axes, out.axes, [dimension(d, self) for d in dims], "its order matters")


@relation("flip", "fliplr", "flipud", "roll", zero=of_first)
def moved(here: Here, out: Dims, self: Dims, dims: Any = (), **_: Any) -> None:
    """indices in another order along some dimensions, which freeze"""
    wanted = [dims] if isinstance(dims, int) else list(dims)
    chosen = [dimension(d, self) for d in wanted] if wanted else range(len(self))
    here.tie_or_freeze(self.axes, out.axes, [i for i in chosen if is_wide(self[i])], "its order matters")
