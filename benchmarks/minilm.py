"""Whole MiniLM, its 36 encoder linears pruned by magnitude, against the fastest dense on the same weights.

    python -m benchmarks.minilm [--threads 1 2] [--sparsities 0 0.3 0.5 ...] [--seq 128] [--batch 1]

Each thread count runs in a process of its own: thread pools and Inductor's choices outlive a change of it.
Dense is the fastest of eager, torch.compile and torch.compile, frozen; where onnxruntime is installed, it is
measured on the same weights too and stands in a column of its own.
No ratio is taken before the result equals the pruned model in eager PyTorch. Figures go to results/.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.machine import describe_machine, slug
from benchmarks.onnx_session import onnx_session
from fxprune.cli import demo_data
from fxprune.cli.demo import Batch, Model, example_batches, largest_difference, pruned_eager, pruning_plan, stored_bytes
from fxprune.errors import CheckError, FxPruneError
from fxprune.measure.benchmark import benchmark
from fxprune.transform import transform

RESULTS = Path(__file__).resolve().parent / "results"
SPARSITIES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TOLERANCE = 1e-4
TARGETS = {0.5: 1.2, 0.8: 2.3, 0.9: 3.0}
FLOOR = 0.98

Row = dict[str, Any]


def check(expected: Model, got: Model, inputs: Sequence[Batch], label: str) -> float:
    """Return the largest relative difference, or raise CheckError before anything is timed."""
    difference = largest_difference(expected, got, inputs)
    if not difference <= TOLERANCE:
        raise CheckError(
            f"no figure for {label}",
            why=f"it differs from the pruned model by {difference:.1e}, more than {TOLERANCE:.0e}",
        )
    return difference


def measure_row(model: nn.Module, inputs: Sequence[Batch], sparsity: float, threads: int, progress: bool) -> Row:
    """Prune, compile, check and time at one sparsity."""
    ids, mask = inputs[0]
    kwargs = {"attention_mask": mask}
    fast = transform(model, pruning_plan(sparsity), example_inputs=(ids,), kwargs=kwargs, progress=progress)
    selection = fast.meta["selection"]
    eager = pruned_eager(model, selection)
    difference = check(eager, fast, inputs, f"{sparsity:.0%}")
    timed = benchmark(eager, fast, (ids,), kwargs, progress=progress)
    row: Row = {
        "threads": threads,
        "sparsity": sparsity,
        "zeros": zeros(eager, list(selection.mask)),
        "dense_ms": timed.a.median * 1e3,
        "dense": timed.a.way,
        "pruned_ms": timed.b.median * 1e3,
        "ratio": timed.ratio,
        "ratio_low": timed.ratio_low,
        "ratio_high": timed.ratio_high,
        "difference": difference,
        "dense_bytes": stored_bytes(eager),
        "pruned_bytes": stored_bytes(fast),
    }
    session = onnx_session(eager, ids, mask, threads)
    if session is not None:
        check(eager, session, inputs, f"onnxruntime at {sparsity:.0%}")
        # Alone, not in turns: its idle threads spin, and so do torch's, and each would slow the other.
        alone = benchmark(session, session, (ids,), kwargs, progress=progress).a.median
        row |= {"onnxruntime_ms": alone * 1e3, "onnxruntime_ratio": alone / timed.b.median}
    # Each sparsity compiles the model's forward again; past a limit Dynamo would leave the dense side eager.
    torch._dynamo.reset()
    return row


def zeros(model: nn.Module, names: Sequence[str]) -> float:
    """Return the share of zeros in the named parameters."""
    weights = [model.get_parameter(name) for name in names]
    count = sum(weight.numel() for weight in weights)
    return sum(int((weight == 0).sum()) for weight in weights) / count if count else 0.0


def run_worker(given: argparse.Namespace) -> None:
    """Measure every sparsity at one thread count and write the rows to the file that was asked for."""
    threads = given.threads[0]
    torch.set_num_threads(threads)
    model, tokenizer = demo_data.load_minilm()
    story, headline = example_batches(tokenizer, demo_data.load_documents(), given.seq)
    inputs = [(ids.repeat(given.batch, 1), mask.repeat(given.batch, 1)) for ids, mask in (story, headline)]
    rows = []
    for sparsity in given.sparsities:
        row = measure_row(model, inputs, sparsity, threads, not given.no_progress)
        rows.append(row)
        times = f"dense {row['dense_ms']:.1f} ms, pruned {row['pruned_ms']:.1f} ms, {speedup(row)}"
        print(f"threads {threads}, {sparsity:.0%}: {times}", flush=True)
    given.worker.write_text(json.dumps(rows), encoding="utf-8")


def speedup(row: Row) -> str:
    """Return a row's ratio and its interval."""
    return f"{row['ratio']:.2f}x [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"


