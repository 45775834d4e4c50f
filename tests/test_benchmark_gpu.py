"""benchmarks.gpu: what it says of rows; on a GPU, a short run of all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def row(kernel: str, case: str, ratio: float | None, error: float = 0.0) -> gpu.Row:
    times = {} if ratio is None else {"dense": 1e-5 * ratio, "sparse": 1e-5, "ratio": ratio}
    return {"kernel": kernel, "case": case, "shape": "8x8", "limit": 2.0, "error": error, **times}


def test_a_target_is_met_by_the_geometric_mean() -> None:
    rows = [row("gemv24", "M=1", 1.0), row("gemv24", "M=1", 2.5), row("bitmap", "50%, M=1", 1.3)]
    assert gpu.judge(rows) == [
        ("gemv24, M=1: 1.58, wanted 1.5", True),
        ("bitmap, 50%, M=1: 1.30, wanted 1.4", False),
    ]
    wrong = gpu.judge([row("gemv24", "M=1", None, error=0.5), row("gemv24", "M=1", 3.0)])
    assert [met for _, met in wrong] == [False]


def test_selection_is_judged_by_seconds_and_memory() -> None:
    given = {**row("select", "1e9 bfloat16", 0.9), "sparse": 2e-3, "extra_bytes": 10**8}
    assert [met for _, met in gpu.judge([given])] == [True, True]
    assert [met for _, met in gpu.judge([{**given, "sparse": 3e-3, "extra_bytes": 10**9}])] == [False, False]
    assert [met for _, met in gpu.judge([{**given, "error": 1.0}])] == [False, True]


def test_a_wrong_row_has_no_ratio() -> None:
    text = gpu.table([row("bitmap", "50%, M=1", None, error=0.5), row("gemv24", "M=1", 1.5)])
    assert "WRONG" in text.splitlines()[2] and "1.50" in text.splitlines()[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--results", str(tmp_path)]) == 2
    assert "nothing was measured" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.cuda
def test_a_short_run(tmp_path: Path) -> None:
    gpu.main(["--quick", "--results", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    kernels = {"select", "prune24", "norms", "masked", "gemv24", "nonzeros", "bitmap", "blocks"}
    assert {r["kernel"] for r in rows} >= kernels
    assert all("ratio" in r for r in rows)
