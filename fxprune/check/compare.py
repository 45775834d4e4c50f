"""compare: outputs held against the oracle's: the largest relative error of a tensor, and whether it is allowed.

An element counts where the oracle's is finite; what is not finite must be so in the same places. Its error is
|a - b| over a scale, and the scale is the smallest of these, but not less than |b| itself:

- the largest |b| of the output;
- 100 times the median of all |b| that are not zero, so that one huge element hides no error in small ones;
- 100 times the largest |b| of each row, channel or other slice of 16 elements or more that the element lies in, so that
  outputs of several scales in one tensor each count. This is no less than what 16 roundings (16 eps) of the first two
  are to the tolerance: numbers that cancel leave that much.

Sentinels, such as masked logits, are told apart before: one to four values (the same to 1e-3), of 1e4 or more, that
stand 1e4 above all others; or where all others are zero, or there are none, of 1e8 or a quarter of what the type can
hold. They must be equal to within the tolerance of themselves, and the scale of the others comes from the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.errors import CheckError
from fxprune.graph.note import Note

from .calls import Call

# End to end over a whole model. A half type loses about one unit in the last place at every rounding that a compiler
# moves; over tens of layers that adds up to these.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Rounding hangs on the order of sums, so that two right answers differ by more than each does from the exact one.
ROUNDINGS = 4.0

_ABOVE = 100.0
_GAP = 1e4
_HUGE = 1e8
_LEVELS = 4
_SLICE = 16
_SAMPLE = 2**20


@dataclasses.dataclass(frozen=True)
class CheckRow:
    """One comparison: what with what, on which input, the largest relative error over the outputs, its tolerance.

    compared  the share of the elements that hold something to compare: finite numbers that are no sentinels
    blind     which of the flat outputs hold nothing to compare
    note      why the tolerance is not that of the dtype
    """

    what: str
    call: str
    error: float
    tolerance: float
    compared: float = 1.0
    blind: tuple[int, ...] = ()
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance (a NaN error is not)."""
        return self.error <= self.tolerance

    @property
    def off(self) -> str:
        """The error in words, and why no more of it is allowed."""
        return f"{self.error:.1e}" + (f"; {self.note}" if self.note else "")

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if not self.ok:
            return "FAILED"
        if not self.compared:
            return "nothing to compare"
        part = "" if self.compared == 1.0 else f" ({self.compared:.0%} compared)"
        return "ok" + part + (f", {self.note}" if self.note else "")


class Difference(NamedTuple):
    """How one output differs: the largest error, what its dtype allows, and its elements: compared ones, and all."""

    error: float
    limit: float
    compared: int
    elements: int


def outputs(function: Any, call: Call) -> list[Any]:
    """Flat outputs of any callable, without gradients."""
    args, kwargs = call.copy()
    with torch.no_grad():
        return [
            v.detach().clone() if isinstance(v, Tensor) else v for v in pytree.tree_leaves(function(*args, **kwargs))
        ]


def compare(
    what: str,
    call: Call,
    expected: Sequence[Any],
    got: Sequence[Any],
    rounding: Sequence[float] | None = None,
    *,
    asked: float = 0.0,
) -> CheckRow:
    """The output tensors held against those expected; outputs that are no floating tensors must be equal.

    `rounding` is how far the model is off itself in float64, for each output: four times that is allowed where it is
    more than what the dtype is. What was `asked` for is allowed as well.
    """
    worst, tolerance = 0.0, TOLERANCE[torch.float32]
    if len(expected) != len(got):
        return CheckRow(f"{what}: {len(expected)} outputs expected, {len(got)} given", call.label, float("nan"), 0.0)
    found = [difference(a, b) for a, b in zip(got, expected, strict=True)]
    note = ""
    for place, one in enumerate(found):
        error = math.inf if math.isnan(one.error) else one.error
        own = ROUNDINGS * rounding[place] if rounding is not None else 0.0
        limit = max(one.limit, own, asked)
        if error / limit > worst / tolerance:
            worst, tolerance = error, limit
            note = f"allowed is {ROUNDINGS:.0f} times the model's own rounding" if own > one.limit else ""
            note = "products in bfloat16 were asked for" if asked > max(one.limit, own) else note
    elements, compared = sum(one.elements for one in found), sum(one.compared for one in found)
    blind = tuple(place for place, one in enumerate(found) if one.elements and not one.compared)
    return CheckRow(what, call.label, worst, tolerance, compared / elements if elements else 0.0, blind, note)


