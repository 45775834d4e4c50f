"""Pruned models on this CPU, by every runtime that a user could take instead, in processes that take turns.

    python -m benchmarks.cpu [--models resnet50 minilm-128] [--sparsities 0 0.5 0.9] [--threads 1 2] [--peers]
                             [--deepsparse .venv-deepsparse/bin/python]

Every runtime has the same weights, zeros included, and one process for each model, sparsity and number of threads.
None is timed before its output equals the eager model's. Round by round each calls its model for a quarter of a second
while the others wait; a figure is the median of the rounds' medians. A ratio is the median of the rounds' ratios, with
the interval of half of them.
Beside them stand what a call reaches of the machine's peak in multiply-adds of nonzeros, and of its bandwidth in bytes
of stored weights, both measured before; and the share of its time outside fxprune's ops.
Figures go to results/cpu-<cpu>.json and .png, model by model: rows that are there and are not measured stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.cpu_child import RUNTIMES
from benchmarks.cpu_models import models
from benchmarks.machine import describe_machine, slug
from benchmarks.peak import Peak, measure_peaks

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
OURS, OURS_HALF = "fxprune", "fxprune bf16"
TORCH = ("eager", "torch.compile")
DENSE = (*TORCH, "onnxruntime", "OpenVINO")
HALF = ("torch bf16", "OpenVINO bf16")
PEERS = ("onnxruntime", "OpenVINO", "OpenVINO bf16")
PLAIN = ("eager", "torch.compile", "torch bf16", "sparse CSR", OURS, OURS_HALF)
TOLERANCE = {True: 5e-2, False: 2e-4}  # of bfloat16, and of float32
ROUNDS = 9
# model -> sparsity -> how many times faster than the best dense runtime in float32
TARGETS: dict[str, dict[float, float]] = {
    "minilm-128": {0.5: 1.2, 0.8: 2.4, 0.9: 3.5},
    "resnet50": {0.5: 1.3, 0.8: 2.3, 0.9: 3.8},
    **{key: {0.5: 1.2, 0.8: 2.2, 0.9: 3.5} for key in ("resnet18", "vgg16", "unet")},
    **{key: {0.5: 1.0, 0.8: 1.3, 0.9: 1.6} for key in ("mobilenet_v2", "efficientnet_lite0")},
    "gpt2-decode": {0.5: 1.6, 0.8: 3.2, 0.9: 4.0},
}
# The same over DeepSparse.
DEEPSPARSE_TARGETS: dict[str, dict[float, float]] = {
    "minilm-128": {0.8: 1.25, 0.9: 1.25},
    "resnet50": {0.8: 2.5, 0.9: 2.8},
    **{key: {0.8: 1.1, 0.9: 1.1} for key in ("gpt2-decode", "mobilenet_v2", "efficientnet_lite0")},
}
# In bfloat16 over the best dense runtime in bfloat16.
HALF_TARGETS: dict[str, dict[float, float]] = {"minilm-128": {0.5: 1.0, 0.8: 1.25, 0.9: 1.5}}
# Of the fastest that a user of torch has, in float32, anywhere.
LEAST = 0.98

Row = dict[str, Any]


class Runner:
    """A process that has one runtime; it waits until it is its turn."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    @functools.cached_property
    def answer(self) -> dict[str, Any]:
        """What it says when it is ready, or why it will not be."""
        return self._read()

    def _read(self) -> Any:
        # A library may print lines of its own before an answer.
        for line in _pipe(self.process.stdout):
            if line.startswith(("{", "[")):
                try:
                    return json.loads(line)
                except ValueError:
                    continue
        return {"failed": f"its process ended with {self.process.wait()}"}

    def turn(self) -> float:
        """The median seconds of a call, in one turn."""
        pipe = _pipe(self.process.stdin)
        pipe.write("go\n")
        pipe.flush()
        return median(self._read())

    def close(self) -> None:
        """End the process."""
        _pipe(self.process.stdin).close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def measure(name: str, sparsity: float, threads: int, given: argparse.Namespace, peak: Peak | None = None) -> Row:
    """All runtimes with one model."""
    row: Row = {"model": name, "sparsity": sparsity, "threads": threads, "seconds": {}, "failed": {}}
    row["peak"] = None if peak is None else dataclasses.asdict(peak)
    runners: dict[str, Runner] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cpu_child"]
            case = [name, str(sparsity), str(threads), folder]
            asked = [runtime for runtime in (*PLAIN, *(PEERS if given.peers else ())) if _is_asked(runtime, given.only)]

            def start(names: Sequence[str]) -> None:
                for runtime in names:
                    runners[runtime] = Runner([*command, runtime, *case], threads)
                for runtime in names:
                    _wait(runners, row, runtime)

            # The first one leaves the weights to the others, which get ready side by side; ours, which measures as it
            # does, when they are still.
            start(["eager"])
            start([runtime for runtime in asked if runtime not in ("eager", OURS, OURS_HALF)])
            if given.deepsparse and not (Path(folder) / "deepsparse.onnx").exists():
                row["failed"]["DeepSparse"] = row.pop("no deepsparse", "onnxruntime, which exports for it, was not run")
            elif given.deepsparse:
                script = str(ROOT / "benchmarks" / "cpu_deepsparse.py")
                runners["DeepSparse"] = Runner([str(given.deepsparse), script, str(threads), folder], threads)
                _wait(runners, row, "DeepSparse")
            for runtime in (OURS, OURS_HALF):
                start([runtime] if runtime in asked else [])
            _compare(Path(folder), runners, row)
            rounds: dict[str, list[float]] = {runtime: [] for runtime in runners}
            for _ in range(given.rounds):
                for runtime, runner in runners.items():
                    rounds[runtime].append(runner.turn())
        finally:
            for runner in runners.values():
                runner.close()
    row["seconds"] = {runtime: median(times) for runtime, times in rounds.items()}
    row["rounds"] = rounds
    return row


