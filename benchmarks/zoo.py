"""Every model of the zoo loses 30% of its channels wherever it may, and is held against itself with zeros in place.

    python -m benchmarks.zoo [--only "timm/*vit*"] [--source timm] [--jobs 2] [--again] [--failed]
    python -m benchmarks.zoo --unlisted 60 [--seed 1]

The models stand in zoo_models.py, with the share of parameters that each must lose. Each runs in a process of its own
with a time limit; a run that is cut off goes on where it stopped. A run over the whole list writes results/zoo.json;
one over models that the list does not name, drawn by chance (zoo_unlisted.py), results/zoo-unlisted.json.

A model passes when fxprune transforms it, the result equals the zeroed model within 1e-4 on two inputs, at least the
committed share of all its parameters is gone, and the user's model is as it was. What fails stays in the count. One
that is further off is tried once more in float64: where it is right there, float32's rounding is what failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.machine import describe_machine
from benchmarks.zoo_child import AMOUNT, FAR, TOLERANCE
from benchmarks.zoo_model import SOURCES, ZooModel
from benchmarks.zoo_models import all_models, choose
from benchmarks.zoo_unlisted import draw

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
WORK = ROOT / ".cache" / "zoo"
SECONDS = 300
TARGET = 0.95
# Torch-Pruning 1.6.1 on torchvision's classifiers, segmentation models and detection backbones.
PEER = "77 of 85"

Row = dict[str, Any]


def row_file(work: Path, model: ZooModel) -> Path:
    """Where a model's row is kept."""
    return work / f"{model.source}--{model.name}.json"


def run_child(model: ZooModel, work: Path, seconds: float, module: str = "benchmarks.zoo_child") -> Row:
    """Run one model in a process of its own, `module`, and return its row; a crash or a timeout is a row as well."""
    file = row_file(work, model)
    file.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", module, model.label, str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=seconds, capture_output=True, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired:
        failure = {"verdict": "time limit", "error": f"not finished after {seconds:.0f} s", "seconds": seconds}
    else:
        if file.exists():
            return read_row(file)
        failure = {"verdict": "crashed", "error": f"exit status {ended.returncode}: {ended.stderr[-2000:]}"}
    row = {"label": model.label, **failure}
    file.write_text(json.dumps(row), encoding="utf-8")
    return row


def read_row(file: Path) -> Row:
    """The row in a file."""
    return json.loads(file.read_text(encoding="utf-8"))


def run_all(models: Sequence[ZooModel], given: argparse.Namespace) -> list[Row]:
    """A row for each model, in order: those that are there already are read, the others run."""
    given.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Row] = {}
    for model in models:
        file = row_file(given.work, model)
        if file.exists() and not given.again:
            row = read_row(file)
            # The list may have changed since: a share is compared anew, nothing else is.
            if not given.failed or is_ok(with_list(row, model)):
                rows[model.label] = row
    waiting = [model for model in models if model.label not in rows]
    bar = tqdm(total=len(models), initial=len(rows), desc="zoo", disable=True if given.no_progress else None)
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        futures = {pool.submit(run_child, model, given.work, given.seconds): model for model in waiting}
        try:
            for future in concurrent.futures.as_completed(futures):
                model = futures[future]
                row = rows[model.label] = future.result()
                bar.set_postfix_str(model.label)
                bar.update()
                if not is_ok(with_list(row, model)):
                    bar.write(f"{model.label}: {row['verdict']} {first_line(row)}")
        finally:
            pool.shutdown(cancel_futures=True)
            bar.close()
    return [with_list(rows[model.label], model) for model in models]


def with_list(row: Row, model: ZooModel) -> Row:
    """The row with what the list says of its model now."""
    row = row | {"source": model.source, "name": model.name, "committed": model.share, "why": model.why}
    if row["verdict"] in ("ok", "share missed", "oracle too near") and row["share"] < model.share:
        row["verdict"] = "share missed"
    return row


def is_ok(row: Row) -> bool:
    """Whether the model passes."""
    return row["verdict"] == "ok"


def is_silent(row: Row) -> bool:
    """Whether fxprune returned a wrong result, or changed the user's model, without saying so."""
    return row["verdict"] in ("wrong", "wrong shapes", "model changed")


def first_line(row: Row) -> str:
    """The error of a row, cut to one line."""
    return str(row.get("error", "")).strip().replace("\n", " ")[:160]


def format_rows(rows: Sequence[Row]) -> str:
    """One line a model."""
    cells = [
        [
            row["label"],
            _millions(row.get("parameters")),
            "yes" if row.get("captured") else "no",
            row.get("groups", ""),
            _percent(row.get("share")),
            _percent(row["committed"]),
            _percent(row.get("frozen")),
            _reasons(row),
            _scientific(row.get("difference")),
            _scientific(row.get("from_dense")),
            "" if row.get("seconds") is None else f"{row['seconds']:.0f}",
            row["verdict"],
        ]
        for row in rows
    ]
    headers = ["model", "params", "captured", "groups", "removed", "committed", "frozen", "most often because"]
    headers += ["max diff", "from dense", "s", "verdict"]
    return tabulate(cells, headers=headers, disable_numparse=True)


