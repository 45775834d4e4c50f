"""How important each element of a weight is: the least important go first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import InputError
from .mask import chunks

Score = Callable[[Tensor], Tensor]


def magnitude(weight: Tensor) -> Tensor:
    """|weight|, element by element, in the weight's shape and dtype (any float).

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015.
    """
    return weight.abs()


# Scores that a plan can name and save. Each is element by element, so that it may be computed piece by piece.
SCORES: dict[str, Score] = {"l1": magnitude}


def check_weight(name: str, weight: Tensor) -> None:
    """Raise InputError unless `weight` (any shape) holds finite floating-point values that can be read."""
    if not weight.is_floating_point():
        raise InputError(
            "cannot score a weight",
            where=_where(name, weight),
            why=f"{weight.dtype} is not floating point",
            do=f'Exclude it: Plan(..., exclude=["{name}"]).',
        )
    if weight.is_meta:
        raise InputError(
            "cannot score a weight",
            where=_where(name, weight),
            why="it is on the meta device and has no values",
            do="Load the model's weights first.",
        )
    if not _bounds_are_finite(weight):
        raise InputError(
            "cannot score a weight",
            where=_where(name, weight),
            why="it holds NaN or infinity",
            do="Repair the weight: a threshold among such values means nothing.",
        )


def scores(name: str, weight: Tensor, score: Score) -> Tensor:
    """The user's `score` of `weight` -> finite non-negative float scores, shape and device of the weight.

    Raises InputError where the function returns anything else.
    """
    with torch.no_grad():
        found = score(weight)
    where = _where(name, weight)
    what = f"cannot use the scores of {getattr(score, '__name__', score)!s}"
    if not isinstance(found, Tensor):
        why = f"it returned {type(found).__name__}, not a tensor"
        raise InputError(what, where=where, why=why, do=_CONTRACT)
    if found.shape != weight.shape:
        why = f"they have shape {list(found.shape)}, the weight {list(weight.shape)}"
        raise InputError(what, where=where, why=why, do=_CONTRACT)
    if not found.is_floating_point():
        raise InputError(what, where=where, why=f"they are {found.dtype}", do=_CONTRACT)
    if found.device != weight.device:
        why = f"they are on {found.device}, the weight on {weight.device}"
        raise InputError(what, where=where, why=why, do=_CONTRACT)
    if not _bounds_are_finite(found):
        raise InputError(what, where=where, why="some are NaN or infinite", do=_CONTRACT)
    if any(bool((piece < 0).any()) for piece in chunks(found)):
        raise InputError(what, where=where, why="some are negative", do=_CONTRACT)
    return found.detach()


_CONTRACT = "A score maps a weight to one finite, non-negative float for each element; the smallest go first."


def _bounds_are_finite(tensor: Tensor) -> bool:
    # min and max carry NaN along, so two numbers speak for a piece; torch has neither for fp8
    for piece in chunks(tensor.detach()):
        low, high = (piece.float() if piece.dtype.itemsize == 1 else piece).aminmax()
        if not (bool(low.isfinite()) and bool(high.isfinite())):
            return False
    return True


def _where(name: str, weight: Tensor) -> str:
    return f'"{name}" {list(weight.shape)}'
