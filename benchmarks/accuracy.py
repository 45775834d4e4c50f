"""What pruning costs in accuracy: by magnitude, calibrated on unlabelled data, and after label-free distillation.

    python -m benchmarks.accuracy [--cases minilm mnist ...] [--cells "80%" ...] [--methods l1 refit ...]
                                  [--seeds 0 1 2] [--minutes 5] [--threads 2] [--development]

A cell is one case (model and data), one plan, one method and one seed, which chooses the calibration data. A figure is
the mean over the seeds with its standard error; a target is met where the mean is within one standard error of it.
Methods: `l1` is the plan alone (L2 norms for channels); those of fxprune.calibrate; and with `+recover` behind them
`--minutes` of distillation, which starts from the calibrated selection and whose seconds are its own. Calibration data,
development data and evaluation data are disjoint; whatever was tuned was tuned with --development, whose figures go to
a file of their own. The evaluation data are scored once for each cell: cells that have a figure are not run again, so a
run that was cut off goes on where it stopped.

Before a figure is taken, the compiled pipeline is held against the pruned model that is scored (`equal`). Figures go to
results/accuracy-<cpu>.json, the plot to results/accuracy.png. Needs the packages named in accuracy_case.INSTALL.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from benchmarks.accuracy_apply import Pruner
from benchmarks.accuracy_case import Case, call
from benchmarks.accuracy_decoder import Causal
from benchmarks.accuracy_imagenet import efficientnet_case, mobilenet_case
from benchmarks.accuracy_minilm import MiniLm
from benchmarks.accuracy_mnist import Mnist
from benchmarks.machine import describe_machine, slug
from fxprune.calibration.calibrate import calibrate
from fxprune.calibration.recover.recover import recover
from fxprune.calibration.solvers import METHODS
from fxprune.errors import CheckError, FxPruneError
from fxprune.select.selection import Selection
from fxprune.transform import transform

RESULTS = Path(__file__).resolve().parent / "results"
TOLERANCE = 1e-4
RECOVER = "+recover"
# A target is judged by so many calibration seeds.
SEEDS = 3
CASES: dict[str, Callable[[Path], Case]] = {
    "minilm": lambda _: MiniLm(),
    "mnist": Mnist,
    "mobilenet": lambda _: mobilenet_case(),
    "efficientnet": lambda _: efficientnet_case(),
    "decoder": Causal,
}
# (case, cell, method) -> what the mean must reach
TARGETS = {
    ("minilm", "50%", "one-shot"): 0.80,
    ("minilm", "2:4", "one-shot"): 0.80,
    ("minilm", "60%", "one-shot"): 0.80,
    ("minilm", "70%", "one-shot"): 0.785,
    ("minilm", "80%", "one-shot"): 0.77,
    ("minilm", "90%", "one-shot"): 0.73,
    ("minilm", "half FFN", "one-shot"): 0.80,
    ("minilm", "75% FFN + half heads", "one-shot"): 0.74,
    ("minilm", "70%", "recovered"): 0.795,
    ("minilm", "80%", "recovered"): 0.79,
    ("minilm", "90%", "recovered"): 0.76,
    ("minilm", "75% FFN + half heads", "recovered"): 0.77,
    ("mnist", "90%", "one-shot"): 0.95,
    ("mnist", "50% of channels", "one-shot"): 0.95,
}

Row = dict[str, Any]


class Bench:
    """One case, with the selections that distillation starts from kept in a folder."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        self.name, self.given = name, given
        self.case = CASES[name](given.cache)
        self.pruner = Pruner(self.case)

    def cell(self, cell: str, method: str, seed: int) -> Row:
        """Prune, check and score one cell."""
        selection, seconds = self.select(cell, method, seed)
        pruned = self.pruner.zeroed(selection)
        equal = self.hold(selection, pruned)
        metrics = self.case.score(pruned, self.given.split)
        return {
            "case": self.name,
            "cell": cell,
            "method": method,
            "seed": seed,
            "metrics": metrics,
            "seconds": seconds,
            "zeros": share_removed(selection),
            "equal": equal,
            **({"minutes": self.given.minutes} if method.endswith(RECOVER) else {}),
            **({"recovery": vars(selection.recovery)} if selection.recovery is not None else {}),
        }

    def select(self, cell: str, method: str, seed: int) -> tuple[Selection, float]:
        """The selection of a cell and the seconds it took; calibrated ones are kept, for distillation to start from."""
        plan = self.case.plans[cell]()
        way, recovers, _ = method.partition(RECOVER)
        file = self.given.cache / "selections" / f"{self.name}-{slug(cell)}-{way}-{seed}.pt"
        model, quiet = self.pruner.model, {"progress": self.given.progress}
        if recovers:
            given = torch.load(file, weights_only=False) if file.exists() else self.select(cell, way, seed)[0]
            data, minutes = self.case.recovery(seed), self.given.minutes
            checkpoint = file.with_name(f"{file.stem}-recover-{minutes:g}.pt")
            options = {"minutes": minutes, "loss": self.case.loss, "checkpoint": checkpoint, "seed": seed, **quiet}
            return timed(lambda: recover(model, given, data, **options))
        if method == "l1":
            return timed(lambda: self.pruner.by_magnitude(plan))
        data = self.case.calibration(seed)
        selection, seconds = timed(lambda: calibrate(model, plan, data, way, **quiet))
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(selection, file)
        return selection, seconds

    def hold(self, selection: Selection, pruned: Callable[..., Any]) -> float:
        """How far transform's result is from the pruned model that is scored; CheckError where it is too far."""
        batch = self.pruner.batch
        args = () if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch,)
        kwargs = batch if isinstance(batch, dict) else None
        options = {"compile": False, "measure": False}
        result = transform(self.pruner.model, None, args, kwargs, selection=selection, options=options, progress=False)
        with torch.no_grad():
            difference = largest_difference(call(pruned, batch), call(result, batch))
        if not difference <= TOLERANCE:
            raise CheckError("no figure", why=f"transform's result differs from the pruned model by {difference:.1e}")
        return difference


