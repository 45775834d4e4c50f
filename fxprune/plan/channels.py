"""The sparsity pattern that takes whole channels, heads and other units out of a model."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from fxprune.errors import PlanError

from .scores import UNIT_SCORE_NAMES, Scores, score_name
from .values import check_score, read_amount, read_norm, read_switch, read_whole

_UNITS = {
    "outer": "the outermost whole thing: a head, a KV group, a conv channel",
    "inner": "the innermost: head width",
    "mixed": "an axis over which a statistic runs: the residual width under a layer norm",
}
_REDUCTIONS = ("sum", "mean", "max")
# The scores that use Channels.norm: the second where a group has no batch-norm.
_NORMED = ("norm", "bn_scale")


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
    uniform   whether all groups of one size and one set of shapes keep the same number, as configs that have one width
              for all layers ask: a pool then decides between shapes, and what it leaves each is spread evenly

    `fxprune.select.unit_score` has the formulas and papers. Where groups are pooled, norms and distances are taken
    over their group's mean, since a group's width and scale decide them; all other scores are compared as they are.
    """

    amount: int | float
    norm: float = 2.0
    dim: int | None = None
    unit: str = "outer"
    reduce: str = "sum"
    align: int = 8
    min_keep: int = 1
    score: str | Callable[[Tensor], Tensor] | Scores = "norm"
    uniform: bool = False

    kind: ClassVar[str] = "channels"

    def __post_init__(self) -> None:
        amount = read_amount(self.amount, "Channels", "to below 1.0", "units")
        object.__setattr__(self, "min_keep", read_whole(self.min_keep, "Channels(min_keep=...)", "min_keep", 1))
        if isinstance(amount, float) and amount == 1.0:
            raise PlanError(
                f"cannot use amount {self.amount!r}",
                where="Channels(amount=...)",
                why=f"it asks for all, and a group keeps at least min_keep={self.min_keep} of its units",
                do='Ask for less than 1.0. A whole residual block leaves with Drop("its module path").',
            )
        object.__setattr__(self, "amount", amount)
        object.__setattr__(self, "norm", read_norm(self.norm, "Channels"))
        check_score(self.score, "Channels", UNIT_SCORE_NAMES)
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
        object.__setattr__(self, "align", read_whole(self.align, "Channels(align=...)", "align", 1))
        read_switch(self.uniform, "Channels(uniform=...)", "uniform")

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
        words = [
            name if value is True else f"{name} {value}"
            for name, (value, default) in settings.items()
            if value != default
        ]
        return ", ".join([f"{amount} by {score}", *words])


def _dim(dim: object) -> int:
    if isinstance(dim, bool) or not isinstance(dim, numbers.Integral):
        raise PlanError(
            f"cannot use dim {dim!r}",
            where="Channels(dim=...)",
            why=f"it is a {type(dim).__name__}, not a whole number",
            do="Give a dimension of the weight, such as 0 or -1, or None for the output dimension.",
        )
    return int(dim)
