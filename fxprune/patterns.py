"""Sparsity patterns: what leaves a weight, and how much of it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from .errors import PlanError
from .score import SCORES, Scores, score_name
from .unit_score import UNIT_SCORES

_UNITS = {
    "outer": "the outermost whole thing: a head, a KV group, a conv channel",
    "inner": "the innermost: head width",
    "mixed": "an axis over which a statistic runs: the residual width under a layer norm",
}
_REDUCTIONS = ("sum", "mean", "max")
# The scores that use Channels.norm: the second where a group has no batch-norm.
_NORMED = ("norm", "bn_scale")


@dataclass(frozen=True)
class Unstructured:
    """Mask the elements with the smallest scores.

    `amount` is a fraction of the whole weight (float, 0.0 to 1.0) or a number of elements (int): 1.0 is
    everything, 1 is one element. Elements that are masked already are the first to count towards it. `score` is

    "l1", "l2"  the magnitude, in which zeros count first; one number's L2 norm is its L1 norm, so the two are one
    "random"    drawn anew for each selection from torch's generator: torch.manual_seed decides
    "lamp"      the square over the sum of those not smaller, for scope="global"
    a function  from the weight to finite non-negative scores of the same shape
    Scores      computed beforehand, such as those of `fxprune.gradient_score`: taylor, snip, fisher

    `fxprune.score` has the formulas and papers. All but "l1" and "l2" hold the scores of all pooled weights at once.
    """

    amount: int | float
    score: str | Callable[[Tensor], Tensor] | Scores = "l1"

    kind: ClassVar[str] = "unstructured"

    def __post_init__(self) -> None:
        object.__setattr__(self, "amount", _amount(self.amount, "Unstructured", "to 1.0", "elements"))
        _check_score(self.score, "Unstructured", SCORES)

    def count(self, size: int) -> int:
        """How many of `size` elements to mask: fractions round half to even, as in torch.nn.utils.prune."""
        return self.amount if isinstance(self.amount, int) else round(self.amount * size)

    def describe(self) -> str:
        """The amount and score in words."""
        amount = f"{self.amount} elements" if isinstance(self.amount, int) else f"{100 * self.amount:g}%"
        return f"{amount} by {score_name(self.score)}"


@dataclass(frozen=True)
class Existing:
    """Keep the mask that a weight already has, or, where it has none, its exact zeros as the mask."""

    kind: ClassVar[str] = "existing"

    def describe(self) -> str:
        """What is kept, in words."""
        return "the masks or zeros already there"


@dataclass(frozen=True)
class Channels:
    """Take whole units (channels, heads, KV groups) out of every group that the bound weights lie in.

    amount    fraction of a group's units to remove (float, 0.0 to below 1.0), or their number (int)
    norm      p of the Lp norm that scores a unit over all members of its group: positive, or inf
    dim       the dimension of the bound weights whose units leave; None: the output dimension of the op that
              reads the weight
    unit      "outer" (a head, a KV group, a conv channel), "inner" (head width) or "mixed" (an axis over
              which a statistic runs, such as the residual width under a layer norm)
    reduce    how the members of a group add up to one score: "sum", "mean" or "max"
    align     the kept width is a multiple of this where the group is large enough
    min_keep  units that stay in each group whatever the amount
    score     what the units of a group are worth; those worth least leave:
                "norm"      the Lp norm of their slices
                "random"    drawn anew for each selection from torch's generator: torch.manual_seed decides
                "bn_scale"  |gamma| of the batch-norms over the group (network slimming); a group without any is
                            scored by its norm, and a note says so
                "fpgm"      the sum of the Euclidean distances to the other units
                "lamp"      the squared L2 norm over the sum of those not smaller, for scope="global"
                a function  from a parameter to finite non-negative scores of its elements, which add up
                Scores      of all parameters' elements, computed beforehand, which add up: `fxprune.gradient_score`

    `fxprune.unit_score` has the formulas and papers. Where groups are pooled, norms and distances are taken over their
    group's mean, since a group's width and scale decide them; all other scores are compared as they are.
    """

    amount: int | float
    norm: float = 2.0
    dim: int | None = None
    unit: str = "outer"
    reduce: str = "sum"
    align: int = 8
    min_keep: int = 1
    score: str | Callable[[Tensor], Tensor] | Scores = "norm"

    kind: ClassVar[str] = "channels"

    def __post_init__(self) -> None:
        amount = _amount(self.amount, "Channels", "to below 1.0", "units")
        object.__setattr__(self, "min_keep", _at_least_one(self.min_keep, "min_keep"))
        if isinstance(amount, float) and amount == 1.0:
            raise PlanError(
                f"cannot use amount {self.amount!r}",
                where="Channels(amount=...)",
                why=f"it asks for all, and a group keeps at least min_keep={self.min_keep} of its units",
                do='Ask for less than 1.0. A whole residual block leaves with Drop("its module path").',
            )
        object.__setattr__(self, "amount", amount)
        object.__setattr__(self, "norm", _norm(self.norm))
        _check_score(self.score, "Channels", UNIT_SCORES)
        if self.norm != 2.0 and self.score not in _NORMED:
            raise PlanError(
                f"cannot use norm {self.norm:g}",
                where=f"Channels(score={score_name(self.score)}, norm=...)",
                why="this score takes no norm of the units",
                do='Leave norm= out, or score by score="norm".',
            )
        if self.dim is not None:
            object.__setattr__(self, "dim", _dim(self.dim))
        if self.unit not in tuple(_UNITS):
            raise PlanError(
                f"unknown unit {self.unit!r}",
                where="Channels(unit=...)",
                why="there are: " + "; ".join(f'"{unit}" ({words})' for unit, words in _UNITS.items()),
                do="Use one of these.",
            )
        if self.reduce not in _REDUCTIONS:
            raise PlanError(
                f"unknown reduction {self.reduce!r}",
                where="Channels(reduce=...)",
                why=f"the members of a group add up by {', '.join(_REDUCTIONS)}",
                do="Use one of these.",
            )
        object.__setattr__(self, "align", _at_least_one(self.align, "align"))

    def count(self, size: int) -> int:
        """How many of `size` units to remove before alignment: fractions round half to even, as in torch.

        A number (int) is answered as it stands, also where it is `size` or more.
        """
        return self.amount if isinstance(self.amount, int) else round(self.amount * size)

    def keep_count(self, size: int, multiple: int = 1) -> int:
        """How many of `size` units stay: what `count` leaves, at the nearest `multiple`, ties up.

        `multiple` is `align` in units (align over the width of one unit, at least 1). Neither `min_keep` nor
        one `multiple` is ever undercut, and `size` is never exceeded: where the nearest multiple lies above
        it, all stay. A group smaller than `multiple` cannot be aligned, so there only `min_keep` binds. With
        nothing to remove everything stays, aligned or not.
        """
        removed = self.count(size)
        if removed == 0:
            return size
        if size < multiple:
            multiple = 1
        nearest = (2 * (size - removed) + multiple) // (2 * multiple) * multiple
        least = -(-self.min_keep // multiple) * multiple  # rounded up, so one multiple at the least
        return min(size, max(nearest, least))

    def describe(self) -> str:
        """The amount and score in words, then each setting that is not its default."""
        if isinstance(self.amount, int):
            amount = f"{self.amount} channel{'' if self.amount == 1 else 's'}"
        else:
            amount = f"{100 * self.amount:g}% of channels"
        settings = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        del settings["amount"], settings["score"]
        score = score_name(self.score)
        if score == "norm":
            del settings["norm"]
            score = f"L{self.norm:g} norm"
        words = [f"{name} {value}" for name, (value, default) in settings.items() if value != default]
        return ", ".join([f"{amount} by {score}", *words])


Sparsity = Unstructured | Existing | Channels
SPARSITIES: dict[str, type[Sparsity]] = {kind.kind: kind for kind in (Unstructured, Existing, Channels)}


def _check_score(score: object, pattern: str, names: Collection[str]) -> None:
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


def _amount(amount: object, pattern: str, end: str, units: str) -> int | float:
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


def _norm(norm: object) -> float:
    def refuse(why: str) -> PlanError:
        do = "Give 1, 2, any other positive p, or math.inf."
        return PlanError(f"cannot use norm {norm!r}", where="Channels(norm=...)", why=why, do=do)

    if isinstance(norm, bool) or not isinstance(norm, numbers.Real):
        raise refuse(f"it is a {type(norm).__name__}, not a number")
    try:
        p = float(norm)
    except OverflowError as error:
        raise refuse("no float is that large") from error
    if not p > 0.0:
        raise refuse("it is not a number" if math.isnan(p) else "it is not positive")
    return p


def _dim(dim: object) -> int:
    if isinstance(dim, bool) or not isinstance(dim, numbers.Integral):
        raise PlanError(
            f"cannot use dim {dim!r}",
            where="Channels(dim=...)",
            why=f"it is a {type(dim).__name__}, not a whole number",
            do="Give a dimension of the weight, such as 0 or -1, or None for the output dimension.",
        )
    return int(dim)


def _at_least_one(value: object, name: str) -> int:
    def refuse(why: str) -> PlanError:
        do = "Give a whole number, 1 or more."
        return PlanError(f"cannot use {name} {value!r}", where=f"Channels({name}=...)", why=why, do=do)

    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise refuse(f"it is a {type(value).__name__}, not a whole number")
    if value < 1:
        raise refuse("it is less than 1")
    return int(value)
