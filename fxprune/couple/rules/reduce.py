"""Reductions, and ops that look along a whole dimension: sums, means, extrema, softmax, sorting."""

from __future__ import annotations

from typing import Any

from .relation import Atoms, Dims, Here, Resize, by_dimension, dimension, dimension_list, relation, tie_broadcast


def _chosen(self: Dims, a: dict[str, Any]) -> set[int]:
    name = next((k for k in ("dim", "dims", "axis") if k in a), None)
    return set(dimension_list(a[name] if name else None, self))


def _tie_kept(here: Here, out: Dims, self: Dims, chosen: set[int]) -> None:
    keepdim = len(out) == len(self)
    kept = [axis for i, axis in enumerate(self.axes) if keepdim or i not in chosen]
    for i, (a, b) in enumerate(zip(kept, out.axes)):
        if not (keepdim and i in chosen):
            here.tie(a, b)


def _zero_of_sum(here: Here, out: Dims, self: Dims, **a: Any) -> Atoms:
    for i in _chosen(self, a):
        here.sums(self[i], self.zero)
    return self.zero & out.atoms()


@relation("sum", "linalg_vector_norm", "linalg_norm", "linalg_matrix_norm", "norm", "frobenius_norm", "nuclear_norm",
          "nansum", "count_nonzero", zero=_zero_of_sum)  # fmt: skip
def sum_(here: Here, out: Dims, self: Dims, **a: Any) -> None:
    """a sum over dimensions: exact where what is removed is zero"""
    chosen = _chosen(self, a)
    _tie_kept(here, out, self, chosen)
    order = a.get("ord", a.get("p", 2))
    if isinstance(order, (int, float)) and order <= 0:
        here.freeze_each((self[i] for i in chosen), "a norm that counts zeros runs over it")
    for i in chosen:
        here.measures(self[i])


def _resize_mean(sizes: Resize, out: Dims, self: Dims, **a: Any) -> dict[str, Any]:
    old = new = 1
    for i in _chosen(self, a):
        old, new = old * sizes.old(self[i]), new * sizes.number(self[i])
    # The pruned model divides by the old count.
    return {} if old == new else {"output_scale": new / old}


@relation("mean", zero=_zero_of_sum, resize=_resize_mean)
def mean(here: Here, out: Dims, self: Dims, **a: Any) -> None:
    """a sum over dimensions divided by a count that stays the old one"""
    chosen = _chosen(self, a)
    _tie_kept(here, out, self, chosen)
    for i in chosen:
        here.measures(self[i])


def _zero_of_statistic(here: Here, out: Any, self: Dims, **_: Any) -> Atoms:
    return set(self.zero)


def _extremum(here: Here, out: Any, self: Dims, a: dict[str, Any], why: str) -> None:
    chosen = _chosen(self, a)
    here.freeze_each((self[i] for i in chosen), why)
    for result in out if isinstance(out, list) else [out]:
        _tie_kept(here, result, self, chosen)


@relation("amax", "amin", "aminmax", "prod", "any", "std", "var", "std_mean", "var_mean", "nanmean",
          zero=_zero_of_statistic)  # fmt: skip
def statistic(here: Here, out: Any, self: Dims, **a: Any) -> None:
    """a statistic of whole dimensions, which freeze; that of zeros is zero"""
    _extremum(here, out, self, a, "a statistic that zeros change runs over it")


@relation("argmax", "argmin", "logsumexp", "median", "nanmedian", "mode", "kthvalue", "all")
def extremum(here: Here, out: Any, self: Dims, **a: Any) -> None:
    """a statistic of whole dimensions, which freeze"""
    _extremum(here, out, self, a, "a statistic that zeros change runs over it")


def _zero_of_max(here: Here, out: Any, **a: Any) -> Atoms:
    return by_dimension(out, [a["self"], a["other"]], every=True) if isinstance(a.get("other"), Dims) else set()


@relation("max", "min", zero=_zero_of_max)
def maximum(here: Here, out: Any, self: Dims, **a: Any) -> None:
    """the larger of two tensors, or the largest along a dimension, which freezes"""
    if isinstance(a.get("other"), Dims):
        tie_broadcast(here, out, [self, a["other"]])
        return
    _extremum(here, out, self, a, "an extremum is taken over it")


def _along(here: Here, out: Any, self: Dims, dim: Any, why: str) -> None:
    """Every dimension stays; the one that the op looks along freezes."""
    for result in out if isinstance(out, list) else [out]:
        here.tie_or_freeze(self.axes, result.axes, [dimension(dim, self)], why)


@relation("softmax", "log_softmax", "_softmax", "_log_softmax", "special_softmax")
def softmax(here: Here, out: Dims, self: Dims, dim: int = -1, **_: Any) -> None:
    """exp(x) over its sum along a dimension, which freezes"""
    _along(here, out, self, dim, "a softmax runs over it")


@relation("cumsum", "cumprod", zero=lambda here, out, self, **_: set(self.zero))
def cumulative(here: Here, out: Any, self: Dims, dim: int, **_: Any) -> None:
    """a running result along a dimension, which freezes"""
    _along(here, out, self, dim, "a running result along it")


@relation("logcumsumexp", "cummax", "cummin")
def running_extremum(here: Here, out: Any, self: Dims, dim: int, **_: Any) -> None:
    """a running extremum along a dimension, which freezes"""
    _along(here, out, self, dim, "a running result along it")


@relation("sort", "argsort", "topk")
def sort(here: Here, out: Any, self: Dims, dim: int = -1, **_: Any) -> None:
    """an order along a dimension, which freezes"""
    _along(here, out, self, dim, "it is ordered by value")


@relation("msort")
def msort(here: Here, out: Any, self: Dims, **_: Any) -> None:
    """an order along the first dimension, which freezes"""
    _along(here, out, self, 0, "it is ordered by value")
