"""race: the fastest of several ways to do the same, two at a time, so that no more than two take memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from fxprune.graph import compat
from fxprune.graph.environment import words_of

from .timing import Samples, interleave
from .ways import Call, Maker

# How far apart two have to be for a first look to tell which is faster.
_CLEAR = 1.25


@dataclasses.dataclass
class Fastest:
    """The winner of a race: its name, the call, its seconds, and those of the others; what could not run says why."""

    name: str
    call: Call
    seconds: dict[str, float]
    failed: dict[str, str]


def duel(a: Call, b: Call, device: torch.device | None, *, seconds: float = 0.4) -> tuple[Samples, Samples]:
    """Two calls timed against each other: briefly where one is clearly faster, `seconds` long where it is close."""
    first, second = interleave([a, b], device, seconds=seconds / 8, min_rounds=3)
    if max(first.typical, second.typical) < _CLEAR * min(first.typical, second.typical):
        first, second = interleave([a, b], device, seconds=seconds, min_rounds=7)
    return first, second


def fastest(
    makers: Mapping[str, Maker], device: torch.device | None, on_way: Callable[[str], None] | None = None
) -> Fastest:
    """Makes and runs each way in turn, and keeps the one that is faster. The first one has to run.

    A way that fails is left out: without a compiler, or for a model that torch.compile refuses, eager is what is left.
    """
    best: Fastest | None = None
    with torch.no_grad(), compat.many_compilations():
        for name, make in makers.items():
            if on_way is not None:
                on_way(name)
            if best is None:
                best = Fastest(name, make(), {}, {})
                best.call()
                continue
            try:
                call = make()
                call()
            # Whatever a compiler raises; a model that runs eager has been run.
            except Exception as error:
                best.failed[name] = words_of(error)
                continue
            old, new = duel(best.call, call, device)
            best.seconds |= {best.name: old.typical, name: new.typical}
            if new.typical < old.typical:
                best.name, best.call = name, call
    assert best is not None, "a race needs somebody who runs"
    return best
