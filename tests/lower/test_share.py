"""Weights whose linears read the same activations share a call: who does, that it is right, and what is stored."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Plan, Rule, Unstructured
from tests.oracle import COMPILED, assert_right, quick

ROOT = Path(__file__).resolve().parents[2]
SPLIT = torch.ops.fxprune.nonzeros_linear_split.default
SINGLE = torch.ops.fxprune.nonzeros_linear.default
NAMES = ("q.weight", "k.weight", "v.weight", "out.weight")


class Attention(nn.Module):
    """One head of attention, its keys and values as wide as given."""

    def __init__(self, width: int = 24, head: int = 20, values: int = 37, bias: Sequence[bool] = (True, True, True)):
        super().__init__()
        self.q = nn.Linear(width, head, bias=bias[0])
        self.k = nn.Linear(width, head, bias=bias[1])
        self.v = nn.Linear(width, values, bias=bias[2])
        self.out = nn.Linear(values, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Apply(Attention):
    """The same weights with a function of (self, x) as forward."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **more: Any) -> None:
        super().__init__(**more)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def calls(result: Any) -> list[tuple[int, ...]]:
    """The rows that each nonzeros call of a result deals out: one number for a call of a single weight."""
    return [
        tuple(node.args[7]) if node.target is SPLIT else (node.args[7],)
        for node in result.graph.nodes
        if node.target in (SPLIT, SINGLE)
    ]


def why(result: Any, name: str) -> str:
    return result.report[name].lowered.choice.why


def stored(result: Any, under: str) -> int:
    """Bytes of the packed tensors under a name, without the bias."""
    module = result.get_submodule(under)
    return sum(t.numel() * t.element_size() for name, t in module.named_buffers() if name != "bias")


def right(model: nn.Module, result: Any, *shapes: tuple[int, ...]) -> None:
    for shape in shapes or ((2, 7, 24), (5, 7, 24), (1, 7, 24)):
        assert_right(result, model, torch.randn(shape))


@pytest.mark.parametrize("bias", [True, False])
def test_q_k_and_v_are_one_call(bias: bool) -> None:
    model = Attention(bias=(bias,) * 3).eval()
    result = quick(model, torch.randn(2, 7, 24))
    assert calls(result) == [(20, 20, 37), (24,)]
    result.graph.lint()
    right(model, result)

    packed = {"values", "columns", "order", "counts", "blocks"}
    expected = {f"q.weight.{key}" for key in packed | ({"bias"} if bias else set())}
    assert set(result.state_dict()) == expected | {f"out.weight.{key}" for key in packed} | {"out.bias"}
    sizes = [result.report[name].lowered.bytes for name in NAMES]
    assert sum(sizes[:3]) == stored(result, "q.weight") and sizes[3] == stored(result, "out.weight")
    assert sizes[0] == pytest.approx(sizes[1], abs=1) and sizes[2] > sizes[1]
    assert "stored with k.weight, v.weight" in why(result, "q.weight")
    assert all("stored with q.weight" in why(result, name) for name in NAMES[1:3])
    assert "stored with" not in why(result, "out.weight")
    assert [w.name for w in result.report.weights] == list(NAMES)


def test_compiled_with_a_dynamic_batch() -> None:
    model = Attention().eval()
    result = fxprune.transform(
        model, Plan([Rule("*", Unstructured(0.5))]), (torch.randn(2, 7, 24),), options=COMPILED, progress=False
    )
    assert calls(result) == [(20, 20, 37), (24,)]
    right(model, result)


def test_bytes_are_divided_by_the_nonzeros() -> None:
    rules = [Rule("*", Unstructured(0.5)), Rule("k.weight", Unstructured(1.0)), Rule("v.weight", Unstructured(0.9))]
    model = Attention(values=20).eval()
    result = quick(model, torch.randn(2, 7, 24), plan=Plan(rules))
    assert calls(result)[0] == (20, 20, 20)
    q, k, v = (result.report[name].lowered.bytes for name in NAMES[:3])
    assert q + k + v == stored(result, "q.weight") and q > v > k >= 0
    right(model, result)


def test_a_weight_that_is_not_pruned_stays_apart() -> None:
    model = Attention().eval()
    result = quick(
        model, torch.randn(2, 7, 24), plan=Plan([Rule("q.weight", Unstructured(0.5)), Rule("v.*", Unstructured(0.5))])
    )
    assert calls(result) == [(20, 37)]
    assert {"k.weight", "k.bias", "out.weight"} <= set(result.state_dict())
    right(model, result)


def test_biases_all_or_none() -> None:
    model = Attention(bias=(True, False, True)).eval()
    result = quick(model, torch.randn(2, 7, 24))
    assert calls(result) == [(20, 37), (20,), (24,)]
    right(model, result)


def with_activations(self: Attention, x: Tensor) -> Tensor:
    return torch.cat([F.gelu(self.q(x)), self.k(x), F.gelu(self.v(x))], -1)


