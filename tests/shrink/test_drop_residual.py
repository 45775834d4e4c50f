"""Which blocks are residual, and which of its inputs such a block hands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tests.oracle import assert_close
from tests.shrink.drop_models import Apply, Between, D, dropped, find_block, program_of, refused, replaced, run


def relu_between(linear: nn.Module, x: Tensor) -> Tensor:
    return F.relu(F.relu(x + linear(x)) + linear(x))


def transposed(linear: nn.Module, x: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    return (y + linear(y)).permute(1, 0, 2)


def regrouped(linear: nn.Module, x: Tensor) -> Tensor:
    y = x.reshape(x.shape[0], -1, D // 2).transpose(1, 2).flatten(1)
    y = y + linear(y.view(x.shape)).view(y.shape)
    return y.unflatten(1, (D // 2, -1)).transpose(1, 2).reshape(x.shape)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


RESIDUAL: dict[str, Callable[..., Tensor]] = {
    "either operand": lambda linear, x: linear(x) + x,
    "in place": lambda linear, x: linear(x).add_(x),
    "alpha": lambda linear, x: torch.add(x, linear(x), alpha=0.5),
    "scaled": lambda linear, x: 2 * x + linear(x) / 3,
    "scaled by a parameter": lambda linear, x: x * linear.bias + linear(x),
    "shifted by a parameter": lambda linear, x: x + linear.bias + linear(x),
    "dropout": lambda linear, x: F.dropout(x + F.dropout(linear(x), 0.1, False), 0.1, False),
    "activations": relu_between,
    "cast": lambda linear, x: (x.double() + linear(x).double()).float(),
    "clone": lambda linear, x: x.clone().add_(linear(x)).contiguous(),
    "post-norm": lambda linear, x: F.layer_norm(x + linear(x), (D,)),
    "group norm": lambda linear, x: F.group_norm((x + linear(x)).flatten(0, 1), 2).view(x.shape),
    "hand-written pre-norm": lambda linear, x: x + linear(rms(x)),
    "hand-written norm of the branch": lambda linear, x: x + rms(linear(rms(x))),
    "two branches": lambda linear, x: x + linear(x).tanh() + linear(x.tanh()),
    "gated branch": lambda linear, x: x + torch.sigmoid(linear(x)) * x,
    "sequence first": transposed,
    "views": regrouped,
    "returned twice": lambda linear, x: x + linear(x),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_ways_that_are_residual(name: str) -> None:
    def call(block: nn.Module, x: Tensor) -> Any:
        y = block(x)
        return (y, 2 * y, y) if name == "returned twice" else y

    model, x = Between(Apply(RESIDUAL[name]), call), torch.randn(3, 4, D)
    result = dropped(model, ["block"], x)
    assert {name.split(".")[0] for name, _ in result.named_parameters()} == {"before", "after"}
    eager = replaced(model, ["block"])
    for batch in (3, 5):
        x = torch.randn(batch, 4, D)
        assert_close(run(result, x), run(eager, x))


NOT_RESIDUAL: dict[str, tuple[Callable[..., Any], str]] = {
    "no sum": (lambda linear, x: linear(x).relu(), "no residual sum found: the ways back from relu end at linear_1"),
    "no branch": (lambda linear, x: F.layer_norm(x, (D,)).relu(), "no branch is added on the way from linear to relu"),
    "bias only": (lambda linear, x: x + linear.bias, "no branch is added"),
    "table": (lambda linear, x: x + linear(torch.arange(4 * D).float().view(4, D)), "no branch is added"),
    "doubled": (lambda linear, x: x + x, "no branch is added"),
    "projection": (lambda linear, x: linear(x) + linear(x.relu()), "end at linear_1 (aten.linear.default), linear_2"),
    "gate": (lambda linear, x: x * torch.sigmoid(linear(x)), "end at mul (aten.mul.Tensor)"),
    "post-norm by hand": (lambda linear, x: rms(x + linear(x)), "end at mul"),
    "other shape": (
        lambda linear, x: linear(x).mean(1) + x.mean(1), "its shape changes from linear [s"
    ),
    "other order": (
        lambda linear, x: (x + linear(x)).unflatten(2, (2, 4)).transpose(2, 3).flatten(2), "on cpu becomes flatten"
    ),
    "other type": (lambda linear, x: (x + linear(x)).double().mul(2.0), "float32 on cpu becomes mul"),
    "broadcast": (lambda linear, x: x.mean(1, keepdim=True) + linear(x), "end at linear_1"),
    "two tensors": (
        lambda linear, x: (x + linear(x), x.exp()), "2 tensors leave it: add (read by linear_2), exp (read by linear_3)"
    ),
    "a number": (lambda linear, x: (x + linear(x), x[0, 0, 0].item()), "2 tensors leave it"),
    "a list": (lambda linear, x: (x + linear(x)).split(2, 1), "2 tensors leave it"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_RESIDUAL)
def test_blocks_that_are_not_residual(name: str) -> None:
    function, why = NOT_RESIDUAL[name]

    def call(block: nn.Module, x: Tensor) -> Any:
        return pytree.tree_map(lambda y: y if isinstance(y, Tensor) else x * y, block(x))

    model = Between(Apply(function), call)
    model.after.double() if name == "other type" else None
    assert why in refused(model, "block", torch.randn(3, 4, D)).why


class Two(nn.Module):
    """`block` on two tensors."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.block = nn.Linear(D, D), nn.Linear(D, D), Apply(function)

    def forward(self, x: Tensor) -> Any:
        return self.block(self.a(x), self.b(x)).tanh()


