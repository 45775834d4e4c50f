"""ResNet-50, ViT-B/16 and BERT-base without half of their channels, heads and hidden features, at real size.

    python -m benchmarks.structured [--models resnet50 vit-b16 bert-base] [--threads 1 2] [--seconds 20] [--quick]

What fxprune leaves is timed against the same network written by hand in PyTorch at the widths that are left, and
against the whole one. Both of these run in the fastest way that `fxprune.benchmark` knows. Weights
are random, and the hand-written network holds the slices of them that fxprune kept: no ratio is taken before the result
equals it, and equals the whole network with what was removed set to zero.

Each model and thread count runs in a process of its own: thread pools and Inductor's choices outlive a change of them.
`--quick` runs tiny networks and writes nothing. Figures go to results/.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.by_hand import (
    BERT_BASE,
    RESNET50,
    VIT_B16,
    Bert,
    BertWidths,
    LayerWidths,
    ResNet,
    ResNetWidths,
    ViT,
    ViTWidths,
)
from benchmarks.machine import describe_machine, slug
from benchmarks.zoo_randomise import randomise
from fxprune.errors import CheckError, FxPruneError
from fxprune.measure.benchmark import Benchmark, benchmark
from fxprune.plan.patterns import Channels
from fxprune.plan.plan import Plan, Rule
from fxprune.transform import transform

RESULTS = Path(__file__).resolve().parent / "results"
AMOUNT = 0.5
TOLERANCE = 1e-4
# The zeroed network must differ from the whole one by this, or agreement with it says nothing.
FAR = 100 * TOLERANCE
# The result may be this much slower than the network written by hand.
FLOOR = 0.97

Row = dict[str, Any]
Inputs = tuple[Tensor, ...]
Removed = Mapping[str, Sequence[tuple[int, Tensor]]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture: `build(widths)` makes it, `widths` are those of the whole network, `inputs()` one call."""

    build: Callable[[Any], nn.Module]
    widths: Any
    inputs: Callable[[], Inputs]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The whole network, what fxprune made of it, and the same written by hand; and the differences that were found.

    `emitted` says in words how the result was compiled.
    """

    dense: nn.Module
    small: nn.Module
    hand: nn.Module
    inputs: Inputs
    emitted: str
    difference: float
    hand_difference: float


def image(side: int) -> Inputs:
    """Return one image `[1, 3, side, side]`."""
    return (torch.randn(1, 3, side, side),)


def tokens(count: int, words: int) -> Inputs:
    """Return the ids and the mask `[1, count]` of one text without padding."""
    return torch.randint(0, words, (1, count)), torch.ones(1, count, dtype=torch.int64)


CASES = {
    "resnet50": Case(ResNet, RESNET50, lambda: image(224)),
    "vit-b16": Case(ViT, VIT_B16, lambda: image(224)),
    "bert-base": Case(Bert, BERT_BASE, lambda: tokens(128, BERT_BASE.words)),
}
_LAYERS = (LayerWidths(4, 8, 64),) * 2
QUICK = {
    "resnet50": Case(ResNet, ResNetWidths(16, (64, 128), (((16, 16),) * 2, ((32, 32),) * 2), 10), lambda: image(32)),
    "vit-b16": Case(ViT, ViTWidths(32, _LAYERS, patch=8, image=32, classes=10), lambda: image(32)),
    "bert-base": Case(Bert, BertWidths(32, _LAYERS, words=50, positions=16), lambda: tokens(12, 50)),
}


def zero(model: nn.Module, removed: Removed) -> nn.Module:
    """Return a copy with zeros at the removed indices, in plain PyTorch: the right answer."""
    result = copy.deepcopy(model)
    for name, tensor in result.state_dict().items():
        for dim, indices in removed.get(name, ()):
            tensor.index_fill_(dim, indices, 0)
    return result


def cut(model: nn.Module, removed: Removed) -> dict[str, Tensor]:
    """Return the state dict without the removed indices."""
    state = dict(model.state_dict())
    for name, tensor in state.items():
        for dim, indices in removed.get(name, ()):
            kept = torch.ones(tensor.shape[dim], dtype=torch.bool)
            kept[indices] = False
            tensor = tensor.index_select(dim, kept.nonzero().flatten())
        state[name] = tensor
    return state


@torch.no_grad()
def largest_difference(expected: nn.Module, got: nn.Module, inputs: Inputs) -> float:
    """Return max|expected - got| / max|expected|, the worst of all outputs."""
    pairs = zip(pytree.tree_leaves(expected(*inputs)), pytree.tree_leaves(got(*inputs)), strict=True)
    # torch's max, unlike Python's, lets what is not a number through.
    return torch.stack([(right - answer).abs().max() / right.abs().max() for right, answer in pairs]).max().item()


def check(expected: nn.Module, got: nn.Module, inputs: Inputs, label: str) -> float:
    """Return the largest relative difference, or raise CheckError before anything is timed."""
    difference = largest_difference(expected, got, inputs)
    if not difference <= TOLERANCE:
        raise CheckError(f"no figure: {label}", why=f"they differ by {difference:.1e}, more than {TOLERANCE:.0e}")
    return difference


def prepare(case: Case, options: Mapping[str, Any] | None = None, progress: bool = False) -> Networks:
    """Build, prune, write by hand what is left, and hold all of it against the zeroed network."""
    torch.manual_seed(0)
    dense = case.build(case.widths).eval()
    randomise(dense, seed=0)
    inputs, other = case.inputs(), case.inputs()
    plan = Plan([Rule("*", Channels(AMOUNT))])
    small = transform(dense, plan, inputs, options=options, progress=progress)
    removed = small.report.removed
    state = cut(dense, removed)
    hand = case.build(case.widths.read(state)).eval()
    hand.load_state_dict(state)
    zeroed = zero(dense, removed)
    far = largest_difference(dense, zeroed, inputs)
    if not far >= FAR:
        raise CheckError("no figure: nothing was removed", why=f"the zeroed network is within {far:.1e} of the whole")
    difference = max(check(zeroed, small, call, "the result and the zeroed network") for call in (inputs, other))
    by_hand = max(check(hand, small, call, "the result and the network by hand") for call in (inputs, other))
    return Networks(dense, small, hand, inputs, small.report.compiled, difference, by_hand)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def multiplications(model: nn.Module, inputs: Inputs) -> int:
    """Return the multiply-adds of the matrix products and convolutions of one call."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def measure_row(name: str, case: Case, threads: int, seconds: float, progress: bool) -> Row:
    """Prepare and time one model at the threads that are set."""
    nets = prepare(case, progress=progress)
    by_hand = benchmark(nets.hand, nets.small, nets.inputs, seconds=seconds, progress=progress)
    # The whole network runs through the code of the one by hand: it must meet Dynamo as the first of its kind.
    torch._dynamo.reset()
    whole = benchmark(nets.dense, nets.small, nets.inputs, seconds=seconds, progress=progress)
    return {
        "model": name,
        "threads": threads,
        "dense_parameters": parameters(nets.dense),
        "parameters": parameters(nets.hand),
        "dense_macs": multiplications(nets.dense, nets.inputs),
        "macs": multiplications(nets.hand, nets.inputs),
        "emitted": nets.emitted,
        **_figures("hand", by_hand),
        **_figures("dense", whole),
        "difference": nets.difference,
        "hand_difference": nets.hand_difference,
    }


