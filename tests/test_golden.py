"""Ten small models after every stage, as golden texts: the graphs, the selection, the report without times.

To write them anew after a change that is meant: FXPRUNE_WRITE_GOLDEN=1 pytest tests/test_golden.py, and read the
difference. Left out is what may differ between machines: times, errors, and digits of what calibration fitted.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import pytest

import fxprune
from fxprune.lower.nets import tiles
from tests.golden_models import ASKED, Asked

GOLDEN = Path(__file__).parent / "golden"
STAGES = ("capture", "couple", "shrink", "fold", "lower")
SAME = "as before"


def graphs(trace: Path) -> dict[str, list[str]]:
    """Stage -> the nodes of the program that it left, as the trace has them."""
    found = {}
    for path in sorted(trace.iterdir()):
        lines = path.read_text().partition("\n# change\n")[0].splitlines()
        found[path.stem.partition("_")[2]] = [line for line in lines if line and not line.startswith("# ")]
    return found


def told_selection(selection: Any) -> list[str]:
    """What the selection holds; bits as a hash, fitted values by name and shape."""
    lines = [f"keep {name}: {kept.tolist()}" for name, kept in selection.keep.items()]
    lines += [f"dead {name}: {kept.tolist()}" for name, kept in selection.dead.items()]
    for name, mask in selection.mask.items():
        bits = hashlib.sha256(bytes(mask.bits.tolist())).hexdigest()[:16]
        lines.append(f"mask {name}: {mask.kept()} of {mask.numel()}, {bits}")
    lines += [f"value {name}: {value.dtype} {list(value.shape)}" for name, value in selection.values.items()]
    lines += [f"asked {name}: {asked}" for name, asked in selection.asked.items()]
    lines += [f"drop {path}" for path in selection.drop]
    lines += [f"fit {name}: {fit.method}, {fit.rows} rows. {fit.note}" for name, fit in selection.fits.items()]
    return [*lines, *(f"note {note}" for note in selection.notes)]


def told_report(report: fxprune.Report) -> list[str]:
    """What the report prints, without times and errors."""
    bare = copy.copy(report)
    bare.seconds, bare.kernels, bare.timing, bare.checks = {}, "", None, []
    bare.fits = {name: dataclasses.replace(fit, error=float("nan")) for name, fit in report.fits.items()}
    # A row that is the worst of several calls may be of another one on another machine.
    worst = ("shrunk = zeroed", "without what is dead = pruned model")
    calls = ["all calls" if row.what in worst else row.call for row in report.checks]
    checks = [
        f"check {row.what} on {call}: {'ok' if row.ok else 'FAILED'}"
        for row, call in zip(report.checks, calls, strict=True)
    ]
    removed = [
        f"removed {name}: {[(dim, gone.tolist()) for dim, gone in cuts]}" for name, cuts in report.removed.items()
    ]
    return [*(line.rstrip() for line in str(bare).splitlines()), *checks, *removed]


def text_of(asked: Asked, trace: Path) -> str:
    """Everything about one transform that must not change by accident."""
    result: Any = fxprune.transform(
        asked.model, asked.plan, asked.args, options=asked.options, progress=False, **asked.more
    )
    found, before = graphs(trace), []
    parts = []
    for stage in STAGES:
        lines = found.get(stage, before)
        parts.append([f"== {stage}", *([SAME] if lines == before else lines)])
        before = lines
    parts.append(["== result", *(node.format_node() or node.name for node in result.graph.nodes)])
    parts.append([f"{name}: {list(tensor.shape)}" for name, tensor in result.state_dict().items()])
    parts.append(["== selection", *told_selection(result.selection)])
    parts.append(["== report", *told_report(result.report)])
    text = "\n\n".join("\n".join(part) for part in parts) + "\n"
    # Functions of our own go by their names, wherever they stand.
    return re.sub(r"target=fxprune\.[\w.]+\.(\w+)\]", r"target=\1]", text)


@pytest.mark.parametrize("name", ASKED)
def test_stages(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_TRACE", str(tmp_path))
    monkeypatch.delenv("FXPRUNE_CHECK", raising=False)
    # Blocks and tiles are cut for the CPU at hand.
    monkeypatch.setattr(tiles, "lanes", lambda: 16)
    tiles.tile_for.cache_clear()
    text = text_of(ASKED[name](), tmp_path)
    tiles.tile_for.cache_clear()
    path = GOLDEN / f"stages_{name}.txt"
    if os.environ.get("FXPRUNE_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
