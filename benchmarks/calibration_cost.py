"""What calibration costs: time and memory against the number of layers, and the solvers on one wide layer.

    python -m benchmarks.calibration_cost [--layers 2 4 8] [--width 512] [--wide 4096] [--sparsity 0.8] [--threads 2]

Decoders of Llama's shape with random weights are calibrated at once, each number of layers in a process of its own;
`extra` is the peak of its memory over the model, the masks and values that come out, and what was there before. Linear
growth shows as one time a layer and as an extra that stays. The solvers run on a weight [wide, wide] with inputs that
are correlated as a transformer's are (a few directions hold most of the variance).
Figures go to results/calibration-cost-<cpu>.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.accuracy_decoder import Decoder, Size
from benchmarks.machine import describe_machine, slug
from fxprune.calibration.calibrate import calibrate
from fxprune.calibration.solvers import SOLVERS
from fxprune.calibration.solvers.problem import Goal, Problem, damped
from fxprune.plan.patterns import Unstructured
from fxprune.plan.plan import Plan, Rule

RESULTS = Path(__file__).resolve().parent / "results"
SAMPLES, TOKENS = 64, 128
Row = dict[str, Any]


def calibrated(layers: int, width: int, sparsity: float) -> Row:
    """Calibrate a decoder and return its seconds and bytes."""
    torch.manual_seed(0)
    model = Decoder(Size(width=width, layers=layers, heads=8, hidden=4 * width, tokens=TOKENS)).eval()
    data = [torch.randint(4096, (SAMPLES, TOKENS))]
    plan = Plan([Rule("layers.*.weight", Unstructured(sparsity))])
    # The first call pays for imports and thread pools.
    calibrate(model, plan, [data[0][:2]], progress=False)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    before = peak()
    start = time.perf_counter()
    selection = calibrate(model, plan, data, progress=False)
    seconds = time.perf_counter() - start
    found = sum(v.numel() * v.element_size() for v in selection.values.values())
    return {
        "layers": layers,
        "seconds": seconds,
        "model": held,
        "values": found,
        "extra": max(0, peak() - before - found),
    }


def peak() -> int:
    """The largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def solved(method: str, problem: Problem, sparsity: float) -> Row:
    """Solve one weight and return the seconds and what it loses."""
    goal = Goal(Unstructured(sparsity), round(sparsity * problem.target.numel()))
    start = time.perf_counter()
    weight, keep = SOLVERS[method].solve(problem, goal)
    seconds = time.perf_counter() - start
    assert int((~keep).sum()) == goal.count
    return {"method": method, "seconds": seconds, "loss": problem.loss(weight)}


def wide_problem(width: int) -> Problem:
    """A weight [width, width] and the Gram matrix of inputs whose variances fall by a power law."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * width, width, generator=generator) * torch.arange(1, width + 1).pow(-0.5)
    turned = rows @ torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    hessian = damped((turned.T @ turned).unsqueeze(0), len(rows))[0]
    weight = torch.randn(1, width, width, generator=generator)
    return Problem(hessian, weight, weight @ hessian)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration_cost", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--wide", type=int, default=4096)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print both tables and write them."""
    given = parse(argv)
    torch.set_num_threads(given.threads)
    if given.worker:
        print(json.dumps(calibrated(given.worker, given.width, given.sparsity)))
        return 0
    rows = []
    for layers in given.layers:
        command = [sys.executable, "-m", "benchmarks.calibration_cost", "--worker", str(layers)]
        command += ["--width", str(given.width), "--sparsity", str(given.sparsity), "--threads", str(given.threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=RESULTS.parent.parent)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    cells = [
        (
            r["layers"],
            f"{r['seconds']:.1f}",
            f"{r['seconds'] / r['layers']:.2f}",
            *(f"{r[k] / 1e6:.0f}" for k in ("model", "values", "extra")),
        )
        for r in rows
    ]
    headers = ("layers", "seconds", "a layer", "model MB", "values MB", "extra MB")
    print(tabulate(cells, headers=headers, disable_numparse=True) + "\n")
    problem = wide_problem(given.wide)
    solvers = [solved(method, problem, given.sparsity) for method in SOLVERS]
    cells = [(r["method"], f"{r['seconds']:.1f}", f"{r['loss']:.4f}") for r in solvers]
    print(f"One weight [{given.wide}, {given.wide}] at {given.sparsity:.0%}\n")
    print(tabulate(cells, headers=("method", "seconds", "loss"), disable_numparse=True))
    machine = describe_machine()
    file = given.results / f"calibration-cost-{slug(machine['cpu'])}.json"
    result = {"benchmark": "calibration cost", "machine": machine, "threads": given.threads, "width": given.width}
    result |= {"rows": rows, "wide": given.wide, "sparsity": given.sparsity, "solvers": solvers}
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten: {file.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