def _is_asked(runtime: str, only: Sequence[str]) -> bool:
    return not only or runtime in (*only, OURS, "eager")


def _wait(runners: dict[str, Runner], row: Row, runtime: str) -> None:
    """Until a runtime is ready; drops one that will not be."""
    runner = runners[runtime]
    if "failed" in runner.answer:
        row["failed"][runtime] = runner.answer["failed"]
        runners.pop(runtime).close()
        return
    row |= runner.answer.get("facts", {})


def _compare(folder: Path, runners: dict[str, Runner], row: Row) -> None:
    """Drops the runtimes whose outputs are not the eager model's."""
    wanted = np.load(folder / "eager.npy")
    row["difference"] = {}
    for runtime in list(runners):
        got = np.load(folder / f"{runtime}.npy")
        same = got.shape == wanted.shape
        difference = float(np.abs(got - wanted).max() / np.abs(wanted).max()) if same else float("inf")
        row["difference"][runtime] = difference
        if not difference <= TOLERANCE[runtime in (*HALF, OURS_HALF)]:
            row["failed"][runtime] = f"its output is off by {difference:.1e}"
            runners.pop(runtime).close()


def best(row: Row, kinds: Sequence[str]) -> str | None:
    """The fastest of these runtimes in a row."""
    there = [runtime for runtime in kinds if runtime in row["seconds"]]
    return min(there, key=lambda runtime: row["seconds"][runtime], default=None)


def ratio(row: Row, other: str, ours: str = OURS) -> tuple[float, float, float]:
    """How many times faster fxprune is than another runtime, round by round: the median and the quartiles.

    A machine that others use is faster in one minute than in the next, which both sides of a round see.
    """
    rounds = row["rounds"]
    each = [a / b for a, b in zip(rounds[other], rounds[ours])]
    low, middle, high = quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
    return middle, low, high


def format_rows(rows: Sequence[Row]) -> str:
    """One line a row: milliseconds of each runtime, how fxprune stands to them, and what it makes of the machine."""
    columns = [name for name in (*RUNTIMES, "DeepSparse") if any(name in row["seconds"] for row in rows)]
    cells = []
    for row in rows:
        times = [f"{1e3 * row['seconds'][name]:.2f}" if name in row["seconds"] else "" for name in columns]
        dense, half = best(row, DENSE), best(row, HALF)
        cells.append(
            [
                row["model"],
                row["threads"],
                f"{row['sparsity']:.0%}",
                *times,
                *(_times(row, other) for other in (dense, half, "DeepSparse")),
                _times(row, half, OURS_HALF),
                *("" if value is None else f"{value:.0%}" for value in (*reached(row), row.get("outside"))),
            ]
        )
    over = ["over best dense", "over dense bf16", "over DeepSparse", "bf16 over dense bf16"]
    headers = ["model", "threads", "zeros", *columns, *over, "of peak", "of bandwidth", "outside"]
    return tabulate(cells, headers=headers, disable_numparse=True, stralign="right")


def reached(row: Row) -> tuple[float | None, float | None]:
    """Of the machine's peak by multiply-adds of nonzeros, and of its bandwidth by bytes of stored weights."""
    if not row.get("peak") or "work" not in row or "bytes" not in row or OURS not in row["seconds"]:
        return None, None
    seconds, peak = row["seconds"][OURS], row["peak"]
    return 2 * row["work"]["nonzero"] / seconds / peak["flops"], row["bytes"] / seconds / peak["bandwidth"]


