"""Ops that compare rows or values: distances, similarities, cross products, look-ups in sorted values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fxprune.couple.axis import Axis

from .relation import Atoms, Dims, Here, by_dimension, dimension, relation, tie_broadcast

_INEXACT = "compared over where its removed indices are not zero"


def _compared(out: Dims, x1: Dims, x2: Dims, dim: int) -> Iterator[tuple[list[Axis], Axis | None]]:
    """For each dimension of the broadcast rows, from the right: the axes there, and the output's or None."""
    count = max(len(x1), len(x2))
    rest = iter(reversed(out.axes))
    for back in range(1, count + 1):
        found = [x[-back] for x in (x1, x2) if back <= len(x)]
        yield found, None if count - back == dimension(dim, count) else next(rest)


def _zero_of_similarity(here: Here, out: Dims, x1: Dims, x2: Dims, dim: int = 1, **_: Any) -> Atoms:
    for found, target in _compared(out, x1, x2, dim):
        if target is None:
            for axis in found:
                here.sums(axis, x1.zero & x2.zero, _INEXACT)
    # The product of a zero row with any other is zero, and so is the quotient.
    return (x1.zero | x2.zero) & out.atoms()


@relation("cosine_similarity", zero=_zero_of_similarity)
def cosine_similarity(here: Here, out: Dims, x1: Dims, x2: Dims, dim: int = 1, **_: Any) -> None:
    """the cosine between rows of two tensors along a dimension"""
    for found, target in _compared(out, x1, x2, dim):
        for axis in found:
            here.tie(found[0] if target is None else target, axis)


def _zero_of_cdist(here: Here, out: Dims, x1: Dims, x2: Dims, **_: Any) -> Atoms:
    here.sums(x1[-1], x1.zero & x2.zero, _INEXACT)
    return set()


@relation("cdist", zero=_zero_of_cdist)
def cdist(here: Here, out: Dims, x1: Dims, x2: Dims, p: float = 2.0, **_: Any) -> None:
    """* m k, * n k -> * m n"""
    here.tie(x1[-1], x2[-1])
    if p <= 0:
        here.freeze(x1[-1], "a norm that counts zeros runs over it")
    here.tie(x1[-2], out[-2])
    here.tie(x2[-2], out[-1])
    tie_broadcast(here, Dims(out.axes[:-2]), [Dims(x1.axes[:-2]), Dims(x2.axes[:-2])])


@relation("pairwise_distance")
def pairwise_distance(here: Here, out: Dims, x1: Dims, x2: Dims, keepdim: bool = False, **_: Any) -> None:
    """the distance of rows along the last dimension, which freezes"""
    # Its epsilon is added to every difference, to those of removed indices too.
    here.freeze_each((x1[-1], x2[-1]), "a statistic that zeros change runs over it")
    rest = Dims(out.axes[:-1] if keepdim else out.axes)
    tie_broadcast(here, rest, [Dims(x1.axes[:-1]), Dims(x2.axes[:-1])])


def _zero_of_cross(here: Here, out: Dims, self: Dims, other: Dims, **_: Any) -> Atoms:
    return by_dimension(out, [self, other], every=False)


@relation("cross", "linalg_cross", zero=_zero_of_cross)
def cross(here: Here, out: Dims, self: Dims, other: Dims, dim: int | None = -1, **_: Any) -> None:
    """the cross product along a dimension of three, which freezes"""
    tie_broadcast(here, out, [self, other])
    for i, axis in enumerate(out.axes):
        if dim is None or i == dimension(dim, out):
            here.freeze(axis, "positions along it matter")


@relation("bucketize")
def bucketize(here: Here, out: Dims, self: Any, boundaries: Dims, **_: Any) -> None:
    """the place of each value among sorted ones, which freeze"""
    here.freeze_all([boundaries], "it is ordered by value")
    if isinstance(self, Dims):
        tie_broadcast(here, out, [self])


@relation("isin")
def isin(here: Here, out: Dims, elements: Dims | None = None, test_elements: Dims | None = None, **_: Any) -> None:
    """whether each value is among others, which freeze"""
    here.freeze_all([test_elements], "each of its values matters to all")
    if elements is not None:
        tie_broadcast(here, out, [elements])


@relation("searchsorted")
def searchsorted(here: Here, out: Dims, **a: Any) -> None:
    """the place of each value among sorted ones; all freeze"""
    here.freeze_all([out, *(v for v in a.values() if isinstance(v, Dims))], "it is ordered by value")
