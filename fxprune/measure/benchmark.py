"""benchmark: two models side by side, interleaved, against the best that torch offers for the first."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from fxprune.errors import InputError
from fxprune.graph import compat
from fxprune.graph.environment import words_of

from .device import device_name, device_of
from .race import fastest
from .timing import Samples, interleave
from .ways import has_half, in_bfloat16, ways_of


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a benchmark: which way of running it was fastest, and seconds per call in a loop.

    `cold` are seconds per call right after the other side's, when the caches hold what that left.
    """

    name: str
    way: str
    samples: tuple[float, ...]
    cold: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, seconds per call."""
        ordered = sorted(self.samples)
        return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Two sides, and how many times faster b is than a: the ratio of medians with its 95% bootstrap interval.

    `cold_ratio` is the same for calls after the other side's. `half` is a dense in bfloat16, where the device has units
    for it and a is a model in float32. `failed` tells which ways did not run ("a, torch.compile"), and why.
    """

    a: Side
    b: Side
    ratio: float
    ratio_low: float
    ratio_high: float
    threads: int
    device: str
    half: Side | None = None
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def cold_ratio(self) -> float:
        """How many times faster b is than a with cold caches."""
        return median(self.a.cold) / median(self.b.cold)

    def __str__(self) -> str:
        rows = []
        for label, side in (("a", self.a), ("b", self.b), ("a, bfloat16", self.half)):
            if side is not None:
                low, high = (1e3 * q for q in side.quartiles)
                cold = f"{1e3 * median(side.cold):.3f}"
                rows.append((label, side.name, side.way, f"{1e3 * side.median:.3f}", f"{low:.3f} - {high:.3f}", cold))
        headers = ("", "model", "way", "median ms", "quartiles ms", "cold ms")
        table = tabulate(rows, headers=headers, disable_numparse=True)
        interval = f"95% interval {self.ratio_low:.2f} - {self.ratio_high:.2f}"
        differs = not 1 / 1.1 < self.cold_ratio / self.ratio < 1.1
        cold = f"; {self.cold_ratio:.2f}x with cold caches" if differs else ""
        rounds = len(self.a.samples)
        failed = "".join(f"\ndid not run: {way}: {why}" for way, why in self.failed.items())
        return (
            f"{table}\nb is {self.ratio:.2f}x as fast as a ({interval}{cold}; {rounds} interleaved rounds, "
            f"{self.threads} threads, {self.device}){failed}"
        )


def benchmark(
    a: nn.Module | Callable[..., Any],
    b: nn.Module | Callable[..., Any],
    inputs: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    threads: int | None = None,
    seconds: float = 3.0,
    rounds: int | None = None,
    progress: bool = True,
) -> Benchmark:
    """Times `a(*inputs, **kwargs)` against `b(*inputs, **kwargs)` under no_grad, round by round in turn.

    An nn.Module that is not compiled is run in the best of its ways: eager, torch.compile, torch.compile with freezing,
    with images also in channels_last; with inputs on CUDA also in torch.compile's modes "reduce-overhead" and
    "max-autotune", which record CUDA graphs; so a dense model always shows its best. There calls are timed between
    events, with a cold L2 cache. `threads` sets torch's threads for the run (and puts them back); `seconds` is the time
    of measuring, `rounds` fixes the number of rounds instead. How calls are timed: `measure/timing.py`.
    """
    if isinstance(inputs, torch.Tensor):
        raise InputError("cannot read the inputs", why="they are one tensor", do="Pass a tuple: (x,).")
    kwargs = dict(kwargs or {})
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad(), compat.many_compilations():
            device = device_of(inputs, kwargs)
            bar = tqdm(desc="benchmark", total=None, disable=None if progress else True, leave=False)
            best = [fastest(ways_of(side, inputs, kwargs, device), device, bar.set_postfix_str) for side in (a, b)]
            bar.set_postfix_str("")
            calls, names = [each.call for each in best], [each.name for each in best]
            sides = [a, b]
            is_dense = len(ways_of(a, inputs, kwargs, device)) > 1
            failed = {f"{side}, {way}": why for side, each in zip("ab", best) for way, why in each.failed.items()}
            if is_dense and has_half(a, device):
                try:
                    half = in_bfloat16(cast(nn.Module, a), inputs, kwargs)
                    calls, names, sides = [*calls, half], [*names, "torch.compile, frozen"], [a, b, a]
                # Whatever a model raises that does not take another precision.
                except Exception as error:
                    failed["a, bfloat16"] = words_of(error)
            samples = interleave(
                calls,
                device,
                seconds=seconds,
                min_rounds=rounds or 9,
                max_rounds=rounds or 1000,
                on_round=lambda: (bar.update(), None)[1],
            )
            bar.close()
        ratio, low, high = _ratio(samples[0].warm, samples[1].warm)
        found = [_side(*each) for each in zip(sides, names, samples, strict=True)]
        where, count = device_name(inputs, kwargs), torch.get_num_threads()
        half = found[2] if len(found) > 2 else None
        return Benchmark(found[0], found[1], ratio, low, high, count, where, half, failed)
    finally:
        torch.set_num_threads(before)


def _side(model: Any, way: str, samples: Samples) -> Side:
    return Side(_name(model), way, tuple(samples.warm), tuple(samples.cold))


def _ratio(a: Sequence[float], b: Sequence[float], draws: int = 500) -> tuple[float, float, float]:
    """Ratio of medians a / b with its 95% percentile bootstrap interval (rounds drawn with replacement, seeded)."""
    generator = random.Random(0)
    ratios = []
    for _ in range(draws):
        picks = [generator.randrange(len(a)) for _ in a]
        ratios.append(median([a[i] for i in picks]) / median([b[i] for i in picks]))
    ratios.sort()
    return median(a) / median(b), ratios[int(0.025 * draws)], ratios[int(0.975 * draws)]


def _name(model: Any) -> str:
    return getattr(model, "__name__", None) or type(getattr(model, "_orig_mod", model)).__name__