def _times(row: Row, other: str | None, ours: str = OURS) -> str:
    if other is None or other not in row["seconds"] or ours not in row["seconds"]:
        return ""
    return "{:.2f}x [{:.2f}, {:.2f}]".format(*ratio(row, other, ours))


def judge(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Each target in words, and whether it was met."""
    found = []
    for row in rows:
        model, sparsity = row["model"], row["sparsity"]
        asked = {
            (OURS, best(row, DENSE)): TARGETS.get(model, {}).get(sparsity),
            (OURS, "DeepSparse"): DEEPSPARSE_TARGETS.get(model, {}).get(sparsity),
            (OURS_HALF, best(row, HALF)): HALF_TARGETS.get(model, {}).get(sparsity),
        }
        user = OURS, best(row, TORCH)
        asked[user] = max(asked.get(user) or LEAST, LEAST)
        for (ours, other), target in asked.items():
            if target is None or other not in row["seconds"] or ours not in row["seconds"]:
                continue
            times = ratio(row, other, ours)[0]
            label = f"{model}{ours.removeprefix(OURS)}, {sparsity:.0%}, threads {row['threads']}"
            found.append((f"{label}: {times:.2f}x of {other}, wanted {target}x", times >= target))
    return found


def plot(rows: Sequence[Row], file: Path, title: str) -> bool:
    """Speed-up over the best dense runtime by sparsity, a panel a model; False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    names = list(dict.fromkeys(row["model"] for row in rows))
    across = min(3, len(names))
    size = {"figsize": (4 * across, 3 * -(-len(names) // across)), "dpi": 120, "layout": "constrained"}
    figure, panels = pyplot.subplots(-(-len(names) // across), across, squeeze=False, **size)
    for axes, name in zip(panels.flat, names):
        for threads in sorted({row["threads"] for row in rows}):
            line = [row for row in rows if row["model"] == name and row["threads"] == threads and best(row, DENSE)]
            line = sorted((row for row in line if OURS in row["seconds"]), key=lambda row: row["sparsity"])
            found = [ratio(row, str(best(row, DENSE))) for row in line]
            x = [100 * row["sparsity"] for row in line]
            axes.plot(x, [middle for middle, _, _ in found], marker="o", label=f"threads: {threads}")
            axes.fill_between(x, [low for _, low, _ in found], [high for _, _, high in found], alpha=0.2)
        axes.axhline(1, color="grey", linewidth=1)
        axes.set(title=name, xlabel="zeros (%)", ylabel="times faster than the best dense")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(file)
    return True


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="Times pruned models on this CPU.")
    parser.add_argument("--models", nargs="+", default=list(models()), choices=list(models()))
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--peers", action="store_true", help="onnxruntime and OpenVINO, where they are installed")
    parser.add_argument("--deepsparse", type=Path, help="a Python that has DeepSparse; needs --peers")
    parser.add_argument("--only", nargs="+", default=[], metavar="RUNTIME", help="these beside fxprune and eager")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--no-progress", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the figures; 0 where every target that was measured is met."""
    given = parse(argv)
    machine = describe_machine()
    peaks = measure_peaks(given.threads)
    for threads, peak in peaks.items():
        print(f"threads {threads}: {peak.flops / 1e9:.0f} GFLOP/s, {peak.bandwidth / 1e9:.1f} GB/s read", flush=True)
    if not peaks:
        print("the machine's peak is not measured: there is no C++ compiler", flush=True)
    file = given.results / f"cpu-{slug(machine['cpu'])}.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    cases = [(name, s, t) for name in given.models for s in given.sparsities for t in given.threads]
    rows = []
    for case in tqdm(cases, desc="cpu", disable=True if given.no_progress else None):
        rows.append(measure(*case, given, peaks.get(case[2])))
        print(format_rows(rows[-1:]), flush=True)
        for runtime, why in rows[-1]["failed"].items():
            print(f"{runtime} is left out: {why}", flush=True)
        kept = [row for row in kept if _case(row) != _case(rows[-1])] + rows[-1:]
        kept.sort(key=lambda row: (list(models()).index(row["model"]), row["sparsity"], row["threads"]))
        result = {"benchmark": "cpu", "machine": machine, "rounds": given.rounds, "rows": kept}
        given.results.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{format_rows(kept)}\n")
    found = judge(kept)
    for text, met in found:
        print(f"{'met   ' if met else 'MISSED'} {text}")
    if plot(kept, file.with_suffix(".png"), f"batch 1, float32, {machine['cpu']}, torch {machine['torch']}"):
        print(f"\nwritten: {file.name}, {file.with_suffix('.png').name}")
    return 0 if all(met for _, met in found) else 1


def _case(row: Row) -> tuple[str, float, int]:
    return row["model"], row["sparsity"], row["threads"]


if __name__ == "__main__":
    raise SystemExit(main())
