"""The benchmark of exact removal, on its small network: what it calls ideal, and that it leaves no figures behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from benchmarks import exact


def test_the_small_network_comes_out_equal_and_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime for path in Path(exact.RESULTS).iterdir()}
    threads = str(torch.get_num_threads())
    assert exact.main(["--quick", "--amounts", "0.5", "--threads", threads]) == 0
    assert {path: path.stat().st_mtime for path in Path(exact.RESULTS).iterdir()} == before
    shown = capsys.readouterr().out
    assert "ideal" in shown and "small" in shown.splitlines()[-1]


def test_ideal_counts_what_no_input_and_no_output_depends_on() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[2].weight[:, 2] = 0
        model[4].weight[:, 5] = 0
    inputs = lambda count: (torch.randn(count, 3, 4, 4),)  # noqa: E731
    coupling = fxprune.analyze(model, inputs(1))
    keep = exact.ideal_indices(coupling, model, exact.Probe(model, inputs))
    assert {name: kept.tolist() for name, kept in keep.items()} == {
        "0.weight[0]": [3, 4, 5, 6, 7], "2.weight[0]": [0, 1, 2, 3, 4]
    }  # fmt: skip
    assert exact.removed_parameters(coupling, model, keep) == 3 * (3 + 1) + (3 * 6 + 1 * (5 + 1)) + 4


def test_rows_of_an_earlier_run_stay_unless_they_were_taken_anew() -> None:
    rows = [{"model": m, "amount": a, "dim": 0, "ratio": r} for m, a, r in (("vgg16", 0.5, 1), ("resnet18", 0.3, 1))]
    found = exact.merged(rows, [{"model": "vgg16", "amount": 0.5, "dim": 0, "ratio": 2}])
    assert [(r["model"], r["ratio"]) for r in found] == [("resnet18", 1), ("vgg16", 2)]