def _figures(side: str, timed: Benchmark) -> Row:
    """Milliseconds and ratios of one comparison; the quartiles tell how quiet the machine was."""
    return {
        f"{side}_ms": timed.a.median * 1e3,
        f"{side}_quartiles_ms": [quartile * 1e3 for quartile in timed.a.quartiles],
        f"{side}_way": timed.a.way,
        f"pruned_ms_beside_{side}": timed.b.median * 1e3,
        f"pruned_quartiles_ms_beside_{side}": [quartile * 1e3 for quartile in timed.b.quartiles],
        f"over_{side}": timed.ratio,
        f"over_{side}_low": timed.ratio_low,
        f"over_{side}_high": timed.ratio_high,
        f"over_{side}_fastest": min(timed.a.samples) / min(timed.b.samples),
        f"rounds_beside_{side}": len(timed.a.samples),
    }


def run_worker(given: argparse.Namespace) -> None:
    """Measure one model at one thread count and write its row to the file that was asked for."""
    threads, name = given.threads[0], given.models[0]
    torch.set_num_threads(threads)
    case = (QUICK if given.quick else CASES)[name]
    row = measure_row(name, case, threads, given.seconds, not given.no_progress)
    given.worker.write_text(json.dumps(row), encoding="utf-8")


def start_worker(given: argparse.Namespace, name: str, threads: int) -> Row:
    """Run this module in a new process on one model at one thread count and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.structured", "--worker", str(file)]
        command += ["--models", name, "--threads", str(threads), "--seconds", str(given.seconds)]
        command += ["--quick"] * given.quick + ["--no-progress"] * given.no_progress
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, cwd=RESULTS.parent.parent, env=environment, check=True)
        return json.loads(file.read_text(encoding="utf-8"))


def interval(row: Row, side: str, digits: int) -> str:
    """Return the ratio over one side with its interval."""
    ratio, low, high = (f"{row[f'over_{side}{end}']:.{digits}f}" for end in ("", "_low", "_high"))
    return f"{ratio}x [{low}, {high}]"


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table; the milliseconds of the result are those beside the network by hand."""
    cells = [
        [
            row["model"],
            row["threads"],
            f"{row['parameters'] / 1e6:.1f} of {row['dense_parameters'] / 1e6:.1f}",
            f"{row['macs'] / row['dense_macs']:.0%}",
            f"{row['pruned_ms_beside_hand']:.2f}",
            f"{row['hand_ms']:.2f}",
            row["hand_way"],
            interval(row, "hand", 3),
            f"{row['dense_ms']:.2f}",
            row["dense_way"],
            interval(row, "dense", 2),
            f"{row['difference']:.1e}",
        ]
        for row in rows
    ]
    headers = ["model", "threads", "M parameters", "MACs", "pruned ms", "by hand ms", "which is", "over by hand"]
    headers += ["best dense ms", "which is", "over dense", "max diff"]
    return tabulate(cells, headers=headers, stralign="right", disable_numparse=True)


