"""Interleaved timing: the primitive under the chooser and the benchmark."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Reads of twice the L2 cache before each call on a GPU; one takes some 30 us.
_SPOILS = 6
_Timer = Callable[[Callable[[], Any]], float]


def interleave(
    functions: Sequence[Callable[[], Any]],
    device: torch.device | None = None,
    *,
    seconds: float = 0.2,
    min_rounds: int = 5,
    max_rounds: int = 200,
    on_round: Callable[[], None] | None = None,
) -> list[list[float]]:
    """Times the functions in turn, round by round, so that drift of the machine hits all alike.

    Returns one list of seconds per function. Rounds end after `seconds` in all, but not before `min_rounds`. What runs
    on the CPU (no `device`) and is far below the clock's resolution is repeated inside a round; what runs on a GPU is
    timed between events there, once a round and with nothing of it left in the L2 cache, for between two calls of a
    layer a model reads more than that holds.
    """
    if device is None or device.type != "cuda":
        return _rounds(functions, [_by_clock(f) for f in functions], seconds, min_rounds, max_rounds, on_round)
    with torch.cuda.device(device):
        for function in functions:
            function()
        timers = [_by_events(device)] * len(functions)
        return _rounds(functions, timers, seconds, min_rounds, max_rounds, on_round)


def interleave_graphs(
    functions: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float = 0.2,
    min_rounds: int = 10,
    max_rounds: int = 200,
) -> list[list[float]]:
    """`interleave` on a GPU with each function as a CUDA graph, which has no launches to wait for.

    Raises RuntimeError where a function cannot be captured.
    """
    with torch.cuda.device(device):
        graphs = [_captured(function, device) for function in functions]
    replays = [graph.replay for graph in graphs]
    return interleave(replays, device, seconds=seconds, min_rounds=min_rounds, max_rounds=max_rounds)


def _rounds(
    functions: Sequence[Callable[[], Any]],
    timers: Sequence[_Timer],
    seconds: float,
    min_rounds: int,
    max_rounds: int,
    on_round: Callable[[], None] | None,
) -> list[list[float]]:
    samples: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < end):
        for function, timer, into in zip(functions, timers, samples, strict=True):
            into.append(timer(function))
        rounds += 1
        if on_round is not None:
            on_round()
    return samples


def _by_clock(function: Callable[[], Any]) -> _Timer:
    """Seconds of a call of `function` on the CPU, which is called twice to see how often it is to be repeated."""
    function()
    start = time.perf_counter()
    function()
    repeats = max(1, min(100, int(5e-5 / max(time.perf_counter() - start, 1e-9))))

    def timer(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    return timer


def _by_events(device: torch.device) -> _Timer:
    """Seconds of a call on a GPU, from when the device is ready for it until it has done it."""
    spoil = torch.zeros(max(_cache_bytes(device), 1 << 20) // 2, dtype=torch.float32, device=device)

    def timer(function: Callable[[], Any]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Read, so that the cache holds nothing that it would have to write back meanwhile; and so often that the device
        # is busy until the host has prepared the call, as it is in a loop of calls.
        for _ in range(_SPOILS):
            spoil.sum()
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

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


def undisturbed(samples: Sequence[float]) -> float:
    """The fastest sample: what a choice between kernels rests on, since other work on the machine only adds time."""
    return min(samples)


@dataclasses.dataclass
class ModelTiming:
    """Seconds of the whole model dense (torch.compile, frozen) and as emitted: the fastest of interleaved runs."""

    dense: float
    pruned: float
    threads: int
    device: str

    @property
    def ratio(self) -> float:
        """How many times faster the result is."""
        return self.dense / self.pruned
