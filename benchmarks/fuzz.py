"""Random models, pruned in random ways and called in random forms, held against the zeroed model in plain torch.

    python -m benchmarks.fuzz [--cases 20000] [--jobs 2] [--first-seed 0] [--again | --mended]
    python -m benchmarks.fuzz --seed 123 --verbose [--smaller]

Every case is drawn from its seed and runs in a process with a time limit; a run that is cut off goes on where it
stopped. With --mended it also goes on after a fault was mended: cases that had a fault run again, others have the row
that other sources made, and the results say how many rows each state of the sources made. The first form ends with a
table and writes results/fuzz.json; the second runs one case in this process, prints its code and what became of it, and
with --smaller the smallest model that does the same.

A case is wrong where the result differs from the user's model with the result's own zeros in its weights by more than
rounding explains: the same model in float64 tells what its own rounding is. A refusal of a call that the model itself
takes is needless and counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.fuzz_case import draw_case
from benchmarks.fuzz_judge import FAULTS, OUTCOMES, run_case
from benchmarks.fuzz_pool import ROOT, run_seeds
from benchmarks.fuzz_smaller import smaller
from benchmarks.machine import describe_machine

RESULTS = Path(__file__).resolve().parent / "results"
WORK = ROOT / ".cache" / "fuzz"
SECONDS = 240.0
COMPLAINTS = (*FAULTS, "fuzzer")

Row = dict[str, Any]


def fingerprint() -> str:
    """Eight digits that change with fxprune's sources and this benchmark's."""
    digest = hashlib.sha256()
    for file in sorted([*ROOT.glob("fxprune/**/*.py"), *ROOT.glob("benchmarks/fuzz*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def read_rows(file: Path) -> dict[int, Row]:
    """Seed -> row of those that ran before; a last line that was cut off is left out."""
    rows: dict[int, Row] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row["seed"]] = row
    return rows


def run_all(seeds: Sequence[int], given: argparse.Namespace) -> list[Row]:
    """A row for each seed, in order: those of the same sources that are there already are read, the others run."""
    given.work.mkdir(parents=True, exist_ok=True)
    code = fingerprint()
    file = given.work / "rows.jsonl"
    rows = {} if given.again else read_rows(file)
    kept = {seed for seed, row in rows.items() if given.mended and row["outcome"] not in COMPLAINTS}
    rows = {seed: row for seed, row in rows.items() if seed in kept or row["code"] == code}
    waiting = [seed for seed in seeds if seed not in rows]
    disable = True if given.no_progress else None
    with (
        file.open("w" if given.again else "a", encoding="utf-8") as log,
        tqdm(total=len(seeds), initial=len(seeds) - len(waiting), desc="fuzz", disable=disable) as bar,
    ):
        faults = sum(rows[seed]["outcome"] in COMPLAINTS for seed in seeds if seed in rows)
        for row in run_seeds(waiting, given.jobs, given.seconds):
            row["code"] = code
            rows[row["seed"]] = row
            log.write(json.dumps(row) + "\n")
            log.flush()
            if row["outcome"] in COMPLAINTS:
                faults += 1
                bar.write(f"seed {row['seed']}: {row['outcome']}: {row.get('raw') or row['why']}", file=sys.stderr)
            bar.set_postfix_str(f"{faults} faults")
            bar.update()
    return [rows[seed] for seed in seeds]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts by outcome, kind and type, refusals by reason, and the seeds of faults."""
    outcomes = Counter(row["outcome"] for row in rows)
    judged = [row for row in rows if row["outcome"] in ("ok", "needless", "wrong", "changed")]
    return {
        "cases": len(rows),
        "outcomes": {name: outcomes[name] for name in (*OUTCOMES, "fuzzer") if outcomes[name] or name in OUTCOMES},
        "needless_rate": outcomes["needless"] / max(len(judged), 1),
        # An answer that pruning did not change much says little about pruning.
        "pruned": sum(bool(row.get("pruned")) for row in judged),
        "far_from_unpruned": sum(bool(row.get("far")) for row in judged),
        "compiled": sum(bool(row.get("compiled")) for row in judged),
        "by_kind": {key: _tally(rows, "kind", key) for key in sorted({r["kind"] for r in rows if "kind" in r})},
        "by_way": {key: _tally(rows, "way", key) for key in sorted({r["way"] for r in rows if "way" in r})},
        "by_dtype": {key: _tally(rows, "dtype", key) for key in sorted({r["dtype"] for r in rows if "dtype" in r})},
        "ops": dict(Counter(op for row in rows for op in row.get("ops", ())).most_common()),
        "needless": _reasons(rows, ("needless",)),
        "refused": _reasons(rows, ("refused",)),
        "faults": _reasons(rows, COMPLAINTS),
        "notes": dict(Counter(note for row in rows for note in row.get("notes", ())).most_common()),
        "seeds": {name: [r["seed"] for r in rows if r["outcome"] == name] for name in COMPLAINTS if outcomes[name]},
        "codes": dict(Counter(row["code"] for row in rows if "code" in row)),
        "seconds": round(sum(row.get("seconds", 0.0) for row in rows), 1),
    }


