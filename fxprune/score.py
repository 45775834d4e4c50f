"""How important each element of a weight is: the least important go first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from .errors import InputError
from .mask import chunks

Score = Callable[[Tensor], Tensor]


class ChannelScore(Protocol):
    """How the units of a group are scored: p of the norm, and the reduction over members."""

    @property
    def norm(self) -> float:
        """p of the Lp norm of a slice."""
        ...

    @property
    def reduce(self) -> str:
        """ "sum", "mean" or "max" over members."""
        ...


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


def group_score(members: Iterable[tuple[Tensor, int, Tensor]], how: ChannelScore) -> Tensor:
    """The importance of each index of a group, from its members: float64 [size].

    A member is (tensor, dim, index): `index` [tensor.shape[dim]] says to which index of the group a slice belongs, -1
    for none. The slice's score is its Lp norm (p = how.norm), and the members' scores are reduced by `how.reduce`.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", 2017 (norms of filters); Fang et al., "DepGraph:
    Towards Any Structural Pruning", 2023 (over all coupled members).
    """
    scores = torch.stack([_norms(tensor.detach(), dim, index, how.norm).cpu() for tensor, dim, index in members])
    return scores.amax(0) if how.reduce == "max" else scores.mean(0) if how.reduce == "mean" else scores.sum(0)


def _norms(tensor: Tensor, dim: int, index: Tensor, p: float) -> Tensor:
    """The Lp norm of all slices along `dim` that belong to each index of a group, in float64."""
    rows = tensor.movedim(dim, 0).flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    index = index.to(rows.device)
    mine = index >= 0
    owner = index[mine]
    empty = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device=rows.device)
    if not rows.numel():
        return empty
    largest = empty.scatter_reduce(0, owner, _reduced(rows, lambda piece, _: piece.amax(1))[mine], "amax")
    if math.isinf(p):
        return largest
    # A power of a magnitude underflows or overflows where p is large; one of its share of the largest does not matter.
    scale = largest.where(largest > 0, 1.0)[index.clamp(min=0)].unsqueeze(1)
    powers = _reduced(rows, lambda piece, at: (piece / scale[at]).pow(p).sum(1))
    return empty.index_add(0, owner, powers[mine]).pow(1 / p) * largest


def _reduced(rows: Tensor, reduce: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """What `reduce` makes of the magnitudes (float64) of rows and their place, a piece at a time."""
    step = max(1, (1 << 22) // max(1, rows.shape[1]))
    places = [slice(start, start + step) for start in range(0, len(rows), step)]
    return torch.cat([reduce(rows[at].double().abs(), at) for at in places])


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
