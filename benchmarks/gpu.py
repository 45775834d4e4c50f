"""The Triton kernels on the GPU at hand: right first, then fast, each beside the limit that it is measured against.

    python -m benchmarks.gpu [--only select gemv24 ... model] [--quick]

Needs no installation: torch, triton, tabulate and tqdm, from the repository's root. Every result is held against
plain torch in float32 before it is timed; a row that is wrong is printed as such and has no time. Dense and sparse
take turns as CUDA graphs, each of which goes through several copies of a weight with a cold L2 cache, in bfloat16.
`limit` is what the bytes that a kernel must move would take at the bandwidth that a copy reaches on this device, as a
ratio to dense (or, for kernels without a dense counterpart, the share of it reached). Whole models (`model`) come
last, as `benchmarks.gpu_models` has them, for as long as `--minutes` lasts; `--only model` runs them alone. Figures
go to results/<device>.json, after each row; the exit status says whether the targets were met.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from benchmarks import gpu_linears, gpu_models
from benchmarks.gpu_linears import SHAPES, close
from benchmarks.machine import slug
from fxprune.measure.timing import interleave_graphs
from triton_kernels import masked, prune24, select

RESULTS = Path(__file__).resolve().parent / "results"
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
SECONDS = 0.4
# (kernel, case) -> what the ratio to dense must reach at the geometric mean over the shapes; from KERNELS' limits.
TARGETS = {
    ("gemv24", "M=1"): 1.5,
    ("nonzeros", "70%, M=1"): 1.9,
    ("nonzeros", "80%, M=1"): 2.7,
    ("nonzeros", "90%, M=1"): 4.5,
    ("bitmap", "50%, M=1"): 1.4,
    ("bitmap", "60%, M=1"): 1.7,
    ("blocks", "50%, M=2048"): 1.5,
    ("blocks", "80%, M=2048"): 3.3,
    ("blocks", "90%, M=2048"): 5.5,
    ("blocks", "50%, M=1"): 1.6,
    ("blocks", "80%, M=1"): 3.2,
    ("blocks", "90%, M=1"): 5.0,
    ("cusparselt", "M=2048"): 1.45,
    ("prune24", "pack"): 0.8,
}
SELECT_SECONDS = {"1e9 bfloat16": 2.2e-3}
# No whole model may be slower than this.
FLOOR = 0.98
Row = dict[str, Any]


def bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    samples = interleave_graphs([lambda: target.copy_(source)], DEVICE, seconds=SECONDS)
    return 2 * source.numel() * 4 / median(samples[0])


def time_linears(given: argparse.Namespace) -> Iterator[Row]:
    """Every sparse linear layer against cuBLAS on the same weight."""
    works = gpu_linears.works(DEVICE, DTYPE, quick=given.quick)
    chosen = (work for work in works if not given.only or work.kernel in given.only)
    for work in tqdm(chosen, desc="linears", disable=None):
        yield gpu_linears.measure(work, SECONDS)


def time_models(given: argparse.Namespace, end: float) -> Iterator[Row]:
    """Whole models as `transform` makes them, against torch.compile, until the time is up."""
    chosen = [gpu_models.quick_case()] if given.quick else list(gpu_models.cases())
    for case in tqdm(chosen, desc="models", disable=None):
        for row in gpu_models.measure(case, DEVICE, DTYPE):
            yield row
            if time.monotonic() > end:
                print("the time is up: models that are left were not measured (--only model --minutes 30)")
                return
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def time_streams(given: argparse.Namespace, speed: float) -> list[Row]:
    """Kernels that only read and write, against a copy's bandwidth; selection against its target in seconds."""
    o, i = SHAPES[0]
    weight = torch.randn(o, i, device=DEVICE, dtype=DTYPE)
    bits = prune24.select(weight, 2, 4)
    rows: list[Row] = []
    if not given.only or "prune24" in given.only:
        rows.append(time_pack(weight, speed))
    if not given.only or "masked" in given.only:
        rows += time_masked(weight, bits)
    return rows


def time_pack(weight: Tensor, speed: float) -> Row:
    """Packing 2:4, against a copy's bandwidth."""
    o, i = weight.shape
    found, expected = prune24.pack(weight), prune24.reference_pack(weight)
    is_right = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    row: Row = {
        "kernel": "prune24",
        "case": "pack",
        "shape": f"{o}x{i}",
        "limit": 1.0,
        "error": 0.0 if is_right else 1.0,
    }
    if is_right:
        row["sparse"] = median(interleave_graphs([lambda: prune24.pack(weight)], DEVICE, seconds=SECONDS)[0])
        row["ratio"] = weight.numel() * (2 + 1 + 1 / 8) / speed / row["sparse"]
    return row


def time_masked(weight: Tensor, bits: Tensor) -> list[Row]:
    """A step's three products with the mask inside the kernel, against w * m by torch, at 2048 tokens."""
    o, i = weight.shape
    x, dy = (torch.randn(2048, n, device=DEVICE, dtype=DTYPE) for n in (i, o))
    keep = masked.unpack(weight, bits).to(DTYPE)

    def dense() -> tuple[Tensor, Tensor, Tensor]:
        product = weight * keep
        return F.linear(x, product), dy @ product, (dy.T @ x) * keep

    def sparse() -> tuple[Tensor, Tensor, Tensor]:
        y, dx = masked.forward(x, weight, bits), masked.gradient_input(dy, weight, bits)
        return y, dx, masked.gradient_weight(dy, x, bits)

    row: Row = {"kernel": "masked", "case": "forward, dx, dw, M=2048", "shape": f"{o}x{i}", "limit": 1.0}
    row["error"] = max(close(a, b) for a, b in zip(sparse(), dense(), strict=True))
    if row["error"] <= 2**-6:
        samples = interleave_graphs([dense, sparse], DEVICE, seconds=SECONDS)
        row |= {"dense": median(samples[0]), "sparse": median(samples[1])}
        row["ratio"] = row["dense"] / row["sparse"]
    return [row]