def _tally(rows: Sequence[Row], key: str, value: str) -> dict[str, int]:
    return dict(Counter(row["outcome"] for row in rows if row.get(key) == value))


def _reasons(rows: Sequence[Row], outcomes: Sequence[str]) -> list[dict[str, Any]]:
    """Reasons, those met most often first, with the first few seeds of each."""
    found: dict[str, list[int]] = {}
    for row in rows:
        if row["outcome"] in outcomes:
            found.setdefault(f"{row['outcome']}: {row['why']}" if len(outcomes) > 1 else row["why"], []).append(
                row["seed"]
            )
    order = sorted(found.items(), key=lambda item: -len(item[1]))
    return [{"why": why, "times": len(seeds), "seeds": seeds[:5]} for why, seeds in order]


def format_summary(found: dict[str, Any]) -> str:
    """The tables at the end."""
    names = [name for name, count in found["outcomes"].items() if count]
    lines = [[key, *(counts.get(name, 0) or "" for name in names)] for key, counts in _groups(found)]
    lines.append(["all", *(found["outcomes"][name] for name in names)])
    parts = [tabulate(lines, headers=["", *names])]
    for title in ("refused", "needless", "faults"):
        rows = [(r["times"], r["why"][:150], ", ".join(map(str, r["seeds"]))) for r in found[title][:25]]
        if rows:
            parts.append(tabulate(rows, headers=["times", title, "seeds"], disable_numparse=True))
    judged = sum(found["outcomes"][name] for name in ("ok", "needless", "wrong", "changed"))
    parts.append(
        f"{found['cases']} cases, {judged} judged: {found['pruned']} lost something, "
        f"{found['far_from_unpruned']} of them answer otherwise than before, {found['compiled']} were compiled; "
        f"{found['needless_rate']:.1%} refuse a call that the model takes; {found['seconds']:.0f} s"
    )
    return "\n\n".join(parts)


def _groups(found: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    return [pair for key in ("by_kind", "by_way", "by_dtype") for pair in found[key].items()]


def show(seed: int, given: argparse.Namespace) -> int:
    """Run one case here and print it; 0 where it has no fault."""
    case = draw_case(seed)
    if given.verbose:
        print(case.describe())
    row = run_case(case)
    print(json.dumps({key: value for key, value in row.items() if key != "traceback"}, indent=1))
    if given.verbose and "traceback" in row:
        print(row["traceback"])
    if given.smaller and row["outcome"] in (*FAULTS, "needless"):
        case, row = smaller(case, row)
        print(f"\nsmaller:\n{case.describe()}\n{row['outcome']}: {row.get('raw') or row['why']}")
    return int(row["outcome"] in FAULTS)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description="Prunes random models.")
    parser.add_argument("--cases", type=int, default=20000, help="how many (default: 20000)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (default: 2)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"limit for a case (default: {SECONDS:.0f})")
    parser.add_argument("--again", action="store_true", help="run cases that have a row already")
    parser.add_argument("--mended", action="store_true", help="keep rows of other sources that have no fault")
    parser.add_argument("--seed", type=int, help="run this case alone, in this process")
    parser.add_argument("--verbose", action="store_true", help="print the case's code")
    parser.add_argument("--smaller", action="store_true", help="look for the smallest model that fails alike")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the rows of a run in progress")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for fuzz.json")
    parser.add_argument("--no-progress", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and write fuzz.json; 0 where no case has a fault."""
    given = parse(argv)
    if given.seed is not None:
        return show(given.seed, given)
    seeds = range(given.first_seed, given.first_seed + given.cases)
    found = summarise(run_all(seeds, given))
    print(format_summary(found))
    head = {"benchmark": "fuzz", "first_seed": given.first_seed, "code": fingerprint(), "machine": describe_machine()}
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / "fuzz.json"
    file.write_text(json.dumps(head | found, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {file.name}")
    return int(any(found["outcomes"].get(name) for name in COMPLAINTS))


if __name__ == "__main__":
    raise SystemExit(main())
