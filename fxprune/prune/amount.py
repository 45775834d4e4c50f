"""Amounts and dims, checked: the helpers of torch.nn.utils.prune under the names that its users import."""

from __future__ import annotations

import math
import numbers

from torch import Tensor

from .errors import InputError, WrongIndexError, WrongTypeError

_WHAT = "cannot prune this amount"
_AMOUNT = "Give a float from 0 to 1, the share of what remains, or an int, how many."


def _validate_pruning_amount_init(amount: object) -> None:
    """Raise a TypeError unless `amount` is a number, a ValueError for a negative int or a float outside [0, 1]."""
    if not isinstance(amount, numbers.Real):
        raise WrongTypeError(_WHAT, why=f"{amount!r} is a {type(amount).__name__}", do=_AMOUNT)
    if isinstance(amount, numbers.Integral):
        if amount < 0:
            raise InputError(_WHAT, why=f"{amount} is negative", do=_AMOUNT)
    elif math.isnan(amount) or not 0.0 <= float(amount) <= 1.0:
        raise InputError(_WHAT, why=f"the float {amount} is not between 0 and 1", do=_AMOUNT)


def _validate_pruning_amount(amount: float, tensor_size: int) -> None:
    """Raise a ValueError where `amount` is an int above `tensor_size`, what remains to be pruned."""
    if isinstance(amount, numbers.Integral) and amount > tensor_size:
        raise InputError(_WHAT, why=f"{amount} is more than the {tensor_size} that remain", do=_AMOUNT)


def _compute_nparams_toprune(amount: float, tensor_size: int) -> int:
    """How many of `tensor_size` go: an int as it is, a float as its share, half rounded to even."""
    return int(amount) if isinstance(amount, numbers.Integral) else round(amount * tensor_size)


def _validate_structured_pruning(t: Tensor) -> None:
    """Raise a ValueError where `t` has fewer than two dimensions, so no channels."""
    if t.dim() <= 1:
        raise InputError(
            "cannot prune channels",
            why=f"a tensor of shape {list(t.shape)} has none",
            do="Prune a weight of two or more dimensions, or its elements (l1_unstructured).",
        )


def _validate_pruning_dim(t: Tensor, dim: int) -> None:
    """Raise an IndexError unless `dim` is a dimension of `t`, counted from the front or (negative) from the back."""
    size = t.dim()
    if not isinstance(dim, numbers.Integral):
        why = f"dim={dim!r} is a {type(dim).__name__}, not an int"
        raise WrongTypeError("cannot prune channels", why=why, do=f"Give a dim from {-size} to {size - 1}.")
    if not -size <= dim < size:
        why = f"dim={dim} is not a dimension of a tensor of shape {list(t.shape)}"
        raise WrongIndexError("cannot prune channels", why=why, do=f"Give a dim from {-size} to {size - 1}.")


def to_prune(amount: float, size: int) -> int:
    """How many of `size` go; raises a ValueError where that is more than there are."""
    count = _compute_nparams_toprune(amount, size)
    _validate_pruning_amount(count, size)
    return count
