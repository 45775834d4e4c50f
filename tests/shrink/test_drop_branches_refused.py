"""Modules that are neither residual blocks nor branches: what the errors say, and what could go instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tests.shrink.branch_models import W, between, ffn
from tests.shrink.drop_models import TEXT, Apply, bert, captured, ids, refusal, refused


def later_view(m: Any, x: Tensor) -> Tensor:
    view = x.view(x.shape)
    x += m.branch(x)
    return x * view


# The stream is `linear`, the branch's output `linear_1`.
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "added twice": (lambda m, x: (lambda y: x + y + y)(m.branch(x)), "more than one sum adds linear_1: add and add_1"),
    "two streams": (
        lambda m, x: (lambda y: (x + y) * (x.exp() + y))(m.branch(x)), "more than one sum adds linear_1: add and add_1"
    ),
    "also returned": (
        lambda m, x: (lambda y: (x + y, y))(m.branch(x)), "linear_1 leads to linear_3 (aten.linear.default)"
    ),
    "broadcast": (lambda m, x: x + m.branch(x[:, :1]), "add broadcasts or casts: linear_1 [s"),
    "broadcasts the stream": (lambda m, x: x[:, :1] + m.branch(x), "add broadcasts or casts: linear_1 [s"),
    "of another type": (lambda m, x: (x + m.branch(x).double()).float(), "add broadcasts or casts: to [s"),
    "multiplied with another branch": (
        lambda m, x: x + m.branch(x) * m.other(x), "with linear_2, which is computed from linear, to which it is added"
    ),
    "multiplied with the stream": (lambda m, x: x + m.branch(x) * x, "multiplied with linear, which"),
    "written into another branch": (lambda m, x: x + x.exp().mul_(m.branch(x)), "multiplied with exp, which"),
    "alpha of the stream": (lambda m, x: torch.add(m.branch(x), x, alpha=2), "add takes linear times alpha=2"),
    "subtracted from": (lambda m, x: m.branch(x) - x, "linear_1 leads to sub (aten.sub.Tensor)"),
    "only shifted": (lambda m, x: m.branch(x) + 1.0, "linear_1 leads to add (aten.add.Tensor)"),
    "activated": (lambda m, x: x + m.branch(x).relu(), "linear_1 leads to relu (aten.relu.default)"),
    "normed": (lambda m, x: x + m.norm(m.branch(x)), "linear_1 leads to layer_norm (aten.layer_norm.default)"),
    "read beside": (
        lambda m, x: (lambda y: x + y + y.mean())(m.branch(x)), "mean (aten.mean.default), and not only into a sum"
    ),
    "in no sum": (lambda m, x: m.branch(x), "leads to linear_2"),
    "stream written, view read": (later_view, "add_ (aten.add_.Tensor) writes to linear, which mul reads later"),
}  # fmt: skip


def model_of(function: Callable[..., Any], branch: nn.Module | None = None) -> Any:
    """A net that calls `branch` by a function of (net, stream), between two linears."""
    parts = dict(branch=branch or nn.Linear(W, W), other=nn.Linear(W, W), norm=nn.LayerNorm(W))
    model = between(lambda m, x: x, **parts)
    model.function = lambda m, x: pytree.tree_map(m.head, function(m, m.stem(x)))
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_branch(name: str) -> None:
    function, why = REFUSED[name]
    error = refused(model_of(function), "branch", torch.randn(3, 6, W))
    assert error.why.startswith("no residual sum found: ") and "nor is it a branch: " in error.why
    assert why in error.why


def test_a_branch_that_is_returned() -> None:
    model = model_of(lambda m, x: x + m.branch(x))
    model.function = lambda m, x: (lambda y: (m.head(x + y), y))(m.branch(x))
    assert "leads to the model's output, and not only into a sum" in refused(model, "branch", torch.randn(3, W)).why


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda linear, x: linear(x.relu_()), "2 tensors leave it: relu_ (read by add), linear_1 (read by add)"),
        (lambda linear, x: (linear(x), linear(x).exp()), "2 tensors leave it"),
        (lambda linear, x: (linear(x), x.sum().item()), "2 tensors leave it"),
    ],
)
def test_branches_that_hand_out_more(function: Any, why: str) -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        y = m.branch(x)
        return x + y[0] * y[1] if isinstance(y, tuple) else x + y

    error = refused(model_of(call, wide(function)), "branch", torch.randn(3, W))
    assert why in error.why and "nor is it" not in error.why


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda m, x: (lambda y, v: x + m.branch(y) + v)(*viewed(m.norm(x))), "writes to layer_norm, which add_1"),
        (lambda m, x: (lambda y, v: x + m.branch(v))(*viewed(x)), "writes to linear, which add reads later"),
        (lambda m, x: x + m.branch(m.input), "relu_ (aten.relu_.default) writes to args_0, which is"),
    ],
)  # fmt: skip
def test_branches_that_write_to_what_others_read(call: Any, why: str) -> None:
    def keeping(m: Any, x: Tensor) -> Tensor:
        m.__dict__["input"] = x
        return m.head(call(m, m.stem(x)))

    model = model_of(lambda m, x: x, wide(lambda linear, x: linear(x.relu_())))
    model.function = keeping
    error = refused(model, "branch", torch.randn(3, W))
    assert why in error.why and "in place" in error.do


def viewed(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.view(-1, W)


def wide(function: Callable[..., Any]) -> nn.Module:
    branch = Apply(function)
    branch.linear = nn.Linear(W, W)
    return branch


def test_one_call_that_is_no_branch_keeps_all() -> None:
    error = refused(model_of(lambda m, x: m.branch(x + m.branch(x))), "branch", torch.randn(3, W))
    assert "call 1 of 2" in error.where and "leads to linear_3" in error.why


def test_a_cache_that_leaves_is_named() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT | {"num_hidden_layers": 2}, num_key_value_heads=2))
    error = refused(model, "model.layers.1.self_attn", ids(2))
    assert "3 tensors leave it" in error.why and "read by the model's output" in error.why
    assert "use_cache=False" in error.do and "nor is it" not in error.why
    # These hand out nothing else.
    could_go = "These could go: model.layers.1.self_attn.o_proj, model.layers.1.mlp."
    assert refused(model, "model.layers.1", ids(2)).do.endswith(could_go)


def test_errors_name_branches_that_could_go_instead() -> None:
    x = torch.randn(3, 6, W)
    # Where the way on from the module ends.
    assert refused(model_of(lambda m, x: x + m.norm(m.branch(x))), "branch", x).do.endswith("These could go: norm.")
    # In the module, and none that is no branch.
    inner = between(lambda m, x: m.other(x + m.branch(x)), branch=ffn(), other=nn.Linear(W, W))
    inner.head = nn.Linear(W, W)
    model = model_of(lambda m, x: F.relu(m.branch(x)), inner)
    assert refused(model, "branch", x).do.endswith("These could go: branch.branch.")
    # What stands around it, where it is a residual block.
    error = refusal(captured(bert)[1], "encoder.layer.1.attention.self")
    assert error.do.endswith("These could go: encoder.layer.1.attention.output, encoder.layer.1.attention.")
    error = refusal(captured(bert)[1], "encoder.layer.1.attention.output.LayerNorm")
    assert "leads to" in error.why and error.do.endswith("These could go: encoder.layer.1.attention.output.")