def with_other_activation(self: Attention, x: Tensor) -> Tensor:
    return torch.cat([F.gelu(self.q(x)), F.gelu(self.k(x), approximate="tanh"), F.gelu(self.v(x))], -1)


@pytest.mark.parametrize("function", [with_activations, with_other_activation])
def test_the_same_activation_only(function: Callable[..., Tensor]) -> None:
    model = Apply(function).eval()
    result = quick(model, torch.randn(2, 7, 24))
    assert sorted(calls(result)) == [(20,), (20, 37)]
    assert not any(node.target is torch.ops.aten.gelu.default for node in result.graph.nodes)
    right(model, result)


def used_twice(self: Attention, x: Tensor) -> Tensor:
    return torch.cat([self.q(x), self.q(x * 2), self.k(x), self.v(x)], -1)


def used_twice_alike(self: Attention, x: Tensor) -> Tensor:
    return torch.cat([self.q(x), self.k(x), self.q(x), self.v(x)], -1)


@pytest.mark.parametrize("function", [used_twice, used_twice_alike])
def test_a_weight_used_twice_stays_apart(function: Callable[..., Tensor]) -> None:
    model = Apply(function).eval()
    result = quick(model, torch.randn(2, 7, 24))
    assert sorted(calls(result)) == [(20,), (20,), (20, 37)]
    right(model, result)


def test_tied_weights_stay_apart() -> None:
    model = Attention().eval()
    model.k.weight = model.q.weight
    result = quick(model, torch.randn(2, 7, 24))
    assert sorted(calls(result)) == [(20,), (20,), (24,), (37,)]
    right(model, result)


def test_tied_biases_are_shared() -> None:
    model = Attention().eval()
    model.k.bias = model.q.bias
    result = quick(model, torch.randn(2, 7, 24))
    assert calls(result)[0] == (20, 20, 37)
    assert "q.bias" not in result.state_dict()
    right(model, result)


def computed_bias(self: Attention, x: Tensor) -> Tensor:
    return torch.cat([self.q(x), F.linear(x, self.k.weight, x.mean((0, 1))[:20]), self.v(x)], -1)


def test_a_computed_bias_stays_apart() -> None:
    model = Apply(computed_bias).eval()
    result = quick(model, torch.randn(2, 7, 24))
    assert sorted(calls(result)) == [(20,), (20, 37)]
    right(model, result)


def with_others_between(self: Attention, x: Tensor) -> Tensor:
    # The later linears' results feed what comes before the next linear, and results are written to in place.
    q = self.q(x)
    middle = q.mul_(2).tanh()
    k = self.k(x)
    k = k + middle
    v = self.v(x)
    return torch.cat([q, middle, k, v, k * v[..., :20]], -1)


def x_written_between(self: Attention, x: Tensor) -> Tensor:
    x = x.clone()
    q = self.q(x)
    x[..., 0] = 3.0
    return torch.cat([q, self.k(x), self.v(x)], -1)


@pytest.mark.parametrize("function", [with_others_between, x_written_between])
def test_what_stands_between_the_linears(function: Callable[..., Tensor]) -> None:
    model = Apply(function).eval()
    result = quick(model, torch.randn(2, 7, 24))
    assert sorted(calls(result))[-1] == (20, 37)
    right(model, result)


def flat(self: Attention, x: Tensor) -> Tensor:
    # [i, o] weights as transformers' Conv1D has them, beside one stored as [o, i].
    x = x.view(-1, 24)
    weights = dict(self.named_parameters(recurse=False))
    parts = [torch.addmm(self.q.bias, x, weights["q_t"]), torch.addmm(self.k.bias, x, weights["k_t"]), self.v(x)]
    return torch.cat(parts, -1)


def test_transposed_weights() -> None:
    model = Apply(flat).eval()
    model.q_t, model.k_t = (nn.Parameter(m.weight.detach().t().contiguous()) for m in (model.q, model.k))
    result = quick(model, torch.randn(2, 7, 24))
    assert calls(result) == [(20, 20, 37)]
    assert {key.rpartition(".")[0] for key in result.state_dict()} == {"q_t"}
    right(model, result)


def test_two_blocks_have_a_call_each() -> None:
    model = nn.Sequential(Attention(), nn.LayerNorm(24), Attention(bias=(False,) * 3)).eval()
    result = quick(model, torch.randn(2, 7, 24))
    assert calls(result) == [(20, 20, 37), (24,)] * 2
    right(model, result)
    again = torch.fx.GraphModule(result, result.graph)
    x = torch.randn(2, 7, 24)
    assert torch.equal(again(x), result(x))


def test_without_the_c_kernels() -> None:
    program = "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    env = {**os.environ, "FXPRUNE_NATIVE": "0"}
    tests = ["tests/lower/test_share.py::test_q_k_and_v_are_one_call", "tests/lower/test_nonzeros.py"]
    chosen = ["-k", "one_call or fresh or (separate and 65) or parts_with or wrong_arguments"]
    command = [sys.executable, "-c", program, *tests, *chosen]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