@pytest.mark.parametrize(
    ("function", "entry"),
    [
        (lambda linear, x, y: x + linear(y), "linear"),
        (lambda linear, x, y: y + linear(x), "linear_1"),
        (lambda linear, x, y: F.layer_norm(x, (D,)) + linear(x) + y, "linear_1"),
        (lambda linear, x, y: F.layer_norm(x, (D,)) + linear(y * F.layer_norm(y, (D,))), "linear"),
        (lambda linear, x, y: (x * y.sum(-1, keepdim=True)) + linear(x) + y, "linear_1"),
    ],
)
def test_of_two_inputs_the_sums_and_then_the_fewest_norms_tell(function: Callable[..., Tensor], entry: str) -> None:
    model, x = Two(function), torch.randn(3, D)
    assert find_block(program_of(model, x), "block").calls[0].entry == entry
    dropped(model, ["block"], x)


def test_inputs_that_cannot_be_told_apart() -> None:
    error = refused(Two(lambda linear, x, y: x + y + linear(x)), "block", torch.randn(3, D))
    assert "cannot be told apart" in error.why and "linear and linear_1" in error.why
    error = refused(Two(lambda linear, x, y: x + y), "block", torch.randn(3, D))
    assert "no branch is added" in error.why


def test_a_decoder_starts_from_zeros() -> None:
    def start(block: nn.Module, x: Tensor) -> Tensor:
        return x + block(torch.zeros_like(x), x)

    model, x = (
        Between(Apply(lambda linear, q, x: F.layer_norm(q + linear(q) + linear(x), (D,))), start),
        torch.randn(3, D),
    )
    result = dropped(model, ["block"], x)
    assert_close(run(result, x), run(replaced(model, ["block"]), x))


def test_a_table_of_the_inputs_shape_is_not_taken_for_the_input() -> None:
    def call(block: nn.Module, x: Tensor) -> Tensor:
        return block(x, torch.arange(x.numel()).float().view(x.shape))

    model, x = Between(Apply(lambda linear, x, table: x + table + linear(x)), call), torch.randn(3, D)
    result = dropped(model, ["block"], x)
    assert_close(run(result, x), run(replaced(model, ["block"]), x))
