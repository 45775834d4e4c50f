"""The values that sparsity patterns are given: each is answered as a plain number, or refused in words."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection

from fxprune.errors import PlanError

from .scores import Scores


def check_score(score: object, pattern: str, names: Collection[str]) -> None:
    """Raise PlanError unless `score` is one of `names`, a function or Scores."""
    do = f"Name one of {', '.join(names)}, or give a function Tensor -> Tensor or Scores."
    where = f"{pattern}(score=...)"
    if isinstance(score, str) and score not in names:
        why = f"there are: {', '.join(names)}"
        if score in ("taylor", "snip", "fisher"):
            why = "it needs data"
            do = f"Compute it: score=fxprune.gradient_score.{score}(model, batches, loss)."
        raise PlanError(f'no score is named "{score}"', where=where, why=why, do=do)
    if not isinstance(score, (str, Scores)) and not callable(score):
        why = f"{type(score).__name__} is neither a name nor a function nor Scores"
        raise PlanError("cannot use this score", where=where, why=why, do=do)


def read_amount(amount: object, pattern: str, end: str, units: str) -> int | float:
    """A fraction from 0.0 to 1.0, or a number of units. Raises PlanError for anything else."""

    def refuse(why: str) -> PlanError:
        do = f"Give a fraction from 0.0 {end}, or a whole number of {units}."
        return PlanError(f"cannot use amount {amount!r}", where=f"{pattern}(amount=...)", why=why, do=do)

    if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
        raise refuse(f"it is a {type(amount).__name__}, not a number")
    if isinstance(amount, numbers.Integral):
        if amount < 0:
            raise refuse("it is negative")
        return int(amount)
    fraction = float(amount)
    if math.isnan(fraction):
        raise refuse("it is not a number")
    if not 0.0 <= fraction <= 1.0:
        raise refuse("it is negative" if fraction < 0 else "a fraction ends at 1.0")
    return fraction


def read_norm(norm: object, pattern: str) -> float:
    """p of an Lp norm: positive, or infinity. Raises PlanError for anything else."""

    def refuse(why: str) -> PlanError:
        do = "Give 1, 2, any other positive p, or math.inf."
        return PlanError(f"cannot use norm {norm!r}", where=f"{pattern}(norm=...)", why=why, do=do)

    if isinstance(norm, bool) or not isinstance(norm, numbers.Real):
        raise refuse(f"it is a {type(norm).__name__}, not a number")
    try:
        p = float(norm)
    except OverflowError as error:
        raise refuse("no float is that large") from error
    if not p > 0.0:
        raise refuse("it is not a number" if math.isnan(p) else "it is not positive")
    return p


def read_whole(value: object, where: str, what: str, least: int, most: int | None = None) -> int:
    """A whole number of `least` or more, and of `most` or less if that is given. Raises PlanError for anything else."""

    def refuse(why: str) -> PlanError:
        do = f"Give a whole number, {least} or more." if most is None else f"Give a whole number, {least} to {most}."
        return PlanError(f"cannot use {what} {value!r}", where=where, why=why, do=do)

    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise refuse(f"it is a {type(value).__name__}, not a whole number")
    number = int(value)
    if number < least:
        raise refuse(f"it is less than {least}")
    if most is not None and number > most:
        raise refuse(f"it is more than {most}")
    return number


def read_switch(value: object, where: str, what: str) -> bool:
    """True or False. Raises PlanError for anything else, such as a number."""
    if not isinstance(value, bool):
        why = f"it is a {type(value).__name__}, and neither True nor False"
        raise PlanError(f"cannot use {what} {value!r}", where=where, why=why, do="Give True or False.")
    return value
