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


def interleave_graphs(
    functions: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float = 0.2,
    min_rounds: int = 10,
    max_rounds: int = 200,
) -> list[list[float]]:
    """`interleave` on a GPU: each function as a CUDA graph, between events, nothing of it left in the L2 cache.

    A graph has no launches to wait for, as in the compiled model, and between two calls of a layer a model reads more
    than the cache holds. Raises RuntimeError where a function cannot be captured.
    """
    with torch.cuda.device(device):
        return _interleave_graphs(functions, device, seconds, min_rounds, max_rounds)


def _interleave_graphs(
    functions: Sequence[Callable[[], Any]], device: torch.device, seconds: float, min_rounds: int, max_rounds: int
) -> list[list[float]]:
    graphs = [_captured(function, device) for function in functions]
    spoil = torch.zeros(max(_cache_bytes(device), 1 << 20) // 2, dtype=torch.float32, device=device)
    samples: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < end):
        for graph, into in zip(graphs, samples, strict=True):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # Read last, so that the cache holds nothing that it would have to write back meanwhile.
            spoil.sum()
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            into.append(start.elapsed_time(stop) / 1e3)
        rounds += 1
    return samples


def _captured(function: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
    """A function's kernels as a graph; it runs three times before, so that what is compiled or allocated once is."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        function()
    return graph


def _cache_bytes(device: torch.device) -> int:
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 50 << 20


def undisturbed(samples: Sequence[float]) -> float:
    """The fastest sample: what a choice between kernels rests on, since other work on the machine only adds time."""
    return min(samples)


def median(samples: Sequence[float]) -> float:
    """Median in the samples' unit."""
    return statistics.median(samples)