def _millions(number: int | None) -> str:
    return "" if number is None else f"{number / 1e6:.1f}M"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _scientific(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def _reasons(row: Row) -> str:
    return "; ".join(f"{text[:44]} ({times})" for text, times in row.get("reasons", [])[:2])


def coverage(rows: Sequence[Row]) -> list[Row]:
    """Counts for each source, and in all."""
    sources = [source for source in SOURCES if any(row["source"] == source for row in rows)]
    kinds = [(source, [row for row in rows if row["source"] == source]) for source in sources]
    return [_count(name, some) for name, some in [*kinds, ("all", list(rows))]]


def _count(name: str, rows: Sequence[Row]) -> Row:
    return {
        "source": name,
        "models": len(rows),
        "captured": sum(bool(row.get("captured")) for row in rows),
        "transformed": sum(bool(row.get("transformed")) for row in rows),
        "exact": sum(row.get("difference", 1.0) <= TOLERANCE for row in rows),
        "share_met": sum(row.get("share", 0.0) >= row["committed"] for row in rows),
        "silently_wrong": sum(map(is_silent, rows)),
        "passed": sum(map(is_ok, rows)),
        "median_share": statistics.median(row.get("share", 0.0) for row in rows),
    }


def format_coverage(counts: Sequence[Row]) -> str:
    """The table of counts."""
    headers = ["source", "models", "captured", "transformed", "within 1e-4", "share met", "silently wrong", "pass"]
    headers += ["", "median share removed"]
    cells = []
    for count in counts:
        keys = ("source", "models", "captured", "transformed", "exact", "share_met", "silently_wrong", "passed")
        rate = _percent(count["passed"] / count["models"])
        cells.append([*(count[key] for key in keys), rate, _percent(count["median_share"])])
    return tabulate(cells, headers=headers)


def targets(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Each target in words, and whether it was met."""
    passed, silent = sum(map(is_ok, rows)), sum(map(is_silent, rows))
    found = [
        (f"{passed} of {len(rows)} models pass, wanted {TARGET:.0%}", passed >= TARGET * len(rows)),
        (f"{silent} silently wrong, wanted 0", silent == 0),
    ]
    vision = [row for row in rows if row["source"] == "torchvision"]
    if len(vision) >= 85:
        good = sum(map(is_ok, vision))
        found.append((f"torchvision: {good} of {len(vision)} pass (Torch-Pruning: {PEER})", good > 77))
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description="Prunes every model of the zoo.")
    parser.add_argument("--only", nargs="+", default=[], metavar="GLOB", help="labels or names, e.g. 'timm/*vit*'")
    parser.add_argument("--source", nargs="+", default=[], choices=SOURCES)
    parser.add_argument("--unlisted", type=int, metavar="N", help="N models that the list does not name, by chance")
    parser.add_argument("--seed", type=int, default=1, help="what chance draws them (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default: 1)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"limit for a model (default: {SECONDS})")
    parser.add_argument("--again", action="store_true", help="run models that have a row already")
    parser.add_argument("--failed", action="store_true", help="run models whose row is not ok")
    parser.add_argument("--list", action="store_true", help="print the list and its committed shares; run nothing")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the rows of a run in progress")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for zoo.json")
    parser.add_argument("--no-progress", action="store_true")
    return parser.parse_args(argv)


def format_list(models: Sequence[ZooModel]) -> str:
    """The list with its commitments."""
    rows = [(model.label, _percent(model.share), model.why) for model in models]
    return tabulate(rows, headers=["model", "committed", "because"], disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and write zoo.json where the whole list was run; 0 where every target is met."""
    given = parse(argv)
    models = choose(given.only, given.source) if given.unlisted is None else draw(given.unlisted, given.seed)
    if not models:
        print("no model of the list has such a name", file=sys.stderr)
        return 2
    if given.list:
        print(format_list(models))
        return 0
    rows = run_all(models, given)
    counts, met = coverage(rows), targets(rows)
    print(f"\n{format_rows(rows)}\n\n{format_coverage(counts)}\n")
    for text, good in met:
        print(f"{'met   ' if good else 'MISSED'} {text}")
    codes = sorted({row["code"] for row in rows if "code" in row})
    if len(codes) > 1:
        print(f"\nthese rows are from {len(codes)} states of the sources; --again takes them all anew")
    if given.unlisted is None and len(models) < len(all_models()):
        print("\nnot the whole list: zoo.json was not written")
    else:
        result = {
            "benchmark": "zoo" if given.unlisted is None else f"zoo, models drawn by seed {given.seed}",
            "plan": f'Plan([Rule("*", Channels({AMOUNT}))])',
            "tolerance": TOLERANCE,
            "least_distance_from_dense": FAR,
            "machine": describe_machine(),
            "sources": codes,
            "coverage": counts,
            "targets": [{"target": text, "met": good} for text, good in met],
            "rows": [{key: value for key, value in row.items() if key != "traceback"} for row in rows],
        }
        given.results.mkdir(parents=True, exist_ok=True)
        file = given.results / ("zoo.json" if given.unlisted is None else "zoo-unlisted.json")
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten: {file.name}")
    return 0 if all(good for _, good in met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
