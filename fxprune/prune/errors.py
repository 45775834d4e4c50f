"""Errors of pruning: each is an FxPruneError and the built-in type that torch raises for the same mistake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fxprune.errors import FxPruneError, InputError


class WrongTypeError(FxPruneError, TypeError):
    """An argument of a type that cannot be used: an amount that is no number, a buffer given as a parameter."""


class WrongIndexError(FxPruneError, IndexError):
    """A dim that the weight does not have."""


class MissingError(FxPruneError, AttributeError):
    """A parameter, module or attribute that is not there."""


class WrongShapeError(FxPruneError, AssertionError):
    """Scores or a mask of another shape than the weight."""


class WrongScoresError(WrongShapeError, IndexError):
    """Scores of another shape than their weight in a pool, where torch fails to index them."""


class TwoHooksError(FxPruneError, AssertionError):
    """Two pruning hooks on one parameter, where one container belongs."""


class NameTakenError(FxPruneError, KeyError):
    """The names that pruning needs are in use."""

    __str__ = Exception.__str__  # KeyError would put the sentence in quotes


class WrongNormError(FxPruneError, RuntimeError):
    """An n that is no norm."""


class WrongMaskError(FxPruneError, RuntimeError):
    """A mask that cannot be multiplied into the weight."""


@contextmanager
def located(where: object) -> Iterator[None]:
    """Say `where` in errors of the body that do not know it, such as an amount's, which has no parameter yet."""
    try:
        yield
    except FxPruneError as error:
        if error.where:
            raise
        raise type(error)(error.what, where=str(where), why=error.why, do=error.do) from None


__all__ = [
    "InputError",
    "MissingError",
    "NameTakenError",
    "TwoHooksError",
    "WrongIndexError",
    "WrongMaskError",
    "WrongNormError",
    "WrongScoresError",
    "WrongShapeError",
    "WrongTypeError",
    "located",
]
