"""Small and middle models: is a result ever slower than the best that its user had?

    python -m benchmarks.small [--only mlp-64 ...] [--threads 1 2] [--seconds 1.0] [--quick]

Sixty models: MLPs of widths 32 to 2048, CNNs, one-block transformers, LSTMs, at batch 1, 8 and 64, each as it is, with
50, 90 and 95% zeros (torch.nn.utils.prune, per layer, made permanent) and with half of its channels removed. Each is
transformed with what fxprune does by default, checked, and timed by `fxprune.benchmark` against the model that went in,
in the fastest of eager, torch.compile, frozen, and for CNNs channels_last. `report` is the ratio that the result's own
report gave. A row is lost where the whole 95% interval of its ratio lies below 0.97.

`overhead` is what a call of a result takes beyond its compiled function, for a model of one input.

Figures go to results/, in place of those taken before on the same machine; --quick runs four models and writes nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from tqdm import tqdm

import fxprune
from benchmarks.machine import describe_machine, slug
from fxprune.emit.compiled import Compiled
from fxprune.measure.timing import interleave

RESULTS = Path(__file__).resolve().parent / "results"
LEAST = 0.97
Row = dict[str, Any]


class Block(nn.Module):
    """A pre-norm transformer block with its own attention: x [n, 32, d]."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, dim=-1)
        )
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.behind(x))))


class Recurrent(nn.Module):
    """An LSTM over 16 steps and a head on its last state: x [n, 16, d]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(width, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def mlp(width: int) -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )  # fmt: skip


def cnn(width: int) -> nn.Module:
    """Three convolutions with batch-norm, and a head: x [n, 3, 32, 32]."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


# Name -> the model, and an input of a batch.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"mlp-{w}": ((lambda w=w: mlp(w)), (w,)) for w in (32, 64, 128, 512, 1024, 2048)},
    **{f"cnn-{w}": ((lambda w=w: cnn(w)), (3, 32, 32)) for w in (16, 64)},
    **{f"block-{w}": ((lambda w=w: Block(w)), (32, w)) for w in (64, 256)},
    **{f"lstm-{w}": ((lambda w=w: Recurrent(w)), (16, w)) for w in (64, 256)},
}
PRUNED = ("0%", "50%", "90%", "95%", "half the channels")
BATCHES = (1, 8, 64)
QUICK = 17


def cases() -> Iterator[tuple[str, str, int, str]]:
    """(label, model, batch, pruned): every model pruned in every way, at batches that take turns."""
    for number, name in enumerate(MODELS):
        for place, pruned in enumerate(PRUNED):
            batch = BATCHES[(number + place) % len(BATCHES)]
            yield f"{name}, batch {batch}, {pruned}", name, batch, pruned


def build(name: str, pruned: str) -> tuple[nn.Module, fxprune.Plan | None]:
    """The model with its zeros, and the plan that removes channels."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    if pruned == "half the channels":
        return model, fxprune.Plan([fxprune.Rule("*", fxprune.Channels(0.5))])
    amount = float(pruned.rstrip("%")) / 100
    for module in model.modules() if amount else ():
        for weight in [n for n, p in module.named_parameters(recurse=False) if p.dim() > 1]:
            prune.l1_unstructured(module, weight, amount)
            prune.remove(module, weight)
    return model, None


def measure(label: str, name: str, batch: int, pruned: str, seconds: float) -> Row:
    """One row, at torch's number of threads."""
    model, plan = build(name, pruned)
    x = torch.randn(batch, *MODELS[name][1])
    fast = fxprune.transform(model, plan, example_inputs=(x,), progress=False)
    report = fast.report
    assert all(check.ok for check in report.checks) and report.timing is not None
    found = fxprune.benchmark(model, fast, (x,), seconds=seconds, progress=False)
    return {
        "case": label,
        "threads": found.threads,
        "way": found.a.way,
        "dense_ms": 1e3 * found.a.median,
        "ms": 1e3 * found.b.median,
        "ratio": found.ratio,
        "low": found.ratio_low,
        "high": found.ratio_high,
        "cold_ratio": found.cold_ratio,
        "report_ratio": report.timing.ratio,
        "bfloat16_ms": 1e3 * found.half.median if found.half is not None else None,
        "packed": sum(w.layout != "dense" for w in report.weights),
        "emitted": report.compiled,
    }