def timed(work: Callable[[], Selection]) -> tuple[Selection, float]:
    """What a call gives, and the seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def largest_difference(expected: Any, got: Any) -> float:
    """Return max|a - b| / max|b| over the floating outputs, the worst of all."""
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True)
    found = [
        float((a - b).abs().max() / a.abs().max()) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()
    ]
    return max(found)


def share_removed(selection: Selection) -> float:
    """Return the share of zeros in the masked weights."""
    total = sum(mask.numel() for mask in selection.mask.values())
    return 1 - sum(mask.kept() for mask in selection.mask.values()) / total if total else 0.0


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells two cells apart; how long distillation was to take is part of it."""
    return row["case"], row["cell"], row["method"], row["seed"], row.get("minutes")


def label(row: Mapping[str, Any]) -> str:
    """The method of a row, with the minutes of its distillation."""
    return row["method"] + (f" {row['minutes']:g} min" if "minutes" in row else "")


def summary(rows: Iterable[Row]) -> dict[tuple[str, str, str], tuple[float, float, float, float, int]]:
    """(case, cell, method) -> mean and standard error of the metric, mean cos, most seconds, and number of seeds."""
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["case"], row["cell"], label(row)), []).append(row)
    found = {}
    for name, mine in grouped.items():
        values = [row["metrics"][row["metric"]] for row in mine]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        cos = statistics.fmean(row["metrics"]["cos"] for row in mine)
        found[name] = statistics.fmean(values), error, cos, max(row["seconds"] for row in mine), len(values)
    return found


def table(rows: Sequence[Row]) -> str:
    """Return one line for each case, cell and method."""
    cells = [
        (
            case,
            cell,
            method,
            f"{mean:.4g}",
            "-" if math.isnan(error) else f"{error:.2g}",
            f"{cos:.3f}",
            f"{seconds:.0f}",
            count,
        )
        for (case, cell, method), (mean, error, cos, seconds, count) in summary(rows).items()
    ]
    headers = ("case", "pruned", "method", "figure", "standard error", "cos", "seconds", "seeds")
    return tabulate(cells, headers=headers, disable_numparse=True)


def judge(rows: Sequence[Row], one_shot: str, minutes: float) -> list[tuple[str, bool]]:
    """Each target that was measured with all seeds, in words, and whether it is met."""
    found, means = [], summary(rows)
    for (case, cell, kind), wanted in TARGETS.items():
        method = one_shot if kind == "one-shot" else f"{one_shot}{RECOVER} {minutes:g} min"
        if (case, cell, method) in means and means[case, cell, method][-1] >= SEEDS:
            mean, error, _, seconds, count = means[case, cell, method]
            spent = f"{count} seeds, {seconds:.0f} s"
            text = f"{case}, {cell}, {method}: {mean:.4f} +- {error:.4f} ({spent}), wanted {wanted}"
            found.append((text, mean + error >= wanted))
    return found


