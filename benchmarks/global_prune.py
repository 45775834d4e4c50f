"""global_unstructured over many weights: torch's and fxprune's, side by side, in time and in peak memory.

    python -m benchmarks.global_prune [millions of elements, 200] [repeats, 3]

Each library prunes the same weights twice, half of what remains each time. Peak memory is taken in a process of its own
for each library and round; time in one process that lets the two take turns, where memory allows, on one thread. No
two magnitudes are equal, so that there is one right mask; ratios are printed only once the masks were found equal.
Figures go to benchmarks/results/global-prune-<machine>.json.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.nn.utils import prune as torch_prune

import fxprune.prune
from benchmarks.machine import describe_machine, slug

RESULTS = Path(__file__).resolve().parent / "results"
LIBRARIES: dict[str, ModuleType] = {"torch": torch_prune, "fxprune": fxprune.prune}
AMOUNT, ROUNDS, WIDTH, WEIGHTS = 0.5, 2, 2000, 8
# torch's own peak is 11.6 times the weights; two models stand side by side while they take turns.
TORCH_PEAK = 14
# Asked of the first round: times as fast as torch, and bytes beyond the state: one bit an element, and 64 MiB.
FASTER, EXTRA = 3.0, 64 << 20
COLUMNS = ("seconds", "faster", "peak", "extra", "held")


def build(elements: int) -> list[nn.Module]:
    """Weights [rows, 2000] of different sizes, `elements` in all, of either sign and no two of one magnitude."""
    bits = max(24, elements.bit_length())
    shares = torch.arange(1, WEIGHTS + 1)
    rows = (shares * elements // (WIDTH * int(shares.sum()))).clamp(min=1).tolist()
    layers, start = [], 0
    for count in rows:
        place = torch.arange(start, start + count * WIDTH)
        # An odd factor permutes the numbers below a power of two; they follow the bits of 2 ** -12 and up.
        pattern = (place * 2654435761 & ((1 << bits) - 1)) + (115 << 23)
        weight = pattern.to(torch.int32).view(torch.float32).view(count, WIDTH)
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.where(place.view(count, WIDTH) % 3 == 0, -weight, weight))
        layers.append(layer)
        start += count * WIDTH
    return layers


def prune(library: str, layers: list[nn.Module]) -> float:
    """One round; seconds."""
    lib = LIBRARIES[library]
    pairs = [(layer, "weight") for layer in layers]
    start = time.perf_counter()
    lib.global_unstructured(pairs, pruning_method=lib.L1Unstructured, amount=AMOUNT)
    return time.perf_counter() - start


def digest(layers: list[nn.Module]) -> str:
    """A digest of all masks."""
    found = hashlib.sha256()
    for layer in layers:
        mask: Any = layer.weight_mask
        found.update((mask == 1).numpy().tobytes())
    return found.hexdigest()


def status(field: str) -> int:
    """A figure of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def give_back() -> None:
    """Return what was freed to the system, which the allocator would else reuse unseen (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peaks(library: str, elements: int) -> dict[str, Any]:
    """In this process: each round's peak beyond what was there before it, over the weights, and the masks' digests."""
    prune(library, build(WIDTH))
    layers = build(elements)
    size = 4 * sum(layer.weight.numel() for layer in layers)  # pyright: ignore[reportCallIssue]
    rows = []
    for _ in range(ROUNDS):
        gc.collect()
        give_back()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = status("VmRSS")
        prune(library, layers)
        rows.append({"peak": (status("VmHWM") - before) / size, "held": (status("VmRSS") - before) / size})
        rows[-1]["masks"] = digest(layers)
    return {"weights_bytes": size, "rounds": rows}


def times(elements: int, repeats: int) -> dict[str, list[list[float]]]:
    """In this process: seconds of each round, library by library, which take turns `repeats` times."""
    found: dict[str, list[list[float]]] = {name: [[] for _ in range(ROUNDS)] for name in LIBRARIES}
    for repeat in range(repeats + 1):
        for name in LIBRARIES:
            layers = build(elements if repeat else WIDTH)
            for index in range(ROUNDS):
                seconds = prune(name, layers)
                if repeat:
                    found[name][index].append(seconds)
            del layers
            gc.collect()
    return found


def child(*arguments: str) -> Any:
    """What this module prints, as JSON, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.global_prune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=RESULTS.parent.parent)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def available() -> int:
    """Bytes of memory that a process may take now."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def main(millions: str = "200", repeats: str = "3") -> None:
    """Measure, compare the masks, print the table and write the figures."""
    elements = int(float(millions) * 1e6)
    if available() < TORCH_PEAK * 4 * elements:
        raise SystemExit(f"{millions} million elements need {TORCH_PEAK * 4 * elements / 1e9:.1f} GB of free memory")
    memory = {name: child("peaks", name, str(elements)) for name in LIBRARIES}
    digests = [[row.pop("masks") for row in memory[name]["rounds"]] for name in LIBRARIES]
    if digests[0] != digests[1]:
        raise SystemExit("the masks differ: no ratio means anything")
    print(f"masks equal, element by element, in both rounds: {digests[0][0][:12]}, {digests[0][1][:12]}")
    seconds = child("times", str(elements), repeats)
    rows = []
    for index in range(ROUNDS):
        both = zip(seconds["torch"][index], seconds["fxprune"][index], strict=True)
        ratio = statistics.median(a / b for a, b in both)
        for name in LIBRARIES:
            state = 2 if index == 0 else 0  # the float mask and the pruned copy, which a later round replaces
            rows.append(
                {
                    "round": index + 1,
                    "library": name,
                    "seconds": statistics.median(seconds[name][index]),
                    "faster": ratio if name == "fxprune" else 1.0,
                    "peak": memory[name]["rounds"][index]["peak"],
                    "extra": memory[name]["rounds"][index]["peak"] - state,
                    "held": memory[name]["rounds"][index]["held"],
                }
            )
    table = [(r["round"], r["library"], *(f"{r[key]:.2f}" for key in COLUMNS)) for r in rows]
    headers = ("round", "library", "seconds", "times as fast", "peak / weights", "beyond the state", "held / weights")
    print(tabulate(table, headers=headers, disable_numparse=True))
    first = rows[1]
    size = memory["torch"]["weights_bytes"]
    extra, allowed = first["extra"] * size, size / 32 + EXTRA
    met = first["faster"] >= FASTER and extra <= allowed
    words = f"{extra / 1e6:.0f} MB beyond the state, {allowed / 1e6:.0f} allowed"
    print(f"{'met' if met else 'MISSED'}: {first['faster']:.1f}x as fast, {words}")
    machine = describe_machine()
    path = RESULTS / f"global-prune-{slug(machine['cpu'])}.json"
    figures = {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "elements": size // 4,
        "amount": AMOUNT,
        "rows": rows,
        "seconds": seconds,
    }
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path.name}")


if __name__ == "__main__":
    # torch ranks on one thread, whatever it is given; more would only make the other ops depend on their neighbours.
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["peaks"]:
        print(json.dumps(peaks(sys.argv[2], int(sys.argv[3]))))
    elif sys.argv[1:2] == ["times"]:
        print(json.dumps(times(int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main(*sys.argv[1:])
