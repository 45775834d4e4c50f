"""Small faults are put into the package, one at a time, and each has a test that must fail.

    python -m benchmarks.mutants [--only SUBSTRING] [--jobs 2]

The faults stand in mutants_list.py. The files that git knows are copied into a temporary folder; there every named test
is run without a fault, and must pass, and then once with each fault that it is named for. A fault is killed where
its test fails. A test that cannot be collected, crashes or does not end kills nothing. A run over the whole list writes
results/mutants.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.machine import describe_machine
from benchmarks.mutant import Mutant
from benchmarks.mutants_list import MUTANTS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SECONDS = 300.0
PYTEST = ("-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0")

# A test that imports in its body cannot be told from others by its exit status.
NO_FAILURES = ("ImportError", "ModuleNotFoundError", "SyntaxError")

# What one run of a test came to.
PASSES, FAILS, BROKEN, LATE = "passes", "fails", "broken", "time limit"
# What became of a mutant. All but the first are told, and none of them is good.
KILLED, SURVIVED, NO_TEST = "killed", "survived", "its test does not pass by itself"


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of a mutant, in how many seconds."""

    mutant: Mutant
    outcome: str
    seconds: float


def copy_tree(root: Path, into: Path) -> None:
    """The files that git knows, or would if they were added, as they stand in the working tree."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (root / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, into / name)


def run_tests(tree: Path, tests: Sequence[str], seconds: float) -> str:
    """What tests of a tree come to, in one process that imports from there; `seconds` is the limit for each."""
    report = tree / ".junit.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *PYTEST, f"--junit-xml={report}", *tests]
    try:
        ended = subprocess.run(command, cwd=tree, env=environment, timeout=seconds * len(tests), capture_output=True)
    except subprocess.TimeoutExpired:
        return LATE
    if not report.exists():
        return BROKEN
    found = ElementTree.parse(report)
    counts = [suite.attrib for suite in found.iter("testsuite")]
    failed = any(not failure.get("message", "").startswith(NO_FAILURES) for failure in found.iter("failure"))
    ran = sum(int(count["tests"]) - int(count["skipped"]) - int(count["errors"]) for count in counts)
    if ended.returncode == 1 and failed:
        return FAILS
    return PASSES if ended.returncode == 0 and ran else BROKEN


@contextlib.contextmanager
def mutated(tree: Path, mutant: Mutant) -> Iterator[None]:
    """The tree with one fault in it. Raises ValueError where its text does not stand there exactly once."""
    file = tree / mutant.file
    before = file.read_text(encoding="utf-8")
    if before.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {mutant.old!r} {before.count(mutant.old)} times")
    # A folder of bytecode may hold what was written in the same second.
    shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)
    file.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(before, encoding="utf-8")
        shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)


def run_all(
    mutants: Sequence[Mutant], root: Path, *, jobs: int = 1, seconds: float = SECONDS, progress: bool = False
) -> list[Row]:
    """A row for each mutant, in order. `seconds` is the limit of one run of a test."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(jobs):
            copy_tree(root, Path(folder) / str(number))
            trees.put(Path(folder) / str(number))

        def try_test(test: str) -> str:
            with _taken(trees) as tree:
                return run_tests(tree, [test], seconds)

        def try_mutant(mutant: Mutant) -> Row:
            start = time.monotonic()
            if passing[mutant.test] != PASSES:
                return Row(mutant, f"{NO_TEST} ({passing[mutant.test]})", 0.0)
            with _taken(trees) as tree, mutated(tree, mutant):
                found = run_tests(tree, [mutant.test], seconds)
            outcome = {FAILS: KILLED, PASSES: SURVIVED}.get(found, found)
            return Row(mutant, outcome, time.monotonic() - start)

        tests = list(dict.fromkeys(mutant.test for mutant in mutants))
        with tqdm(total=1 + len(mutants), desc="mutants", disable=None if progress else True) as bar:
            bar.set_postfix_str("all tests without a mutant")
            with _taken(trees) as tree:
                together = run_tests(tree, tests, seconds)
            bar.update()
            # Where they do not all pass, each is asked alone.
            passing = dict.fromkeys(tests, PASSES) if together == PASSES else dict(zip(tests, map(try_test, tests)))
            with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
                futures = [pool.submit(try_mutant, mutant) for mutant in mutants]
                try:
                    for done in concurrent.futures.as_completed(futures):
                        bar.set_postfix_str(f"{done.result().mutant.breaks}: {done.result().outcome}")
                        bar.update()
                finally:
                    pool.shutdown(cancel_futures=True)
            return [future.result() for future in futures]


@contextlib.contextmanager
def _taken(trees: queue.Queue[Path]) -> Iterator[Path]:
    tree = trees.get()
    try:
        yield tree
    finally:
        trees.put(tree)


def format_rows(rows: Sequence[Row]) -> str:
    """One line a mutant."""
    cells = [[row.mutant.breaks, row.mutant.file, row.mutant.test, row.outcome, f"{row.seconds:.0f}"] for row in rows]
    return tabulate(cells, headers=["mutant", "file", "test", "outcome", "s"], disable_numparse=True)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What is written: counts, those that were not killed, and on what machine and day."""
    return {
        "benchmark": "mutants",
        "machine": describe_machine(),
        "mutants": len(rows),
        "outcomes": dict(Counter(row.outcome for row in rows)),
        "by_file": dict(sorted(Counter(row.mutant.file for row in rows).items())),
        "survivors": [dataclasses.asdict(row.mutant) | {"outcome": row.outcome} for row in survivors(rows)],
    }


def survivors(rows: Sequence[Row]) -> list[Row]:
    """The mutants that no test was seen to fail on."""
    return [row for row in rows if row.outcome != KILLED]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mutants", description="Holds the tests to small faults."
    )
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of a file, a test or what a mutant breaks")
    parser.add_argument("--jobs", type=int, default=1, help="tests at a time (default: 1)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"limit for a test (default: {SECONDS:.0f})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for mutants.json")
    parser.add_argument("--no-progress", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and write mutants.json where the whole list was run; 0 where every mutant is killed."""
    given = parse(argv)
    mutants = [m for m in MUTANTS if any(given.only in text for text in (m.file, m.test, m.breaks))]
    if not mutants:
        print("no mutant of the list has such a name", file=sys.stderr)
        return 2
    rows = run_all(mutants, ROOT, jobs=given.jobs, seconds=given.seconds, progress=not given.no_progress)
    left = survivors(rows)
    print(f"\n{format_rows(rows)}\n\n{len(rows) - len(left)} of {len(rows)} killed")
    if len(mutants) == len(MUTANTS):
        given.results.mkdir(parents=True, exist_ok=True)
        file = given.results / "mutants.json"
        file.write_text(json.dumps(summary(rows), indent=1) + "\n", encoding="utf-8")
        print(f"written: {file.name}")
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
