"""The CPU benchmark: runtimes take turns, nothing is timed that answers otherwise, and ratios are of medians."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import cpu, cpu_child
from benchmarks.cpu_models import CpuModel, UNet, models, pruned

ECHO = """
import json, sys
print("a library says something")
print(json.dumps({"ready": True}), flush=True)
for _ in sys.stdin:
    print(json.dumps([0.2, 0.1, 0.3]), flush=True)
"""


def row(**seconds: float) -> dict[str, Any]:
    rounds = {name: [value, 2 * value, value] for name, value in seconds.items()}
    return {"model": "resnet50", "sparsity": 0.9, "threads": 1, "seconds": seconds, "rounds": rounds, "failed": {}}


def test_a_runner_answers_in_its_turn_and_one_that_dies_says_so() -> None:
    runner = cpu.Runner([sys.executable, "-c", ECHO], 1)
    assert runner.answer == {"ready": True} and runner.turn() == 0.2 and runner.turn() == 0.2
    runner.close()
    assert "ended with 3" in cpu.Runner([sys.executable, "-c", "raise SystemExit(3)"], 1).answer["failed"]


def test_the_best_dense_runtime_is_what_is_beaten() -> None:
    one = row(eager=4.0, onnxruntime=3.0, OpenVINO=2.0, fxprune=1.0)
    assert cpu.best(one, cpu.DENSE) == "OpenVINO" and cpu.ratio(one, "OpenVINO") == (2.0, 2.0, 2.0)
    assert cpu.judge([one]) == [("resnet50, 90%, threads 1: 2.00x of OpenVINO, wanted 3.8x", False)]
    assert "2.00x [2.00, 2.00]" in cpu.format_rows([one])
    assert cpu.judge([row(eager=4.0)]) == []


@pytest.mark.parametrize(("off", "dropped"), [(0.0, False), (1e-3, True), (float("nan"), True)])
def test_what_answers_otherwise_is_not_timed(tmp_path: Path, off: float, dropped: bool) -> None:
    for name, value in (("eager", 1.0), ("OpenVINO", 1.0 + off)):
        np.save(tmp_path / f"{name}.npy", np.full(3, value, dtype=np.float32))
    runners = {name: cpu.Runner([sys.executable, "-c", ECHO], 1) for name in ("eager", "OpenVINO")}
    one = row()
    cpu._compare(tmp_path, runners, one)
    assert ("OpenVINO" in one["failed"]) == dropped == ("OpenVINO" not in runners)
    for runner in runners.values():
        runner.close()


@pytest.mark.slow
def test_a_small_model_by_torch_and_fxprune(tmp_path: Path) -> None:
    model = CpuModel(
        "small", lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), lambda: (torch.randn(1, 3, 20, 20),)
    )
    inputs = model.inputs()
    zeroed = pruned(model, 0.8)
    assert float((zeroed[0].weight == 0).float().mean()) == pytest.approx(0.8, abs=0.01)  # pyright: ignore
    cpu_child.told.update(folder=tmp_path, runtime="fxprune")
    with torch.no_grad():
        wanted = zeroed(*inputs)
        for runtime in ("eager", "torch.compile", "fxprune"):
            torch._dynamo.reset()
            call = cpu_child.RUNTIMES[runtime](pruned(model, 0.8), inputs, 1)
            assert np.allclose(cpu_child.array(call()), wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_models_have_names_of_targets_and_the_unet_runs() -> None:
    assert set(cpu.TARGETS) <= set(models())
    assert UNet().eval()(torch.randn(1, 3, 32, 48)).shape == (1, 2, 32, 48)


def test_the_command_line() -> None:
    given = cpu.parse(["--models", "resnet18", "--sparsities", "0.9", "--threads", "1"])
    assert isinstance(given, argparse.Namespace) and given.models == ["resnet18"] and not given.peers