def start_worker(given: argparse.Namespace, threads: int) -> list[Row]:
    """Run this module in a new process at one thread count and return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.minilm", "--worker", str(file)]
        command += ["--threads", str(threads), "--seq", str(given.seq), "--batch", str(given.batch)]
        command += ["--sparsities", *map(str, given.sparsities)]
        if given.no_progress:
            command.append("--no-progress")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, cwd=RESULTS.parent.parent, env=environment, check=True)
        return json.loads(file.read_text(encoding="utf-8"))


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table; the onnxruntime column only where it was measured."""
    onnx = any("onnxruntime_ms" in row for row in rows)
    cells = [
        [
            row["threads"],
            f"{row['sparsity']:.0%}",
            f"{row['dense_ms']:.1f}",
            row["dense"],
            f"{row['pruned_ms']:.1f}",
            speedup(row),
            *_onnx_cells(row, onnx),
            f"{row['difference']:.1e}",
            f"{row['dense_bytes'] / 1e6:.1f}",
            f"{row['pruned_bytes'] / 1e6:.1f}",
        ]
        for row in rows
    ]
    headers = ["threads", "sparsity", "best dense ms", "which is", "pruned ms", "speed-up"]
    headers += ["onnxruntime ms", "over it"] if onnx else []
    headers += ["max diff", "dense MB", "pruned MB"]
    return tabulate(cells, headers=headers, stralign="right", disable_numparse=True)


def _onnx_cells(row: Row, shown: bool) -> list[str]:
    """The two cells of onnxruntime: its time, and how many times faster the pruned model is."""
    if not shown:
        return []
    return [f"{row['onnxruntime_ms']:.1f}", f"{row['onnxruntime_ratio']:.2f}x"] if "onnxruntime_ms" in row else ["", ""]


def judge(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Return each target that was measured, in words, and whether it was met."""
    found = []
    for row in rows:
        for target in (TARGETS.get(row["sparsity"]), FLOOR):
            if target is not None:
                label = f"threads {row['threads']}, {row['sparsity']:.0%}"
                found.append((f"{label}: {row['ratio']:.2f}x, wanted {target}x", row["ratio"] >= target))
    return found


def plot(rows: Sequence[Row], file: Path, title: str) -> bool:
    """Draw speed-up against sparsity, one line a thread count; False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=150, layout="constrained")
    for threads in sorted({row["threads"] for row in rows}):
        line = sorted((row for row in rows if row["threads"] == threads), key=lambda row: row["sparsity"])
        x = [100 * row["sparsity"] for row in line]
        name = f"{threads} thread" + ("s" if threads > 1 else "")
        axes.plot(x, [row["ratio"] for row in line], marker="o", label=name)
        low, high = [row["ratio_low"] for row in line], [row["ratio_high"] for row in line]
        axes.fill_between(x, low, high, alpha=0.2)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xlabel="sparsity of the encoder's linear layers (%)", ylabel="speed-up over the best dense")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
    return True


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minilm", description="Times a pruned MiniLM.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--seq", type=int, default=128, help="tokens per input (default: 128)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--no-progress", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write minilm-<cpu>.json and minilm.png into the results folder."""
    given = parse(argv)
    if given.worker is not None:
        try:
            run_worker(given)
        except FxPruneError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    rows = [row for threads in given.threads for row in start_worker(given, threads)]
    machine = describe_machine()
    title = f"MiniLM-L6, batch {given.batch}, {given.seq} tokens, fp32, {machine['cpu']}"
    print(f"\n{title}, torch {machine['torch']}\n\n{format_table(rows)}\n")
    targets = judge(rows)
    for text, met in targets:
        print(f"{'met   ' if met else 'MISSED'} {text}")
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / f"minilm-{slug(machine['cpu'])}.json"
    result = {
        "benchmark": "minilm",
        "batch": given.batch,
        "seq": given.seq,
        "machine": machine,
        "rows": rows,
        "targets": [{"target": text, "met": met} for text, met in targets],
    }
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {file.name}")
    drawn = plot(rows, given.results / "minilm.png", title)
    print("written: minilm.png" if drawn else "no plot: matplotlib is not installed (pip install matplotlib)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
