"""compare: outputs held against the oracle's: the largest relative error of a tensor, and whether it is allowed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.errors import CheckError

from .calls import Call

# max|a - b| / max|b| per output tensor, end to end over a whole model. A half type loses about one unit in the last
# place at every rounding that a compiler moves; over tens of layers that adds up to these.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class CheckRow:
    """One comparison: what with what, on which input, the largest relative error over the outputs, its tolerance."""

    what: str
    call: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance (a NaN error is not)."""
        return self.error <= self.tolerance


def outputs(function: Any, call: Call) -> list[Any]:
    """Flat outputs of any callable, without gradients."""
    args, kwargs = call.copy()
    with torch.no_grad():
        return [
            v.detach().clone() if isinstance(v, Tensor) else v for v in pytree.tree_leaves(function(*args, **kwargs))
        ]


def compare(what: str, call: Call, expected: Sequence[Any], got: Sequence[Any]) -> CheckRow:
    """Largest max|a - b| / max|b| over the output tensors.

    Floating outputs that are not finite must be so in the same places; other outputs must be equal.
    """
    worst, tolerance = 0.0, TOLERANCE[torch.float32]
    if len(expected) != len(got):
        return CheckRow(f"{what}: {len(expected)} outputs expected, {len(got)} given", call.label, float("nan"), 0.0)
    for a, b in zip(got, expected, strict=True):
        error, limit = _difference(a, b)
        error = math.inf if math.isnan(error) else error
        if error / limit > worst / tolerance:
            worst, tolerance = error, limit
    return CheckRow(what, call.label, worst, tolerance)


def largest_difference(got: Sequence[Any], expected: Sequence[Any]) -> float:
    """Largest max|a - b| / max|b| over the floating outputs, whatever their precision; infinite where shapes differ."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point():
            error, _ = _difference(a.to(b.dtype) if isinstance(a, Tensor) else a, b)
            worst = max(worst, error)
    return worst


def _difference(got: Any, expected: Any) -> tuple[float, float]:
    exact = TOLERANCE[torch.float64]
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        return (0.0 if type(got) is type(expected) and got == expected else float("inf")), exact
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf"), exact
    if expected.numel() == 0:
        return 0.0, exact
    if not (expected.is_floating_point() or expected.is_complex()):
        return (0.0 if torch.equal(got, expected) else float("inf")), exact
    limit = TOLERANCE.get(torch.empty((), dtype=expected.dtype).real.dtype, TOLERANCE[torch.float32])
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(got), finite) or not _equal_with_nan(got[~finite], expected[~finite]):
        return float("inf"), limit
    if not bool(finite.any()):
        return 0.0, limit
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = got[finite].to(wide), expected[finite].to(wide)
    scale = float(b.abs().max())
    error = float((a - b).abs().max())
    return (error / scale if scale > 0 else error), limit


def _equal_with_nan(a: Tensor, b: Tensor) -> bool:
    return bool(torch.all((a == b) | (torch.isnan(a) & torch.isnan(b))))


def is_finite(values: Sequence[Any]) -> bool:
    """Whether no floating tensor among them holds an infinity or a NaN."""
    return all(bool(v.isfinite().all()) for v in values if isinstance(v, Tensor) and v.is_floating_point())


def refuse(row: CheckRow, what_next: str) -> CheckError:
    """The error for a comparison that failed."""
    return CheckError(
        f"{row.what}: the outputs differ by {row.error:.2e} relative, {row.tolerance:.0e} is allowed",
        where=row.call,
        why="the graph does not compute what the model computes",
        do=what_next,
    )
