"""benchmark: two models side by side, interleaved, against the best that torch offers for the first."""

from __future__ import annotations

import dataclasses
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxprune.errors import InputError
from fxprune.graph import compat

from .timing import interleave

_GRAPH_MODES = ("reduce-overhead", "max-autotune")


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a benchmark: which way of running it was fastest, and seconds per call."""

    name: str
    way: str
    samples: tuple[float, ...]

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
    """Two sides, and how many times faster b is than a: the ratio of medians with its 95% bootstrap interval."""

    a: Side
    b: Side
    ratio: float
    ratio_low: float
    ratio_high: float
    threads: int
    device: str

    def __str__(self) -> str:
        rows = []
        for label, side in (("a", self.a), ("b", self.b)):
            low, high = (1e3 * q for q in side.quartiles)
            rows.append((label, side.name, side.way, f"{1e3 * side.median:.3f}", f"{low:.3f} - {high:.3f}"))
        table = tabulate(rows, headers=("", "model", "way", "median ms", "quartiles ms"), disable_numparse=True)
        interval = f"95% interval {self.ratio_low:.2f} - {self.ratio_high:.2f}"
        rounds = len(self.a.samples)
        return (
            f"{table}\nb is {self.ratio:.2f}x as fast as a ({interval}; {rounds} interleaved rounds, "
            f"{self.threads} threads, {self.device})"
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

    An nn.Module that is not compiled is run in the best of three ways: eager, torch.compile, torch.compile with
    freezing; with inputs on CUDA also in torch.compile's modes "reduce-overhead" and "max-autotune", which record CUDA
    graphs; so a dense model always shows its best. There calls are timed between events, with a cold L2 cache.
    `threads` sets torch's threads for the run (and puts them back); `seconds` is the time of measuring, `rounds` fixes
    the number of rounds instead.
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
            ways_a, ways_b = _ways(a, device), _ways(b, device)
            bar = tqdm(desc="benchmark", total=None, disable=None if progress else True, leave=False)
            best_a, way_a = _fastest(ways_a, inputs, kwargs, bar)
            best_b, way_b = _fastest(ways_b, inputs, kwargs, bar)
            for _ in range(3):
                best_a(*inputs, **kwargs)
                best_b(*inputs, **kwargs)
            samples = interleave(
                [lambda: best_a(*inputs, **kwargs), lambda: best_b(*inputs, **kwargs)],
                device,
                seconds=seconds,
                min_rounds=rounds or 9,
                max_rounds=rounds or 1000,
                on_round=lambda: (bar.update(), None)[1],
            )
            bar.close()
        ratio, low, high = _ratio(samples[0], samples[1])
        side_a = Side(_name(a), way_a, tuple(samples[0]))
        side_b = Side(_name(b), way_b, tuple(samples[1]))
        return Benchmark(side_a, side_b, ratio, low, high, torch.get_num_threads(), device_name(inputs, kwargs))
    finally:
        torch.set_num_threads(before)


def _ways(model: Any, device: torch.device | None) -> dict[str, Callable[..., Any]]:
    """How a model may be run: as it is if it is compiled or no module, else the ways a dense model has."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        return {"torch.compile": model}
    if not isinstance(model, nn.Module):
        return {"as given": model}
    if model._compiled_call_impl is not None:
        return {"compiled": model}
    if model.training:
        raise InputError("cannot measure a model in training mode", do="Call model.eval() first.")
    frozen = torch.compile(model, options={"freezing": True})
    ways = {"eager": model, "torch.compile": torch.compile(model), "torch.compile + freezing": frozen}
    if device is not None and device.type == "cuda":
        ways |= {f"torch.compile, {mode}": torch.compile(model, mode=mode) for mode in _GRAPH_MODES}
    return ways


def _fastest(
    ways: Mapping[str, Callable[..., Any]], inputs: Sequence[Any], kwargs: Mapping[str, Any], bar: Any
) -> tuple[Callable[..., Any], str]:
    if len(ways) == 1:
        return next((function, way) for way, function in ways.items())
    usable: dict[str, Callable[..., Any]] = {}
    for way, function in ways.items():
        bar.set_postfix_str(way)
        try:
            function(*inputs, **kwargs)
        except (TorchDynamoException, torch.OutOfMemoryError):
            # Without a compiler on the machine, or for a model that torch.compile refuses, eager is the baseline; a
            # CUDA graph needs memory of its own.
            continue
        usable[way] = function
    calls = [lambda f=f: f(*inputs, **kwargs) for f in usable.values()]
    device = device_of(inputs, kwargs)
    samples = interleave(calls, device, seconds=0.6, min_rounds=5, on_round=lambda: (bar.update(), None)[1])
    way = min(zip(usable, samples, strict=True), key=lambda pair: median(pair[1]))[0]
    bar.set_postfix_str("")
    return usable[way], way


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


def device_of(inputs: Any = (), kwargs: Any = None) -> torch.device | None:
    """The GPU that the first tensor on one is on; None for the CPU."""
    leaves = pytree.tree_leaves((inputs, kwargs))
    return next((t.device for t in leaves if isinstance(t, torch.Tensor) and t.device.type == "cuda"), None)


def device_name(inputs: Any = (), kwargs: Any = None) -> str:
    """The name of the device that the tensors are on."""
    device = device_of(inputs, kwargs)
    return cpu_name() if device is None else torch.cuda.get_device_name(device)


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