def time_select(given: argparse.Namespace, speed: float) -> list[Row]:
    """The smallest half of up to 1e9 magnitudes over tensors of many sizes, masks included, and the memory it takes."""
    rows: list[Row] = []
    sizes = {"1e9 bfloat16": (10**9, torch.bfloat16), "2.5e8 float32": (25 * 10**7, torch.float32)}
    for case, (size, dtype) in list(sizes.items())[1 if given.quick else 0 :]:
        tensors, left = [], size
        while left:
            count = min(left, 16 * (1 + len(tensors) % 7) * 10**6)
            tensors.append(torch.randn(count, device=DEVICE, dtype=dtype))
            left -= count
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = select.keep_all_but(select.chunks(tensors), size // 2)
        extra = torch.cuda.max_memory_allocated() - held
        kept = sum(int(torch.bincount(bits, minlength=256).cpu() @ COUNTS) for bits in found)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        samples = []
        for _ in range(9):
            torch.cuda.synchronize()
            start.record()
            select.keep_all_but(select.chunks(tensors), size // 2)
            stop.record()
            stop.synchronize()
            samples.append(start.elapsed_time(stop) / 1e3)
        row: Row = {"kernel": "select", "case": case, "shape": f"{len(tensors)} tensors", "sparse": median(samples)}
        # Two walks over everything, and the masks.
        row["ratio"] = size * (2 * tensors[0].element_size() + 1 / 8) / speed / row["sparse"]
        row |= {"limit": 1.0, "error": 0.0 if kept == size - size // 2 else 1.0, "extra_bytes": extra}
        rows.append(row)
    return rows


COUNTS = torch.tensor([byte.bit_count() for byte in range(256)])


def judge(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Each target that was measured, in words, and whether it is met."""
    found = []
    for (kernel, case), wanted in TARGETS.items():
        mine = [row for row in rows if (row["kernel"], row["case"]) == (kernel, case)]
        if mine:
            ratios = [row.get("ratio", 0.0) for row in mine]
            mean = math.exp(sum(math.log(max(r, 1e-9)) for r in ratios) / len(ratios))
            found.append((f"{kernel}, {case}: {mean:.2f}, wanted {wanted}", mean >= wanted))
    for case, wanted in SELECT_SECONDS.items():
        for row in rows:
            if (row["kernel"], row["case"]) == ("select", case):
                most = 64 << 20
                words = f"select, {case}: {1e3 * row['sparse']:.2f} ms, wanted {1e3 * wanted:.1f}"
                found.append((words, row["sparse"] <= wanted and not row["error"]))
                size = 10**9 / 8 + most
                words = f"select, {case}: {row['extra_bytes'] / 1e6:.0f} MB, wanted {size / 1e6:.0f}"
                found.append((words, row["extra_bytes"] <= size))
    for row in rows:
        if row["kernel"] == "model":
            words = f"{row['case']}, {row['shape']}: {row['ratio']:.2f}, never below {FLOOR}"
            found.append((words, row["ratio"] >= FLOOR))
    return found


def table(rows: Sequence[Row]) -> str:
    """One line a row."""
    cells = [
        (
            row["kernel"],
            row["case"],
            row["shape"],
            f"{1e6 * row['dense']:.1f}" if "dense" in row else "-",
            f"{1e6 * row['sparse']:.1f}" if "sparse" in row else "-",
            f"{row['ratio']:.2f}" if "ratio" in row else "WRONG",
            f"{row['limit']:.2f}" if "limit" in row else "-",
            f"{row['error']:.1e}",
        )
        for row in rows
    ]
    headers = ("kernel", "case", "shape", "dense us", "us", "ratio", "limit", "error")
    return tabulate(cells, headers=headers, disable_numparse=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="kernels")
    parser.add_argument("--quick", action="store_true", help="one shape, the smaller selection, one small model")
    parser.add_argument("--minutes", type=float, default=8.0, help="no other model is begun after these (default: 8)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save."""
    given = parse(argv)
    if not torch.cuda.is_available():
        print("no GPU is at hand: nothing was measured")
        return 2
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    file = given.results / f"{slug(name)}.json"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    with torch.no_grad():
        speed = bandwidth()
    print(f"{name}: a copy moves {speed / 1e12:.2f} TB/s\n")
    end = time.monotonic() + 60 * given.minutes
    parts: list[Callable[[], Iterable[Row]]] = [
        lambda: time_select(given, speed) if not given.only or "select" in given.only else [],
        lambda: time_streams(given, speed),
        lambda: time_linears(given),
        lambda: time_models(given, end) if not given.only or "model" in given.only else [],
    ]
    rows: list[Row] = []
    verdicts: list[tuple[str, bool]] = []
    with torch.no_grad():
        for row in itertools.chain.from_iterable(part() for part in parts):
            rows.append(row)
            verdicts = judge(rows)
            found = {"benchmark": "gpu", "device": name, "versions": versions, "bandwidth": speed, "rows": rows}
            file.write_text(json.dumps(found | {"targets": verdicts}, indent=1) + "\n")
    print(table(rows))
    for text, met in verdicts:
        print(f"{'met   ' if met else 'MISSED'} {text}")
    print(f"written: {file.name}")
    wrong = any(row["error"] > (2**-6 if row["kernel"] != "model" else 5e-2) for row in rows)
    return 0 if all(met for _, met in verdicts) and not wrong else 1


if __name__ == "__main__":
    raise SystemExit(main())
