"""Interleaved timing: the primitive under the chooser and the benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def interleave(
    functions: Sequence[Callable[[], Any]],
    *,
    seconds: float = 0.2,
    min_rounds: int = 5,
    max_rounds: int = 200,
    on_round: Callable[[], None] | None = None,
) -> list[list[float]]:
    """Times the functions in turn, round by round, so that drift of the machine hits all alike.

    Returns one list of seconds per function. Rounds end after `seconds` in all, but not before `min_rounds`; functions
    far below the clock's resolution are repeated inside a round.
    """
    repeats = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        repeats.append(max(1, min(100, int(5e-5 / max(time.perf_counter() - start, 1e-9)))))
    samples: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < end):
        for function, repeat, into in zip(functions, repeats, samples, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            into.append((time.perf_counter() - start) / repeat)
        rounds += 1
        if on_round is not None:
            on_round()
    return samples


def undisturbed(samples: Sequence[float]) -> float:
    """The fastest sample: what a choice between kernels rests on, since other work on the machine only adds time."""
    return min(samples)


def median(samples: Sequence[float]) -> float:
    """Median in the samples' unit."""
    return statistics.median(samples)
