"""Saved files changed at random, in bytes and in meaning, and loaded: what is refused, and whether anything breaks.

    python -m benchmarks.fuzz_files [--cases 10000] [--jobs 2] [--first-seed 0]

Each case is a change drawn from its seed, of a file with a result of its own kind: packed in each layout that this CPU
has, a net of convolutions, shrunk, trainable, a selection. Changes of bytes must be refused, or change nothing that is
read. Changes of what a file says have checksums made anew, so that they may load; they may be refused there or when
called, or give another answer, but end no process, hang none, and raise nothing but a FileError when loaded. Ends with
a table and writes results/fuzz_files.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

import fxprune
from benchmarks.fuzz_pool import run_seeds
from benchmarks.machine import describe_machine
from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.kernels.native import status, tiles

RESULTS = Path(__file__).resolve().parent / "results"
FAULTS = ("wrong answer", "wrong error", "died", "time limit")
SECONDS = 60.0
_MOST = Plan([Rule("*.weight", Unstructured(0.8))])
_HALF = Plan([Rule("*", Channels(0.5, align=1))])


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 67), nn.GELU(), nn.Linear(67, 33)).eval()


def _cnn() -> nn.Module:
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)).eval()


def make_originals(folder: Path) -> None:
    """One file of each kind, with a call and its answer beside it."""
    torch.manual_seed(0)
    x, image = torch.randn(3, 40), torch.randn(2, 3, 9, 9)
    kinds: dict[str, tuple[Callable[[], nn.Module], Plan, torch.Tensor, str | None, bool]] = {
        "dense": (_mlp, _MOST, x, "dense", False),
        "bitmap": (_mlp, _MOST, x, "bitmap", False),
        "shrunk": (_cnn, _HALF, image, None, False),
        "trainable": (_cnn, _HALF, image, None, True),
    }
    if status().available:
        kinds |= {"nonzeros": (_mlp, _MOST, x, "nonzeros", False), "net": (_cnn, _MOST, image, "nonzeros", False)}
    if tiles.isa():
        kinds["tiles"] = (lambda: _mlp().bfloat16(), _MOST, x.bfloat16(), "tiles", False)
    for name, (make, plan, given, layout, trains) in kinds.items():
        options = {} if trains else {"compile": False, "measure": False, "layout": layout}
        result = fxprune.transform(make(), plan, (given,), trainable=trains, options=options, progress=False)
        fxprune.save(result, folder / f"{name}.safetensors")
        with torch.no_grad():
            outputs = pytree.tree_leaves(result(given))
        torch.save({"inputs": (given,), "outputs": outputs}, folder / f"{name}.pt")
        if name == "shrunk":
            fxprune.save(result.selection, folder / "selection.safetensors")
            torch.save({"inputs": (), "outputs": []}, folder / "selection.pt")


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases; 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--no-progress", action="store_true")
    given = parser.parse_args(arguments)
    seeds = range(given.first_seed, given.first_seed + given.cases)
    with tempfile.TemporaryDirectory() as folder:
        make_originals(Path(folder))
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.fuzz_files_child", folder]
        rows: list[dict[str, Any]] = []
        disable = True if given.no_progress else None
        for row in tqdm(run_seeds(seeds, given.jobs, SECONDS, command, 2000), total=len(seeds), disable=disable):
            rows.append(row)
    faults = sorted((row for row in rows if row["outcome"] in FAULTS), key=lambda row: row["seed"])
    print(_table(rows))
    for row in faults:
        print(f"seed {row['seed']}: {row['outcome']}, {row.get('change', '')}: {row['why']}")
    counts = Counter(row["outcome"] for row in rows)
    figures = {"benchmark": "fuzz_files", "machine": describe_machine(), "cases": len(rows), "outcomes": dict(counts)}
    figures |= {"by change": _by_change(rows), "faults": faults}
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / "fuzz_files.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("\nwritten: fuzz_files.json")
    return 1 if faults else 0


def _by_change(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    kinds = sorted({row.get("change", "?") for row in rows})
    return {kind: dict(Counter(row["outcome"] for row in rows if row.get("change", "?") == kind)) for kind in kinds}


def _table(rows: list[dict[str, Any]]) -> str:
    by_change = _by_change(rows)
    outcomes = sorted({row["outcome"] for row in rows})
    body = [[kind, *(counts.get(outcome, 0) for outcome in outcomes)] for kind, counts in by_change.items()]
    body.append(["all", *(sum(row["outcome"] == outcome for row in rows) for outcome in outcomes)])
    return tabulate(body, headers=("change", *outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
