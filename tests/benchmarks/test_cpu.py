"""The CPU benchmark: runtimes take turns, nothing is timed that answers otherwise, and ratios are of rounds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import cpu, cpu_child, peak
from benchmarks.cpu_language import Gpt2
from benchmarks.cpu_model import CpuModel
from benchmarks.cpu_models import models, pruned
from benchmarks.cpu_vision import UNet
from benchmarks.cpu_work import outside, work_of

ECHO = """
import json, sys
print("a library says something")
print(json.dumps({"ready": True, "facts": {"bytes": 8}}), flush=True)
for _ in sys.stdin:
    print(json.dumps([0.2, 0.1, 0.3]), flush=True)
"""


def row(**seconds: float) -> dict[str, Any]:
    rounds = {name: [value, 2 * value, value] for name, value in seconds.items()}
    return {"model": "resnet50", "sparsity": 0.9, "threads": 1, "seconds": seconds, "rounds": rounds, "failed": {}}


def test_a_runner_answers_in_its_turn_and_one_that_dies_says_so() -> None:
    runner = cpu.Runner([sys.executable, "-c", ECHO], 1)
    assert runner.answer["ready"] and runner.turn() == 0.2 and runner.turn() == 0.2
    runner.close()
    assert "ended with 3" in cpu.Runner([sys.executable, "-c", "raise SystemExit(3)"], 1).answer["failed"]


def test_the_best_dense_runtime_is_what_is_beaten() -> None:
    one = row(eager=4.0, onnxruntime=3.0, OpenVINO=2.0, fxprune=1.0)
    assert cpu.best(one, cpu.DENSE) == "OpenVINO" and cpu.ratio(one, "OpenVINO") == (2.0, 2.0, 2.0)
    assert cpu.judge([one])[0] == ("resnet50, 90%, threads 1: 2.00x of OpenVINO, wanted 3.8x", False)
    assert "2.00x [2.00, 2.00]" in cpu.format_rows([one])
    assert cpu.judge([row(eager=4.0)]) == []


def test_what_is_asked_of_each_runtime() -> None:
    """Of the best dense one, of DeepSparse, and, at any sparsity, not to be slower than what a user of torch has."""
    one = row(eager=4.0, OpenVINO=3.9, DeepSparse=2.8, fxprune=1.0)
    asked = [text.partition(": ")[2] for text, met in cpu.judge([one]) if met]
    wanted = {"OpenVINO": (3.9, 3.8), "DeepSparse": (2.8, 2.8), "eager": (4.0, 0.98)}
    assert asked == [f"{times:.2f}x of {name}, wanted {least}x" for name, (times, least) in wanted.items()]
    best_is_torch = cpu.judge([row(eager=3.9, OpenVINO=4.0, fxprune=1.0)])
    assert best_is_torch == [("resnet50, 90%, threads 1: 3.90x of eager, wanted 3.8x", True)]
    few = {**row(eager=0.97, OpenVINO=0.5, fxprune=1.0), "sparsity": 0.3}
    assert cpu.judge([few]) == [("resnet50, 30%, threads 1: 0.97x of eager, wanted 0.98x", False)]
    half = row(**{"torch bf16": 4.0, "OpenVINO bf16": 3.0, "fxprune": 2.5, "fxprune bf16": 2.0}) | {
        "model": "minilm-128"
    }
    assert cpu.judge([half]) == [("minilm-128 bf16, 90%, threads 1: 1.50x of OpenVINO bf16, wanted 1.5x", True)]


def test_what_a_row_reaches_of_the_machine() -> None:
    facts = {"work": {"dense": 8.0, "nonzero": 2.0}, "bytes": 3, "outside": 0.25}
    one = {**row(eager=4.0, fxprune=2.0), **facts, "peak": {"flops": 8.0, "bandwidth": 6.0}}
    assert cpu.reached(one) == (0.25, 0.25)
    assert cpu.format_rows([one]).split()[-3:] == ["25%", "25%", "25%"]
    for missing in ("peak", "work", "bytes"):
        assert cpu.reached({key: value for key, value in one.items() if key != missing}) == (None, None)


def test_what_a_process_tells_is_in_the_row() -> None:
    scripts = {"fxprune": ECHO, "OpenVINO": 'print(\'{"failed": "no reason"}\')'}
    runners = {name: cpu.Runner([sys.executable, "-c", script], 1) for name, script in scripts.items()}
    one = {**row(), "failed": {}}
    for name in scripts:
        cpu._wait(runners, one, name)
    runners["fxprune"].close()
    assert one["bytes"] == 8 and one["failed"] == {"OpenVINO": "no reason"} and list(runners) == ["fxprune"]


def test_the_work_of_a_model_is_counted_by_nonzeros() -> None:
    conv, linear = nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Linear(6, 5)
    with torch.no_grad():
        conv.weight[0] = 0
        linear.weight[:, 0] = 0
        model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
        work = work_of(model, (torch.randn(2, 4, 5, 7),))
    dense = (2 * 3 * 5 * 6 * 2 * 9, 2 * 5 * 6)
    assert work == {"dense": sum(dense), "nonzero": dense[0] * 5 / 6 + dense[1] * 5 / 6}
    assert not any(module._forward_hooks for module in model.modules())


def test_the_share_outside_fxprunes_ops() -> None:
    x = torch.randn(64, 64)
    assert outside(lambda: x @ x) == 1.0


def test_a_machines_peak_grows_with_threads_or_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = peak.measure_peaks([1, 2], rounds=1000, floats=1 << 16)
    assert set(found) in ({1, 2}, set()) and all(each.flops > 0 and each.bandwidth > 0 for each in found.values())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert peak.measure_peaks([1]) == {}


def test_one_token_after_others_is_the_last_of_all() -> None:
    """A step from cached keys and values gives what the whole sequence gives at its end."""
    torch.manual_seed(0)
    model, ids = Gpt2(width=8, heads=2, layers=3, words=11).eval(), torch.randint(0, 11, (2, 5))
    past = [torch.zeros(2, 2, 0, 4)] * 6
    for place in range(5):
        logits, *present = model(ids[:, place : place + 1], *past)
        past = [torch.cat(pair, 2) for pair in zip(past, present, strict=True)]
    x = model.words(ids) + model.places.weight[:5]
    for block in model.blocks:
        q, k, v = block.qkv(block.norm_1(x)).chunk(3, -1)
        heads = [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v)]
        seen = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + block.out(seen.transpose(1, 2).flatten(2))
        x = x + block.down(nn.functional.gelu(block.up(block.norm_2(x)), approximate="tanh"))
    wanted = model.head(model.norm(x))[:, -1:]
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [None, torch.tensor([[0.0, -1.0, -float("inf")]])], ids=["no mask", "a mask"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_step_by_step_is_attention(mask: torch.Tensor | None, scale: float | None) -> None:
    q, k, v = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 3, 5), torch.randn(2, 3, 3, 5)
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    torch.testing.assert_close(cpu_child.attention(q, k, v, mask, scale=scale), wanted)
    for other in ({"is_causal": True}, {"attn_mask": torch.ones(4, 3, dtype=torch.bool)}):
        with pytest.raises(NotImplementedError):
            cpu_child.attention(q, k, v, **other)  # pyright: ignore[reportArgumentType]


def test_weights_are_pruned_once_and_then_read(tmp_path: Path) -> None:
    model = CpuModel("small", lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), lambda: (torch.randn(2, 8),))
    first, again = (pruned(model, 0.5, tmp_path / "weights.pt") for _ in range(2))
    (x,), fresh = model.inputs(), pruned(model, 0.5)
    assert torch.equal(first(x), again(x)) and torch.equal(first(x), fresh(x))
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


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
    assert set(cpu.TARGETS) | set(cpu.DEEPSPARSE_TARGETS) <= set(models())
    assert UNet().eval()(torch.randn(1, 3, 32, 48)).shape == (1, 2, 32, 48)


def test_the_command_line() -> None:
    given = cpu.parse(["--models", "resnet18", "--sparsities", "0.9", "--threads", "1"])
    assert isinstance(given, argparse.Namespace) and given.models == ["resnet18"] and not given.peers