def plot(rows: Sequence[Row], file: Path) -> bool:
    """Draw R@1 of MiniLM against sparsity, one line a method; False without figures of it, or without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None or all(row["case"] != "minilm" for row in rows):
        return False
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=150, layout="constrained")
    means = summary(row for row in rows if row["case"] == "minilm")
    dense = [mean for (_, cell, _), (mean, *_) in means.items() if cell == "dense"]
    for method in dict.fromkeys(name for _, cell, name in means if cell != "dense"):
        points = sorted(
            (float(cell[:-1]), mean, 0.0 if math.isnan(error) else error)
            for (_, cell, name), (mean, error, *_) in means.items()
            if name == method and cell.endswith("%") and cell[:-1].isdigit()
        )
        if points:
            x, y, spread = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=method)
    for value in dense:
        axes.axhline(value, color="grey", linewidth=1, label="dense")
    axes.set(xlabel="sparsity of the encoder's linear layers (%)", ylabel="R@1 on 800 BBC News stories")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
    return True


def work(given: argparse.Namespace, done: set[tuple[Any, ...]]) -> list[tuple[str, str, str, int]]:
    """The cells that have no figure yet, case by case: the dense model, then plans by methods by seeds."""
    found: list[tuple[str, str, str, int]] = []
    for name in given.cases:
        cells = [c for c in CASES[name](given.cache).plans if any(fnmatchcase(c, p) for p in given.cells)]
        if not cells:
            tqdm.write(f"{name} has no plan named {' or '.join(given.cells)}")
        found.append((name, "dense", "dense", 0))
        for method in given.methods:
            seeds = [0] if method == "l1" else given.seeds
            found += [(name, cell, method, seed) for seed in seeds for cell in cells]
    minutes = {RECOVER: given.minutes}
    return [cell for cell in found if (*cell, minutes.get(cell[2][-len(RECOVER) :])) not in done]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=str(__doc__).splitlines()[0])
    ways = [*METHODS, *(m + RECOVER for m in METHODS)]
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--cells", nargs="+", default=["*"], help="patterns of plan names")
    parser.add_argument("--methods", nargs="+", default=["l1", "refit"], choices=["l1", *ways])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=5.0, help="of distillation (default: 5)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--development", action="store_true", help="score the development data, to tune on")
    parser.add_argument("--cache", type=Path, default=RESULTS.parent.parent / "build" / "accuracy")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--progress", action="store_true", help="bars within a cell as well")
    given = parser.parse_args(argv)
    given.split = "development" if given.development else "evaluation"
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print, and save after every cell; the exit status says whether the targets were met."""
    given = parse(argv)
    torch.set_num_threads(given.threads)
    machine = describe_machine()
    file = given.results / f"accuracy{'-development' if given.development else ''}-{slug(machine['cpu'])}.json"
    rows: list[Row] = json.loads(file.read_text())["rows"] if file.exists() else []
    todo = work(given, {key(row) for row in rows})
    bench: Bench | None = None
    failed = 0
    for name, cell, method, seed in tqdm(todo, desc="accuracy", disable=None, leave=False):
        if bench is None or bench.name != name:
            bench = Bench(name, given)
        try:
            if cell == "dense":
                metrics = bench.case.score(bench.pruner.model, given.split)
                row = {"case": name, "cell": cell, "method": method, "seed": 0, "metrics": metrics, "seconds": 0.0}
            else:
                row = bench.cell(cell, method, seed)
        except FxPruneError as error:
            tqdm.write(f"FAILED {name}, {cell}, {method}, seed {seed}: {error}")
            failed += 1
            continue
        row |= {"metric": bench.case.metric, "sample": bench.case.sample, "threads": given.threads}
        rows.append(row)
        figure = row["metrics"][row["metric"]]
        tqdm.write(f"{name}, {cell}, {method}, seed {seed}: {figure:.4g}, {row['seconds']:.0f} s")
        save(file, machine, rows)
    print(table(rows))
    one_shot = next((m for m in given.methods if m in METHODS), "refit")
    targets = judge(rows, one_shot, given.minutes)
    for text, met in targets:
        print(f"{'met   ' if met else 'MISSED'} {text}")
    if not given.development and plot(rows, given.results / "accuracy.png"):
        print("written: accuracy.png")
    if failed:
        print(f"{failed} cells failed and have no figure")
    return 0 if not failed and all(met for _, met in targets) else 1


def save(file: Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write the rows in one go, so that the file is whole at any time."""
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps({"benchmark": "accuracy", "machine": machine, "rows": rows}, indent=1) + "\n")
    beside.replace(file)


if __name__ == "__main__":
    raise SystemExit(main())
