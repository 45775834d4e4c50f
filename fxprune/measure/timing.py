"""Interleaved timing: one method for the chooser of layouts, the choice of a result, its report and the benchmark.

Functions are called in turn, round by round, so that drift of the machine hits all alike, and each twice over: once
when the others have just run, with cold caches, and then again and again, as a loop calls a model, with caches as warm
as the function leaves them. A model is called in a loop, so warm times decide; cold ones are told where they differ.
What is compared are medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

# Reads of twice the L2 cache before each call on a GPU; one takes some 30 us.
_SPOILS = 6
# Seconds of a round in which a function is called again and again.
_LOOP = 1e-3
# Where nobody else wants its core, the thread that measures runs for as much of the time as this.
_QUIET = 0.95
# By how much a median may be above the least of its samples where they agree.
_AGREE = 1.3


class Samples(NamedTuple):
    """Seconds of a call, round by round, with caches warm and cold."""

    warm: list[float]
    cold: list[float]

    @property
    def typical(self) -> float:
        """The median of a call in a loop."""
        return median(self.warm)

    @property
    def alone(self) -> float:
        """The median of a call after others."""
        return median(self.cold)

    def beats(self, other: Samples) -> bool:
        """Whether it was faster in three of four rounds, and so is by more than chance."""
        wins = sum(ours < theirs for ours, theirs in zip(self.warm, other.warm, strict=True))
        return 4 * wins >= 3 * len(self.warm)


_Timer = Callable[[Callable[[], Any]], tuple[float, float]]


def interleave(
    functions: Sequence[Callable[[], Any]],
    device: torch.device | None = None,
    *,
    seconds: float = 0.2,
    min_rounds: int = 5,
    max_rounds: int = 200,
    on_round: Callable[[], None] | None = None,
) -> list[Samples]:
    """Times the functions in turn; rounds end after `seconds` in all, but not before `min_rounds`.

    What runs on the CPU (no `device`) and takes less than a millisecond is repeated inside a round. What runs on a GPU
    is timed between events there, once a round and with nothing of it left in the L2 cache, for between two calls
    of a layer a model reads more than that holds: its warm and cold times are the same.
    """
    if device is None or device.type != "cuda":
        timers = [_by_clock(function, time.perf_counter) for function in functions]
        return _rounds(functions, timers, seconds, min_rounds, max_rounds, on_round)
    with torch.cuda.device(device):
        for function in functions:
            function()
        timers = [_by_events(device)] * len(functions)
        return _rounds(functions, timers, seconds, min_rounds, max_rounds, on_round)


def interleave_steady(functions: Sequence[Callable[[], Any]], *, seconds: float = 0.2) -> tuple[list[Samples], bool]:
    """Times what runs on the CPU so that ratios hold on a busy machine too; and whether the figures are worth keeping.

    Where others want the cores, threads wait for those that do not run, and whatever takes longer than a slice of time
    is interrupted: ratios of medians are then off by any factor. How much of the time the calling thread ran tells. If
    it was too little, all is timed once more on one thread, by the time that this thread ran, and of each function the
    least stands for all. What was measured so, or whose samples disagree, is not worth keeping.
    """
    start, ran = time.perf_counter(), time.thread_time()
    found = interleave(functions, seconds=seconds)
    if time.thread_time() - ran >= _QUIET * (time.perf_counter() - start):
        return found, all(samples.typical <= _AGREE * min(samples.warm) for samples in found)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timers = [_by_clock(function, time.thread_time) for function in functions]
        found = _rounds(functions, timers, seconds, 5, 200, None)
    finally:
        torch.set_num_threads(threads)
    return [Samples([min(samples.warm)], [min(samples.cold)]) for samples in found], False


def interleave_graphs(
    functions: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float = 0.2,
    min_rounds: int = 10,
    max_rounds: int = 200,
) -> list[list[float]]:
    """Seconds of each function as a CUDA graph on a GPU, round by round; a graph has no launches to wait for.

    Raises RuntimeError where a function cannot be captured.
    """
    with torch.cuda.device(device):
        graphs = [_captured(function, device) for function in functions]
    replays = [graph.replay for graph in graphs]
    found = interleave(replays, device, seconds=seconds, min_rounds=min_rounds, max_rounds=max_rounds)
    return [samples.warm for samples in found]


def _rounds(
    functions: Sequence[Callable[[], Any]],
    timers: Sequence[_Timer],
    seconds: float,
    min_rounds: int,
    max_rounds: int,
    on_round: Callable[[], None] | None,
) -> list[Samples]:
    found = [Samples([], []) for _ in functions]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < end):
        for function, timer, samples in zip(functions, timers, found, strict=True):
            cold, warm = timer(function)
            samples.cold.append(cold)
            samples.warm.append(warm)
        rounds += 1
        if on_round is not None:
            on_round()
    return found


def _by_clock(function: Callable[[], Any], clock: Callable[[], float]) -> _Timer:
    """Seconds of a call of `function` on the CPU, which is called twice to see how often it is to be repeated."""
    function()
    start = clock()
    function()
    repeats = max(1, min(100, int(_LOOP / max(clock() - start, 1e-9))))

    def timer(function: Callable[[], Any]) -> tuple[float, float]:
        start = clock()
        function()
        _wait()
        between = clock()
        for _ in range(repeats):
            function()
        _wait()
        return between - start, (clock() - between) / repeats

    return timer


def _wait() -> None:
    """Until a GPU that a function uses, though none of its inputs is there, has done its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _by_events(device: torch.device) -> _Timer:
    """Seconds of a call on a GPU, from when the device is ready for it until it has done it."""
    spoil = torch.zeros(max(_cache_bytes(device), 1 << 20) // 2, dtype=torch.float32, device=device)

    def timer(function: Callable[[], Any]) -> tuple[float, float]:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Read, so that the cache holds nothing that it would have to write back meanwhile; and so often that the device
        # is busy until the host has prepared the call, as it is in a loop of calls.
        for _ in range(_SPOILS):
            spoil.sum()
        start.record()
        function()
        stop.record()
        stop.synchronize()
        seconds = start.elapsed_time(stop) / 1e3
        return seconds, seconds

    return timer


def _captured(function: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
    """A function's kernels as a graph; it runs three times before, so that what is compiled or allocated once is."""
    before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
    finally:
        # A capture that fails leaves its stream as the current one.
        torch.cuda.set_stream(before)
    return graph


def _cache_bytes(device: torch.device) -> int:
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 50 << 20
