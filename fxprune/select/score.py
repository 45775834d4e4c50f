"""How important each element of a weight is: the least important go first."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.errors import InputError
from fxprune.plan.scores import Score, Scores, _where, score_name

from .mask import chunks


def magnitude(weight: Tensor) -> Tensor:
    """|weight|, element by element, in the weight's shape and dtype (any float).

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015.
    """
    return weight.abs()


def random(weight: Tensor) -> Tensor:
    """Scores drawn evenly from [0, 1), float32, in the weight's shape.

    They come from torch's own generator of the weight's device, so torch.manual_seed decides them.

    Source: Gale et al., "The State of Sparsity in Deep Neural Networks", 2019 (random pruning as the baseline).
    """
    return torch.rand(weight.shape, dtype=torch.float32, device=weight.device)


def lamp(weight: Tensor) -> Tensor:
    """w^2 over the sum of the squares that are not smaller, in the weight's shape, float64, from 0 to 1.

    Within one weight the order is that of the magnitude; it is made for scope="global", where it settles how much each
    weight loses: the largest element of every weight has score 1.

    Source: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021.
    """
    return shares_of_the_rest(weight.detach().double().abs().reshape(-1)).view(weight.shape)


def shares_of_the_rest(magnitudes: Tensor) -> Tensor:
    """LAMP of magnitudes [n], float64: each one's square over the sum of its own and of all that come after it.

    They are in ascending order, equal ones by index.
    """
    if not magnitudes.numel():
        return magnitudes
    largest = magnitudes.max()
    # Only proportions matter, and a square over the largest neither overflows nor loses what counts.
    ascending, order = torch.sort(magnitudes / largest.where(largest > 0, 1.0), stable=True)
    squares = ascending.square_()
    rest = squares.flip(0).cumsum(0).flip(0)
    return torch.empty_like(magnitudes).index_put_((order,), squares / rest.where(rest > 0, 1.0))


# Scores of elements that a plan can name and save. The Lp norm of a single number is its magnitude for every p.
SCORES: dict[str, Score] = {"l1": magnitude, "l2": magnitude, "random": random, "lamp": lamp}
# Those of them that may be computed piece by piece; the others look at a weight as a whole, once.
PIECEWISE = frozenset({"l1", "l2"})


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


def scores(name: str, weight: Tensor, score: str | Score | Scores) -> Tensor:
    """The scores of `weight`, by name, by function or given -> finite non-negative floats, its shape and device.

    Raises InputError where a function answers with anything else, and where given scores do not fit.
    """
    with torch.no_grad():
        if isinstance(score, Scores):
            found = score.of(name, weight).abs() if score.signed else score.of(name, weight)
        else:
            found = (SCORES[score] if isinstance(score, str) else score)(weight)
    where = _where(name, weight)
    what = f"cannot use the scores of {score_name(score)}"
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
