"""What this CPU can do at most, measured: multiply-adds from registers, and reads from memory.

A kernel is told by the fraction of these that it reaches: of the first where it computes, of the second where it
waits for weights.
"""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fxprune.errors import BuildError
from fxprune.kernels.native.build import compiler

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC")
ROUNDS = 1 << 22
# More than any cache holds.
FLOATS = 1 << 28
REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Peak:
    """Floating-point operations a second (a multiply-add is two), and bytes read a second, of all threads."""

    flops: float
    bandwidth: float


def measure_peaks(threads: list[int], *, rounds: int = ROUNDS, floats: int = FLOATS) -> dict[int, Peak]:
    """The best of a few repeats, for each number of threads; empty where there is no C++ compiler."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "peak.so"
        try:
            subprocess.run([*compiler(), *FLAGS, "-o", str(file), str(SOURCE)], check=True, capture_output=True)
        except (BuildError, OSError, subprocess.CalledProcessError):
            return {}
        library = ctypes.CDLL(str(file))
    library.multiply_add.argtypes = [ctypes.c_size_t]
    library.read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.multiply_add.restype = library.read.restype = ctypes.c_float
    data = torch.ones(floats)
    found = {}
    for number in threads:
        part = floats // number // 64 * 64
        starts = [data.data_ptr() + 4 * part * index for index in range(number)]
        computing = _best([partial(library.multiply_add, rounds)] * number)
        reading = _best([partial(library.read, start, part) for start in starts])
        found[number] = Peak(number * rounds * library.operations() / computing, 4 * number * part / reading)
    return found


def _best(works: list[Callable[[], object]]) -> float:
    """Seconds until all are done, each in a thread of its own; ctypes lets go of Python's lock."""
    best = float("inf")
    for _ in range(REPEATS):
        threads = [threading.Thread(target=work) for work in works[1:]]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        works[0]()
        for thread in threads:
            thread.join()
        best = min(best, time.perf_counter() - start)
    return best