def judge(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Return each row's target in words, and whether it was met."""
    found = []
    for row in rows:
        label = f"{row['model']}, threads {row['threads']}"
        text = f"{label}: {row['over_hand']:.3f}x the speed of the network by hand, wanted {FLOOR}x"
        found.append((text, row["over_hand"] >= FLOOR))
    return found


def plot(rows: Sequence[Row], file: Path, title: str) -> bool:
    """Draw the speed-ups over dense, of the result and by hand; False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    places = list(range(len(rows)))
    fast = [row["over_dense"] for row in rows]
    below = [row["over_dense"] - row["over_dense_low"] for row in rows]
    above = [row["over_dense_high"] - row["over_dense"] for row in rows]
    axes.bar([p - 0.2 for p in places], fast, 0.38, yerr=[below, above], capsize=3, label="fxprune")
    # dense / by hand = (dense / pruned) / (by hand / pruned)
    axes.bar([p + 0.2 for p in places], [r["over_dense"] / r["over_hand"] for r in rows], 0.38, label="by hand")
    axes.axhline(1, color="grey", linewidth=1)
    names = [f"{r['model']}\n{r['threads']} thread{'s' * (r['threads'] > 1)}" for r in rows]
    axes.set_xticks(places, names, fontsize=8)
    axes.set(ylabel="speed-up over the best dense")
    axes.set_title(title, fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(file)
    return True


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structured", description="Times smaller networks.")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="time of measuring per comparison (default: 20)")
    parser.add_argument("--quick", action="store_true", help="tiny networks; writes no results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--no-progress", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write structured-<cpu>.json and structured.png into the results folder."""
    given = parse(argv)
    if given.worker is not None:
        try:
            run_worker(given)
        except FxPruneError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    rows = []
    for name in given.models:
        for threads in given.threads:
            row = start_worker(given, name, threads)
            rows.append(row)
            speeds = f"{interval(row, 'hand', 3)} the speed by hand, {interval(row, 'dense', 2)} dense"
            print(f"{name}, threads {threads}: {speeds}", flush=True)
    machine = describe_machine()
    title = f"half of all channels, heads and hidden features removed; batch 1, fp32, {machine['cpu']}"
    print(f"\n{title}, torch {machine['torch']}\n\n{format_table(rows)}\n")
    targets = judge(rows)
    for text, met in targets:
        print(f"{'met   ' if met else 'MISSED'} {text}")
    if given.quick:
        return 0
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / f"structured-{slug(machine['cpu'])}.json"
    result = {
        "benchmark": "structured",
        "amount": AMOUNT,
        "batch": 1,
        "machine": machine,
        "rows": rows,
        "targets": [{"target": text, "met": met} for text, met in targets],
    }
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {file.name}")
    drawn = plot(rows, given.results / "structured.png", title)
    print("written: structured.png" if drawn else "no plot: matplotlib is not installed (pip install matplotlib)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