def largest_difference(got: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest error over the floating outputs, whatever their precision."""
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if isinstance(b, Tensor) and b.is_floating_point()]
    return max((difference(a.to(b.dtype), b).error for a, b in pairs), default=0.0)


def difference(got: Any, expected: Any) -> Difference:
    """How one output differs from the one expected."""
    exact = TOLERANCE[torch.float64]
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        same = type(got) is type(expected) and got == expected
        return Difference(0.0 if same else math.inf, exact, 0, 0)
    count = expected.numel()
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return Difference(math.inf, exact, count, count)
    if not (expected.is_floating_point() or expected.is_complex()):
        return Difference(0.0 if torch.equal(got, expected) else math.inf, exact, count, count)
    real = torch.empty((), dtype=expected.dtype).real.dtype
    limit = TOLERANCE.get(real, TOLERANCE[torch.float32])
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(got), finite) or not _equal_with_nan(got[~finite], expected[~finite]):
        return Difference(math.inf, limit, count, count)
    if not bool(finite.any()):
        return Difference(0.0, limit, 0, count)
    wide = torch.complex128 if expected.is_complex() else torch.float64
    size = expected.to(wide).abs().where(finite, 0.0)
    apart = (got.to(wide) - expected.to(wide)).abs().where(finite, 0.0)
    sentinel = sentinels(size, torch.finfo(real).max)
    others = finite if sentinel is None else finite & ~sentinel
    scale = _scales(size if sentinel is None else size.where(others, 0.0), limit, torch.finfo(real).eps)
    scale = torch.maximum(scale, size)
    # Where everything is zero there is no scale, and the error is absolute.
    error = float((apart / scale.where(scale > 0, 1.0)).max())
    return Difference(error, limit, int(others.sum()), count)


def sentinels(size: Tensor, largest: float) -> Tensor | None:
    """Where magnitudes (zero for what does not count) are sentinels, or None where none is.

    `largest` is the largest number of the type.
    """
    rest = size
    for _ in range(_LEVELS):
        lowest = 0.999 * float(rest.max())
        rest = rest.where(rest < lowest, 0.0)
        below = float(rest.max())
        if below == 0.0:
            return size >= lowest if lowest >= 0.999 * min(_HUGE, largest / 4) else None
        if lowest >= 0.999 * _GAP * max(below, 1.0):
            return size >= lowest
    return None


def _scales(size: Tensor, limit: float, eps: float) -> Tensor:
    """What errors are relative to, by element; broadcasts against `size`. See the top of this file."""
    whole = size.max()
    counted = size[size > 0]
    if counted.numel():
        if counted.numel() > _SAMPLE:
            drawn = torch.randint(counted.numel(), (_SAMPLE,), generator=torch.Generator().manual_seed(0))
            counted = counted[drawn.to(counted.device)]
        whole = torch.minimum(whole, _ABOVE * counted.median())
    scale = whole.expand(size.shape)
    for dim in range(size.dim()):
        if size.shape[dim] > 1 and size.numel() // size.shape[dim] >= _SLICE:
            others = [other for other in range(size.dim()) if other != dim]
            scale = torch.minimum(scale, _ABOVE * size.amax(others, keepdim=True))
    return torch.minimum(whole, torch.maximum(scale, 16 * eps / limit * whole))


def _equal_with_nan(a: Tensor, b: Tensor) -> bool:
    return bool(torch.all((a == b) | (torch.isnan(a) & torch.isnan(b))))


def nothing_compared(rows: Iterable[CheckRow]) -> list[Note]:
    """What the report says of checks that are ok because they had nothing to compare."""
    calls = {row.call: row.blind for row in rows if row.ok and (row.blind or not row.compared)}
    if not calls:
        return []
    which = ", ".join(map(str, sorted({place for blind in calls.values() for place in blind})))
    told = f"{f'output {which} on ' if which else ''}the {', the '.join(calls)}"
    why = "no element is a finite number other than a sentinel, so no check says that the result is right there"
    return [Note(f"nothing to compare in {told}: {why}", "warning")]


def is_finite(values: Sequence[Any]) -> bool:
    """Whether no floating tensor among them holds an infinity or a NaN."""
    return all(bool(v.isfinite().all()) for v in values if isinstance(v, Tensor) and v.is_floating_point())


def refuse(row: CheckRow, what_next: str) -> CheckError:
    """The error for a comparison that failed."""
    return CheckError(
        f"{row.what}: the outputs differ by {row.error:.2e} relative, {row.tolerance:.0e} is allowed",
        where=row.call,
        why="the graph does not compute what the model computes" + (f"; {row.note}" if row.note else ""),
        do=what_next,
    )
