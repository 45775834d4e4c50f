"""transform against the oracle: kinds of weights and biases, and the ops that multiply by them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import Plan, Rule, Unstructured
from tests.oracle import HALF, Apply, assert_right, quick, snapshot
from tests.transform.transform_models import compiled_code_does_not_pile_up as compiled_code_does_not_pile_up

# --- weights -----------------------------------------------------------------------------------------------------


def test_zero_rows_a_zero_weight_and_no_bias() -> None:
    layers = nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24, bias=False), nn.Linear(24, 8)
    model: Any = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[0].weight[3:9] = 0
        model[0].weight[:, 2] = 0
        model[2].weight.zero_()
    for plan in (None, HALF, Plan([Rule("*", Unstructured(1.0))])):
        result = quick(model, torch.randn(5, 16), plan=plan)
        assert_right(result, model, torch.randn(7, 16))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(self.embedding(ids)))))


def test_tied_weights() -> None:
    model, ids = Tied().eval(), torch.randint(0, 50, (2, 9))
    before = snapshot(model)
    result = quick(model, ids, plan=Plan([*HALF.rules, Rule("embedding.weight", Unstructured(0.5))]))
    assert snapshot(model) == before
    assert sorted(w.name for w in result.report.weights) == ["embedding.weight", "first.weight"]
    assert result.report["first.weight"].layout == "nonzeros"
    assert result.report["embedding.weight"].layout == "dense"
    assert "embedding" in str(result.report)
    assert_right(result, model, ids)
    by_alias = quick(model, ids, plan=Plan([Rule("second.weight", Unstructured(0.9))]))
    assert by_alias.report["first.weight"].reached == pytest.approx(0.9, abs=0.01)
    assert_right(by_alias, model, ids)


def test_a_module_used_twice() -> None:
    model = Apply(lambda linear, x: linear(torch.relu(linear(x))) + F.silu(linear(x[:, :1]))).eval()
    result = quick(model, torch.randn(3, 5, 16))
    assert result.report["linear.weight"].layout == "nonzeros"
    assert len(result.report["linear.weight"].lowered.nodes) == 3
    assert_right(result, model, torch.randn(4, 5, 16))


def test_float64_and_bfloat16_stay_dense() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval().to(dtype)
        x = torch.randn(5, 16, dtype=dtype)
        result = quick(model, x)
        assert {w.layout for w in result.report.weights} == {"dense"}
        assert all(str(dtype) in w.refused["nonzeros"] for w in result.report.weights)
        assert str(dtype) in str(result.report)
        assert_right(result, model, x)
        assert_right(result, model, torch.randn(9, 16, dtype=dtype))


class Products(nn.Module):
    """Weights as [i, o] or [o, i] under the ops that multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Parameter(torch.randn(16, 24)) for _ in range(4))
        self.e = nn.Parameter(torch.randn(24, 16))
        self.bias = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        return (
            torch.addmm(self.bias, flat, self.a),
            torch.mm(flat, self.b),
            x @ self.c + self.bias,
            torch.einsum("...i,io->...o", x, self.d),
            x @ self.e.t(),
        )


def test_every_op_that_multiplies_by_a_constant() -> None:
    model = Products().eval()
    result = quick(model, torch.randn(2, 3, 16))
    layouts = {w.name: w.layout for w in result.report.weights}
    assert {layouts[name] for name in "abce"} == {"nonzeros"}
    assert_right(result, model, torch.randn(4, 3, 16))


def test_a_weight_that_multiplies_from_the_left_and_the_right() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w + (self.w @ x.t()).t() + x @ (self.w.t() @ self.w)

    model = Both().eval()
    result = quick(model, torch.randn(3, 16))
    assert result.report["w"].layout == "dense"
    assert_right(result, model, torch.randn(5, 16))


class OddBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.one = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(1))
        self.both = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scaled = torch.addmm(self.one.expand(8), x, self.weight.t(), beta=0.5, alpha=2)
        return (
            F.linear(x, self.weight, self.one),
            F.linear(x, self.weight, self.one.expand(8)),
            scaled,
            torch.addmm(self.both, x[:3], self.weight.t()),
        )


def test_a_bias_that_broadcasts_keeps_the_weight_dense() -> None:
    model = OddBias().eval()
    result = quick(model, torch.randn(4, 16))
    assert result.report["weight"].layout == "dense"
    assert_right(result, model, torch.randn(6, 16))


def test_a_bias_computed_from_the_input() -> None:
    model = Apply(lambda linear, x: F.linear(x, linear.weight, x.mean(0))).eval()
    assert_right(quick(model, torch.randn(3, 16)), model, torch.randn(5, 16))


def test_a_weight_that_leaves_the_graph_as_an_output() -> None:
    model = Apply(lambda linear, x: (linear(x), linear.weight.sum())).eval()
    assert_right(quick(model, torch.randn(3, 16)), model, torch.randn(3, 16))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_stacks(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 70), min_size=2, max_size=5), label="widths")
    torch.manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers.append(nn.Linear(i, o, bias=data.draw(st.booleans(), label="bias")))
        activation = data.draw(st.sampled_from(["none", "relu", "gelu", "tanh", "silu", "norm"]), label="activation")
        layers += {
            "none": [], "relu": [nn.ReLU()], "gelu": [nn.GELU()], "tanh": [nn.GELU(approximate="tanh")],
            "silu": [nn.SiLU()], "norm": [nn.LayerNorm(o)],
        }[activation]  # fmt: skip
    model = nn.Sequential(*layers).eval()
    amount = data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), label="amount")
    scope = data.draw(st.sampled_from(["local", "global"]), label="scope")
    tokens = data.draw(st.integers(1, 20), label="tokens")
    result = quick(model, torch.randn(tokens, widths[0]), plan=Plan([Rule("*", Unstructured(amount), scope=scope)]))
    assert_right(result, model, torch.randn(data.draw(st.integers(1, 70), label="other"), widths[0]))
