"""The zoo's models, pruned by `Channels(0.3)` and written back to their own classes.

    python -m benchmarks.write_back [--only timm/*vit*] [--sources transformers] [--jobs 2] [--again]

Each model runs in a process of its own; a run that is cut off goes on where it stopped. What is written back must equal
the result of transform within 1e-4 on two calls, with no more parameters (but for norms, which a result folds). Ends
with a table of the sources, the reasons of those that cannot follow, and writes results/write_back.json. It needs the
zoo's packages (.venv-zoo).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.fuzz_pool import ROOT
from benchmarks.machine import describe_machine
from benchmarks.zoo import read_row, row_file, run_child
from benchmarks.zoo_model import SOURCES, ZooModel
from benchmarks.zoo_models import choose

RESULTS = Path(__file__).resolve().parent / "results"
WORK = ROOT / ".cache" / "write_back"
SECONDS = 400.0
TARGET = 0.85
VERDICTS = ("ok", "refused", "wrong", "wrong error", "time limit", "crashed", "not taken")

Row = dict[str, Any]


def run_all(models: list[ZooModel], given: argparse.Namespace) -> list[Row]:
    """A row for each model: those that are there already are read, the others run."""
    given.work.mkdir(parents=True, exist_ok=True)
    rows = {m.label: read_row(row_file(given.work, m)) for m in models if row_file(given.work, m).exists()}
    waiting = [model for model in models if given.again or model.label not in rows]
    run = functools.partial(run_child, work=given.work, seconds=SECONDS, module="benchmarks.write_back_child")
    bar = tqdm(total=len(waiting), desc="write_back", disable=True if given.no_progress else None)
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        futures = {pool.submit(run, model): model for model in waiting}
        for future in concurrent.futures.as_completed(futures):
            rows[futures[future].label] = future.result()
            bar.update()
    bar.close()
    return [_shorter(rows[model.label]) | {"source": model.source} for model in models]


def _shorter(row: Row) -> Row:
    """A row whose error names files of libraries from their folder on."""
    return {**row, "error": re.sub(r"[^\s(]*site-packages/", "", row["error"])} if "error" in row else row


def share(rows: list[Row]) -> float:
    """Of the models that transform takes, how many come back right."""
    taken = [row for row in rows if row["verdict"] != "not taken"]
    return sum(row["verdict"] == "ok" for row in taken) / max(1, len(taken))


def table(rows: list[Row]) -> str:
    """The sources, and how their models ended."""
    body = []
    for source in (*SOURCES, "all"):
        own = [row for row in rows if source in (row["source"], "all")]
        if own:
            counts = Counter(row["verdict"] for row in own)
            body.append((source, len(own), *(counts[verdict] for verdict in VERDICTS), f"{share(own):.1%}"))
    return tabulate(body, headers=("source", "models", *VERDICTS, "of those taken"), disable_numparse=True)


def reasons(rows: list[Row]) -> str:
    """What keeps models from following, by the code that does."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["verdict"] not in ("ok", "not taken"):
            said = row.get("error", "")
            place = re.search(r"\(([^()]*\.py:\d+)\)", said)
            found.setdefault(place[1] if place else said.partition(" class at ")[2][:90], []).append(row["label"])
    body = [(len(labels), why, ", ".join(labels[:4])) for why, labels in found.items()]
    return tabulate(sorted(body, reverse=True), headers=("models", "where", "such as"), maxcolwidths=[6, 60, 60])


def main(arguments: list[str] | None = None) -> int:
    """Runs the models; 1 where one is wrong, or too few come back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--sources", nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--no-progress", action="store_true")
    given = parser.parse_args(arguments)
    rows = run_all(choose(given.only, given.sources), given)
    print(table(rows), "\n\n", reasons(rows), sep="")
    if not given.only and not given.sources:
        figures = {"benchmark": "write_back", "machine": describe_machine(), "share": share(rows), "rows": rows}
        given.results.mkdir(parents=True, exist_ok=True)
        (given.results / "write_back.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print("\nwritten: write_back.json")
    wrong = [row["label"] for row in rows if row["verdict"] in ("wrong", "wrong error", "crashed")]
    return 1 if wrong or share(rows) < TARGET else 0


if __name__ == "__main__":
    raise SystemExit(main())
