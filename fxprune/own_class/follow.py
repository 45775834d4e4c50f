"""follow: finds which attributes must hold which sizes, so that a model of smaller tensors computes what it should."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from .attributes import Kind

MOST_TRIALS = 64

Choice = dict[Kind, "int | None"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial run ended: right, or how many modules had answered before it failed, in which one and why.

    A run that ends and differs got furthest of all; `off` is how far it is off.
    """

    right: bool
    reached: int = 0
    path: str | None = None
    why: str = ""
    off: float = 0.0

    def is_better_than(self, other: Outcome) -> bool:
        """Whether this run came nearer to the right answer."""
        return (self.right, self.reached, -self.off) > (other.right, other.reached, -other.off)


def follow(kinds: Sequence[Kind], run: Callable[[], Outcome], most: int = MOST_TRIALS) -> Outcome:
    """Sets the attributes so that `run` comes out right, within so many trials; returns the best outcome found.

    First all that are likely follow. Then one is changed at a time, those nearest to the failure first, and what comes
    further is kept; where no single change does, two are.
    """
    best: Choice = dict.fromkeys(kinds, 0)
    outcome, tried = _try(best, run), {_values(best)}
    while not outcome.right:
        better = None
        for change in _changes(best, _near_first(kinds, outcome.path)):
            choice = {**best, **change}
            if len(tried) >= most:
                break
            if (values := _values(choice)) in tried:
                continue
            tried.add(values)
            found = _try(choice, run)
            if found.is_better_than(outcome):
                better = choice, found
                break
        if better is None:
            break
        best, outcome = better
    _put(best)
    return outcome


def _try(choice: Choice, run: Callable[[], Outcome]) -> Outcome:
    try:
        _put(choice)
    except Exception as error:
        # Whatever keeps an attribute from being set (a property, a check of its class) rules this choice out.
        return Outcome(False, -1, None, f"{type(error).__name__}: {error}")
    return run()


def _values(choice: Choice) -> str:
    return repr([kind.values(number) for kind, number in choice.items()])


def _put(choice: Choice) -> None:
    # An item of a list is put into the list as it then is, so all go back first.
    for kind in choice:
        kind.put(None)
    for kind, number in choice.items():
        if number is not None:
            kind.put(number)


def _near_first(kinds: Sequence[Kind], path: str | None) -> list[Kind]:
    """The kinds by how near their places are to the module that failed: its own, then those around it, then others."""

    def distance(kind: Kind) -> int:
        if path is None:
            return 0
        around = [place.path for place in kind.places if f"{path}.".startswith(f"{place.path}." if place.path else "")]
        return min((path.count(".") - inner.count(".") + (not inner) for inner in around), default=len(path))

    return sorted(kinds, key=distance)


def _changes(best: Choice, kinds: Sequence[Kind]) -> Iterator[Choice]:
    """Changes to try: of one kind, then of two."""

    def others(kind: Kind) -> list[int | None]:
        numbers: list[int | None] = [*range(kind.most), None]
        return [number for number in numbers if number != best[kind]]

    for kind in kinds:
        for number in others(kind):
            yield {kind: number}
    for a, b in itertools.combinations(kinds, 2):
        for x, y in itertools.product(others(a), others(b)):
            yield {a: x, b: y}