def overhead(seconds: float) -> Row:
    """Microseconds of a call of a result beyond its compiled function, with gradients on outside, as most call it."""
    model = mlp(64).eval()
    x = torch.randn(16, 64)
    fast = fxprune.transform(model, example_inputs=(x,), options={"measure": False}, progress=False)
    cells = [cell.cell_contents for cell in vars(fast)["_run"].__closure__]
    compiled = next(cell for cell in cells if isinstance(cell, Compiled))
    function = next(program.run for program in compiled.programs if program.fits([x]))

    with torch.no_grad():
        whole, inner = interleave([lambda: fast(x), lambda: function(x)], seconds=seconds, max_rounds=5000)
    with torch.enable_grad():
        outside = interleave([lambda: fast(x)], seconds=seconds / 2, max_rounds=5000)[0]
    return {
        "call_us": 1e6 * whole.typical,
        "call_with_gradients_on_us": 1e6 * outside.typical,
        "function_us": 1e6 * inner.typical,
        "overhead_us": 1e6 * (whole.typical - inner.typical),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as people read them."""
    lines = [
        (
            row["case"],
            row["threads"],
            row["way"],
            f"{row['dense_ms']:.3f}",
            f"{row['ms']:.3f}",
            f"{row['ratio']:.2f}x ({row['low']:.2f} - {row['high']:.2f})",
            f"{row['report_ratio']:.2f}x",
            "LOST" if row["high"] < LEAST else "",
        )
        for row in rows
    ]
    headers = ("model", "threads", "best of the user's", "ms", "result ms", "faster (95% interval)", "report", "")
    return tabulate(lines, headers=headers, disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; returns 1 where a result lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose label holds one of these")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring for each row")
    parser.add_argument("--quick", action="store_true", help="four models, one thread, nothing written")
    given = parser.parse_args(arguments)
    chosen = [case for case in cases() if not given.only or any(part in case[0] for part in given.only)]
    threads = given.threads
    if given.quick:
        chosen, threads = list(cases())[::QUICK], [1]
    file = RESULTS / f"small-{slug(describe_machine()['cpu'])}.json"
    kept = json.loads(file.read_text()) if file.exists() and not given.quick else {"rows": []}
    rows = {(row["case"], row["threads"]): row for row in kept["rows"]}
    todo = [(number, case) for number in threads for case in chosen]
    for number, (label, name, batch, pruned) in tqdm(todo, disable=None):
        torch.set_num_threads(number)
        rows[label, number] = measure(label, name, batch, pruned, given.seconds)
        torch._dynamo.reset()
        if not given.quick:
            found = {"machine": describe_machine(), **kept, "rows": list(rows.values())}
            file.write_text(json.dumps(found, indent=1) + "\n")
    torch.set_num_threads(1)
    cost = overhead(given.seconds)
    if not given.quick:
        found = {"machine": describe_machine(), "overhead": cost, "rows": list(rows.values())}
        file.write_text(json.dumps(found, indent=1) + "\n")
    print(table(list(rows.values())))
    lost = [row for row in rows.values() if row["high"] < LEAST]
    ratios = sorted(row["ratio"] for row in rows.values())
    middle = ratios[len(ratios) // 2]
    print(f"\n{len(ratios)} rows: {ratios[0]:.2f}x to {ratios[-1]:.2f}x, median {middle:.2f}x; {len(lost)} lost")
    print(f"a call takes {cost['overhead_us']:.1f} us beyond its compiled function's {cost['function_us']:.1f} us")
    return bool(lost)


if __name__ == "__main__":
    raise SystemExit(main())
