"""rounding: a comparison that failed, judged once more by how far the model is off itself.

Its own rounding is what it is off itself in float64. A model in float64 has nothing wider to be held against: there it
is what one rounding of the weights does to the answer, the most of a few tries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.graph.environment import words_of

from .calls import Call
from .compare import ROUNDINGS, CheckRow, compare, difference

# Two graphs of one function are this near to each other in float64, also where float32 has two digits left.
_EQUAL = 1e-9
# A model that rounds to less than one digit has no right answer in its own precision.
_MOST = 0.1
NO_DIGITS = "the model's own answer has no digit to compare; it changes"
# One sample of a rounding may be small by chance.
SAMPLES = 4


def within_rounding(
    row: CheckRow,
    call: Call,
    expected: Sequence[Any],
    got: Sequence[Any],
    right: Callable[[], Sequence[Any]],
    ours: Callable[[], Sequence[Any]],
    nudged: Callable[[int], Sequence[Any]],
) -> CheckRow:
    """A row that failed with the tolerance that the model's own rounding asks for: ok, or failed still.

    `right` runs in float64 what `expected` came from, and `ours` the graph that `got` came from; they must agree. The
    rounding is what `expected` is off `right`, and four times that is allowed, but never more than a tenth. Where
    `expected` is in float64, it is what `expected` is off `nudged`: the same with weights that are off by one rounding,
    drawn with a seed.
    """
    if _is_widest(expected):
        rounding = [0.0] * len(expected)
        for seed in range(SAMPLES):
            moved = [difference(a, b).error for a, b in zip(nudged(seed), expected, strict=True)]
            rounding = [max(pair) for pair in zip(rounding, moved)]
        if not ROUNDINGS * max(rounding, default=0.0) <= _MOST:
            return dataclasses.replace(row, note=f"{NO_DIGITS} by one rounding of its weights: {max(rounding):.1e}")
        return compare(row.what, call, expected, got, rounding)
    try:
        exact, graph = right(), ours()
    except Exception as error:
        return dataclasses.replace(
            row, note=f"its rounding is unknown, for it does not run in float64: {words_of(error)}"
        )
    rounding = [difference(_rounded(wide, own), own).error for wide, own in zip(exact, expected, strict=True)]
    if not ROUNDINGS * max(rounding, default=0.0) <= _MOST:
        return dataclasses.replace(row, note=f"{NO_DIGITS} in float64: {max(rounding):.1e}")
    apart = compare(row.what, call, exact, graph)
    if not apart.error <= _EQUAL:
        return dataclasses.replace(row, note=f"in float64 they differ by {apart.error:.1e} as well")
    return compare(row.what, call, expected, got, rounding)


def _is_widest(expected: Sequence[Any]) -> bool:
    """Whether outputs are in the widest precision that there is."""
    kinds = {
        value.dtype
        for value in expected
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    }
    return bool(kinds) and kinds <= {torch.float64, torch.complex128}


def _rounded(wide: Any, own: Any) -> Any:
    floats = isinstance(wide, Tensor) and isinstance(own, Tensor) and (own.is_floating_point() or own.is_complex())
    return wide.to(own.dtype) if floats else wide
