"""A smaller case that fails as a case does: fewer outputs, steps, edits and rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from benchmarks.fuzz_case import Case
from benchmarks.fuzz_judge import run_case
from benchmarks.fuzz_sketch import Sketch

Row = dict[str, Any]


def smaller(case: Case, row: Row, most: int = 200) -> tuple[Case, Row]:
    """The smallest case found in `most` tries with the same outcome, and its row."""
    for _ in range(most):
        for tried in _tries(case):
            most -= 1
            try:
                found = run_case(tried)
            except Exception:
                # A case that lost a part may be none.
                continue
            if _alike(found, row):
                case, row = tried, found
                break
            if most <= 0:
                return case, row
        else:
            return case, row
    return case, row


def _alike(found: Row, row: Row) -> bool:
    """The same outcome; an exception also of the same kind."""
    same = found["outcome"] == row["outcome"]
    return same and (row["outcome"] not in ("crash", "caught", "needless") or _kind(found) == _kind(row))


def _kind(row: Row) -> str:
    return str(row["why"])[:60]


def _tries(case: Case) -> Iterator[Case]:
    """Cases with one thing less, those that lose most first."""
    sketch = case.sketch
    for tried in _sketches(sketch):
        if len(tried.steps) < len(sketch.steps) or len(tried.outputs) < len(sketch.outputs):
            yield dataclasses.replace(case, sketch=tried)
    if sketch.form != "plain":
        yield dataclasses.replace(case, sketch=dataclasses.replace(sketch, form="plain"))
    pruning = case.pruning
    for field in ("edits", "rules", "drops"):
        items = getattr(pruning, field)
        for index in range(len(items)):
            less = (*items[:index], *items[index + 1 :])
            yield dataclasses.replace(case, pruning=dataclasses.replace(pruning, **{field: less}))
    if case.memory != "plain":
        yield dataclasses.replace(case, memory="plain")
    if case.is_rounded:
        yield dataclasses.replace(case, is_rounded=False)
    if case.form != "args":
        yield dataclasses.replace(case, form="args")
    if pruning.way != "once":
        yield dataclasses.replace(case, pruning=dataclasses.replace(pruning, way="once"))


def _sketches(sketch: Sketch) -> Iterator[Sketch]:
    """Sketches that return something else, or in which readers of a step read something else of its shape."""
    if len(sketch.outputs) > 1:
        for name in sketch.outputs:
            yield dataclasses.replace(sketch, outputs=(name,), form="plain").needed()
    for step in sketch.steps[:-1]:
        yield dataclasses.replace(sketch, outputs=(step.makes.name,), form="plain").needed()
    values = sketch.values()
    for index, step in enumerate(sketch.steps):
        before = values[: len(sketch.inputs) + index]
        for other in [v for v in before if (v.kind, v.shape) == (step.makes.kind, step.makes.shape)]:
            old, new = step.makes.name, other.name
            steps = (*sketch.steps[:index], *(s.with_reader(old, new) for s in sketch.steps[index + 1 :]))
            outputs = tuple(dict.fromkeys(new if name == old else name for name in sketch.outputs))
            yield dataclasses.replace(sketch, steps=steps, outputs=outputs).needed()
