"""What a transform tells: the report, the trace files, and the check after each stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.emit.report import _timed
from fxprune.errors import CheckError
from fxprune.graph.program import Program
from fxprune.lower import lower
from fxprune.lower.layouts.site import Choice
from tests.oracle import HALF, QUICK, quick


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).eval()


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def test_the_report_prints_every_weight_and_every_check() -> None:
    report = quick(perceptron(), X, plan=Plan([Rule("0.weight", Unstructured(0.75))])).report
    text = str(report)
    for word in ("0.weight", "24x16", "75.0%", "nonzeros", "capture = your model", "second input", "second size"):
        assert word in text
    assert "2.weight" not in text
    assert all(row.ok for row in report.checks)
    assert report["0.weight"].reached == 0.75
    assert report.bytes < report.dense_bytes == 4 * 24 * 16
    assert set(report.seconds) == {"capture", "couple", "select", "shrink", "fold", "lower", "emit"}


def test_the_report_says_why_a_layout_was_refused() -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.Flatten(), nn.Linear(32, 4)).eval()
    report = quick(model, torch.randn(2, 3, 4, 4, 4)).report
    assert report["0.weight"].layout == "dense"
    assert "conv" in report["0.weight"].refused["nonzeros"]
    assert "conv" in str(report)


def test_the_report_says_which_weights_have_grown() -> None:
    plan = Plan([Rule("0.weight", Unstructured(0.25)), Rule("2.weight", Unstructured(0.75))])
    rows = {
        line.split()[0]: line for line in str(quick(perceptron(), X, plan=plan).report).splitlines() if ".w" in line
    }
    assert "x the bytes of the dense weight" in rows["0.weight"] and "bytes" not in rows["2.weight"]


def test_a_choice_that_was_timed_on_a_busy_machine_says_so() -> None:
    choice = Choice("nonzeros", "2.00x dense at 8 tokens", {}, ())
    assert _timed(choice) == ""
    assert "others wanted the cores" in _timed(dataclasses.replace(choice, steady=False))
    both = _timed(dataclasses.replace(choice, steady=False, reused=True))
    assert "timed on a weight alike" in both and "others wanted the cores" in both


def test_without_check_the_report_says_so() -> None:
    result = fxprune.transform(perceptron(), HALF, (X,), options=QUICK, progress=False, check=False)
    assert result.report.checks == []
    assert "nothing was checked" in str(result.report)


def test_rules_that_replace_each_other_are_reported() -> None:
    plan = Plan([Rule("*", Unstructured(0.5)), Rule("2.weight", Unstructured(0.25))])
    report = quick(perceptron(), X, plan=plan).report
    assert report["2.weight"].asked == 0.25
    assert any("2.weight" in note and "replaces" in note for note in report.notes)


def test_the_trace_writes_each_stage_with_its_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_TRACE", str(tmp_path / "new" / "trace"))
    quick(perceptron(), X)
    files = {path.name: path.read_text() for path in (tmp_path / "new" / "trace").iterdir()}
    stages = ("capture", "couple", "select", "shrink", "fold", "lower", "emit")
    assert sorted(files) == [f"{place:02d}_{stage}.txt" for place, stage in enumerate(stages)]
    assert "aten.linear" in files["00_capture.txt"]
    assert all("# change" not in files[name] for name in sorted(files)[:5])
    assert "# 0.weight: " in files["02_select.txt"] and "zeros" in files["02_select.txt"]
    assert "# 0.weight: nonzeros" in files["05_lower.txt"]
    change = files["05_lower.txt"].partition("# change")[2]
    assert "nonzeros_linear" in change and "-" in change


def test_the_trace_of_channels_shows_the_groups_and_the_smaller_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXPRUNE_TRACE", str(tmp_path))
    quick(perceptron(), X, plan=Plan([Rule("0.weight", Channels(0.5, align=1))]))
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert "0.weight[0]" in files["01_couple.txt"] and "free" in files["01_couple.txt"]
    assert "# 0.weight[0]: 12 stay" in files["03_shrink.txt"] and "# change" in files["03_shrink.txt"]


def test_check_2_holds_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_CHECK", "2")
    names = [row.what for row in quick(perceptron(), X).report.checks]
    assert "after fold = pruned model" in names and "after lower = pruned model" in names


def test_check_2_names_the_stage_that_departs(monkeypatch: pytest.MonkeyPatch) -> None:
    replace = lower._replace

    def wrong(program: Program, name: str, use: lower.Use, *rest: object) -> None:
        replace(program, name, use, *rest)  # pyright: ignore[reportArgumentType]
        if name == "2.weight":
            buffer = program.get_submodule(name)._buffers["values"]
            assert buffer is not None
            buffer.mul_(1.01)

    monkeypatch.setattr(lower, "_replace", wrong)
    monkeypatch.setenv("FXPRUNE_CHECK", "2")
    with pytest.raises(CheckError, match="after lower") as error:
        quick(perceptron(), X)
    assert "stage lower" in error.value.do
    monkeypatch.delenv("FXPRUNE_CHECK")
    # Without it the end is checked all the same, and what is wrong is not given out.
    result = quick(perceptron(), X)
    assert {w.layout for w in result.report.weights} == {"dense"}
    assert any("was wrong on the" in note for note in result.report.notes)
