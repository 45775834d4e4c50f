"""A smaller model in the runtimes that users have: does it load, is it right, and is it faster there than the model?

    python -m benchmarks.runtimes [--models resnet50 minilm] [--threads 2] [--amount 0.5]

Each model is transformed as it is and with half of its channels, heads and FFN features removed; both results are saved
and exported, and each runtime, in a process of its own, loads the two files, answers, and is timed with them in turn.
Outputs are held against the eager model's (as it is, or zeroed) before any ratio is printed. Load times run from the
file to the first answer. Ends with a table and writes results/runtimes-<cpu>.json and .png. It needs .venv-peers.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

import fxprune
from benchmarks.cpu_models import models as cpu_models
from benchmarks.machine import describe_machine, slug
from benchmarks.zoo_vision import define_operators
from fxprune import Channels, Plan, Rule

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
RUNTIMES = ("torch.compile", "AOTInductor", "onnxruntime", "OpenVINO")
FILES = {"torch.compile": "safetensors", "AOTInductor": "aoti.pt2", "onnxruntime": "onnx", "OpenVINO": "onnx"}
# Where torch.compile gains 2x, the others are to gain this much.
WANTED, WHERE = 1.8, 2.0
TOLERANCE = 1e-4

Row = dict[str, Any]


def _vit() -> nn.Module:
    define_operators()
    model = importlib.import_module("torchvision.models").vit_b_16()
    # It begins as zeros, of which every runtime makes the same.
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def _of_cpu(name: str) -> tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]:
    model = cpu_models()[name]
    return model.build, model.inputs


def cases() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]]:
    """Name -> what builds the model, and one call of it."""
    image = lambda: (torch.randn(1, 3, 224, 224),)  # noqa: E731
    return {
        "resnet50": _of_cpu("resnet50"),
        "vit-b/16": (_vit, image),
        "bert-base": _of_cpu("bert-base"),
        "minilm": _of_cpu("minilm-128"),
    }


def prepare(name: str, amount: float, folder: Path) -> Row:
    """Writes every file of a model and of its half, with a call and the answers; returns what did not go."""
    torch.manual_seed(0)
    build, inputs = cases()[name]
    model, call = build().eval(), inputs()
    failed: dict[str, str] = {}
    half = Plan([Rule("*", Channels(amount))])
    results = {
        "dense": fxprune.transform(model, None, call, progress=False),
        "half": fxprune.transform(model, half, call, progress=False),
    }
    answers: dict[str, Any] = {"inputs": call}
    for side, result in results.items():
        with torch.no_grad():
            # The check has held it against the zeroed model; it runs eager here, apart from what is measured.
            answers[side] = [t for t in pytree.tree_leaves(result.forward(*call)) if isinstance(t, torch.Tensor)]
        fxprune.save(result, folder / f"{side}.safetensors")
        for format, suffix in (("aoti", "aoti.pt2"), ("onnx", "onnx")):
            try:
                fxprune.export(result, folder / f"{side}.{suffix}", format=format, example_inputs=call, progress=False)
            # Whatever an exporter raises is the row's.
            except Exception as error:
                failed[suffix] = f"{type(error).__name__}: {str(error)[:200]}"
    torch.save(answers, folder / "answers.pt")
    before, after = results["half"].report.parameters or (0, 0)
    return {"failed": failed, "parameters": [before, after]}


def run(name: str, threads: int, amount: float, runtimes: tuple[str, ...]) -> list[Row]:
    """The rows of one model."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        made = prepare(name, amount, Path(folder))
        for runtime in runtimes:
            row: Row = {"model": name, "runtime": runtime, "threads": threads, "parameters": made["parameters"]}
            if why := made["failed"].get(FILES[runtime]):
                rows.append({**row, "failed": why})
                continue
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.runtimes_child", runtime, str(threads), folder]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                rows.append({**row, "failed": (done.stderr.strip().splitlines() or ["it died"])[-1]})
            else:
                rows.append(row | json.loads(done.stdout.splitlines()[-1]))
    return rows


def table(rows: list[Row]) -> str:
    """The rows for people."""
    body = []
    for row in rows:
        if "failed" in row:
            body.append((row["model"], row["runtime"], row["failed"][:60]))
            continue
        dense, half = row["seconds"]
        off, load = max(row["errors"]), row["load"]
        ms = f"{1e3 * dense:.1f} to {1e3 * half:.1f}"
        loads = f"{load[0]:.1f} / {load[1]:.1f}"
        body.append((row["model"], row["runtime"], ms, f"{row['ratio']:.2f}x", f"{off:.0e}", loads))
    header = ("model", "runtime", "ms, dense to half", "faster", "outputs off", "file to answer, s, dense / half")
    return tabulate(body, headers=header, disable_numparse=True)


def misses(rows: list[Row]) -> list[str]:
    """What is not as it should be."""
    told = []
    by_torch = {row["model"]: row.get("ratio", 0.0) for row in rows if row["runtime"] == "torch.compile"}
    for row in rows:
        where = f"{row['model']} in {row['runtime']}"
        if "failed" in row:
            told.append(f"{where}: {row['failed']}")
        elif max(row["errors"]) > TOLERANCE:
            told.append(f"{where}: outputs off by {max(row['errors']):.0e}")
        elif by_torch.get(row["model"], 0.0) >= WHERE and row["ratio"] < WANTED:
            told.append(f"{where}: {row['ratio']:.2f}x, wanted {WANTED}x")
    return told


def plot(rows: list[Row], file: Path, title: str) -> None:
    """The ratios as bars, model by model."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for place, runtime in enumerate(RUNTIMES):
        ratios = [
            next((r.get("ratio", 0.0) for r in rows if (r["model"], r["runtime"]) == (n, runtime)), 0.0) for n in names
        ]
        axes.bar([x + 0.2 * place for x in range(len(names))], ratios, 0.18, label=runtime)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks([x + 0.3 for x in range(len(names))], names)
    axes.set_ylabel("times as fast as the dense model")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(cases()))
    parser.add_argument("--runtimes", nargs="*", default=list(RUNTIMES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--amount", type=float, default=0.5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--no-progress", action="store_true")
    given = parser.parse_args(arguments)
    machine = describe_machine()
    file = given.results / f"runtimes-{slug(machine['cpu'])}.json"
    old: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    rows: list[Row] = []
    for name in tqdm(given.models, disable=True if given.no_progress else None):
        rows += run(name, given.threads, given.amount, tuple(given.runtimes))
        print(table(rows), flush=True)
    new = {(row["model"], row["runtime"], row["threads"]) for row in rows}
    rows = [*(row for row in old if (row["model"], row["runtime"], row["threads"]) not in new), *rows]
    print("\n".join(["", *misses(rows)]))
    given.results.mkdir(parents=True, exist_ok=True)
    figures = {"benchmark": "runtimes", "machine": machine, "amount": given.amount, "rows": rows}
    file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    plot(rows, file.with_suffix(".png"), f"half of the channels removed, {machine['cpu']}, {given.threads} threads")
    print(f"written: {file.name}")
    return 1 if misses(rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
