"""benchmarks.gpu: what it says of rows; on a GPU, a short run of all of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_linears, gpu_models


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


@pytest.mark.slow
def test_layers_are_right_and_their_limits_those_of_their_bytes() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = list(gpu_linears.works(device, torch.float16, shapes=((128, 192),)))
    assert {work.kernel for work in found} >= {"gemv24", "nonzeros", "bitmap", "blocks"}
    for work in found:
        if work.x.shape[0] <= 16:
            assert gpu_linears.error_of(work) <= 2**-9, (work.kernel, work.case)
            again = dataclasses.replace(work, packed=gpu_linears.copied(work.packed))
            assert gpu_linears.error_of(again) <= 2**-9
        assert 1.0 <= work.limit < 20
    half = next(work for work in found if work.kernel == "gemv24")
    wrong = dataclasses.replace(half, x=half.x * 2, weight=half.weight * 3)
    assert gpu_linears.error_of(wrong) > 0.1 and "ratio" not in gpu_linears.measure(wrong, 0.1)


@pytest.mark.slow
def test_models_are_those_that_they_say() -> None:
    widths = gpu_models.Widths(64, 128, 4, 2, 2, 50)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decode, prefill, *_ = gpu_models.cases(widths)
    few = {name: decode.plans[name] for name in ("90%", "half the channels")}
    small = dataclasses.replace(decode, inputs=gpu_models.decoder_call(widths, 1, 6), plans=few)
    rows = list(gpu_models.measure(small, device, torch.float32, mode=None, seconds=0.05))
    assert [row["shape"] for row in rows] == list(few)
    assert all(row["ratio"] > 0 and row["error"] <= 1e-4 for row in rows)
    # What is decoded behind others is what is read at once.
    model = prefill.build().eval()
    ids = torch.randint(0, 50, (1, 7))
    none = torch.zeros(2, 2, 1, 2, 0, 16)
    held: list[torch.Tensor] = []
    for layer in model.get_submodule("layers"):
        part = layer.get_submodule("attention")
        for name in ("k", "v"):
            part.get_submodule(name).register_forward_hook(lambda m, x, y: held.append(y))
    with torch.no_grad():
        whole = model(ids, none)
        k0, v0, k1, v1 = (y.unflatten(-1, (2, 16)).transpose(1, 2)[:, :, :6] for y in held)
        turned = [gpu_models.turn(k, gpu_models.angles(torch.arange(6), 16)) for k in (k0, k1)]
        past = torch.stack([torch.stack([turned[0], v0]), torch.stack([turned[1], v1])])
        torch.testing.assert_close(model(ids[:, 6:], past), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
def test_a_short_run(tmp_path: Path) -> None:
    gpu.main(["--quick", "--results", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    kernels = {"select", "prune24", "masked", "gemv24", "nonzeros", "bitmap", "blocks", "model"}
    assert {r["kernel"] for r in rows} >= kernels
    assert all("ratio" in r for r in rows)
