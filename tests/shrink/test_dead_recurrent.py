"""Exact removal around recurrent layers, whose units stay zero where all their rows are, and through einsum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.shrink.dead_oracle import removed, routes, sequence, shapes, shuffled, vectors, zero

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)}
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


class Recurrent(nn.Module):
    """A recurrent layer of 8 units with a linear layer in front and behind."""

    def __init__(self, kind: str, width: int, **more: Any) -> None:
        super().__init__()
        self.first = nn.Linear(width, 6)
        self.layer: Any = KINDS[kind](6, 8, batch_first=True, **more)
        sides = 2 if self.layer.bidirectional else 1
        self.last = nn.Linear((self.layer.proj_size or 8) * sides, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x))[0])


def model_and_input(kind: str, **more: Any) -> tuple[Recurrent, Tensor]:
    x = sequence()
    model = shuffled(Recurrent(kind, x.shape[-1], **more))
    assert isinstance(model, Recurrent)
    return model, x


@torch.no_grad()
def silence(layer: nn.RNNBase, units: list[int], gates: int, only: str = "") -> None:
    """Zeros for all that computes these units."""
    for name, parameter in layer.named_parameters():
        if only in name:
            parameter.view(gates, 8, -1)[:, units] = 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "both_ways", "bias"), [(1, False, True), (1, True, False), (2, True, True)])
def test_silent_units_leave(kind: str, layers: int, both_ways: bool, bias: bool) -> None:
    model, x = model_and_input(kind, num_layers=layers, bidirectional=both_ways, bias=bias)
    silence(model.layer, [0, 3, 4], GATES[kind])
    result = removed(model, x)
    assert shapes(result)["layer.weight_hh_l0"] == (5 * GATES[kind], 5)
    assert shapes(result)["last.weight"] == (3, 10 if both_ways else 5)
    assert routes(result) == {"zero": 3}
    assert all(row.left == row.zero for row in result.report.dead.slices if "weight_hh" in row.name)


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_nothing_reads_leave(kind: str) -> None:
    model, x = model_and_input(kind)
    zero(model.last.weight, into=[1, 2])
    zero(model.layer.weight_hh_l0, into=[1, 2])
    result = removed(model, x)
    assert shapes(result)["layer.weight_ih_l0"] == (6 * GATES[kind], 6) and routes(result) == {"read by nothing": 2}


def test_inputs_that_no_gate_reads_leave() -> None:
    model, x = model_and_input("gru")
    zero(model.layer.weight_ih_l0, into=[0, 5])
    assert shapes(removed(model, x))["first.weight"] == (4, x.shape[-1])


def test_a_unit_with_one_gate_left_stays() -> None:
    for gate in range(4):
        model, x = model_and_input("lstm")
        silence(model.layer, [2], 4)
        with torch.no_grad():
            model.layer.bias_hh_l0.view(4, 8)[gate, 2] = 1
        assert routes(removed(model, x)) == {}


@pytest.mark.parametrize("only", ["l0", "l1", "reverse", "weight", "ih"])
def test_a_unit_that_is_not_silent_everywhere_stays(only: str) -> None:
    model, x = model_and_input("gru", num_layers=2, bidirectional=True)
    silence(model.layer, [1, 6], 3, only)
    assert shapes(removed(model, x))["layer.weight_hh_l0"] == (24, 8)


def test_a_projected_layer_stays() -> None:
    model, x = model_and_input("lstm", proj_size=5)
    with torch.no_grad():
        for name, parameter in model.layer.named_parameters():
            if "hr" not in name:
                parameter.view(4, 8, -1)[:, :2] = 0
    assert shapes(removed(model, x))["layer.weight_ih_l0"] == (32, 6)


class Begun(nn.Module):
    """A GRU whose state begins as the input says, or at a number."""

    def __init__(self, number: float | None) -> None:
        super().__init__()
        self.layer, self.last, self.number = nn.GRU(12, 8), nn.Linear(8, 3), number

    def forward(self, x: Tensor) -> Tensor:
        state = x[None, :, :8] if self.number is None else torch.full((1, x.shape[0], 8), self.number)
        return self.last(self.layer(x.expand(4, -1, -1), state.contiguous())[0])


@pytest.mark.parametrize(("number", "left"), [(0.0, 6), (0.5, 8), (None, 8)])
def test_what_a_state_begins_as(number: float | None, left: int) -> None:
    model = shuffled(Begun(number))
    silence(model.layer, [0, 1], 3)  # pyright: ignore[reportArgumentType]
    assert shapes(removed(model, vectors()))["last.weight"] == (3, left)


class Einsum(nn.Module):
    def __init__(self, equation: str, *shape: int) -> None:
        super().__init__()
        self.first, self.weight, self.equation = nn.Linear(12, 8), nn.Parameter(torch.randn(shape)), equation

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, torch.relu(self.first(x)), self.weight)


@pytest.mark.parametrize(("equation", "shape"), [("bi,oi->bo", (5, 8)), ("bi,iko->bko", (8, 2, 3)), ("bi,i->b", (8,))])
def test_what_einsum_multiplies_by_zero_leaves(equation: str, shape: tuple[int, ...]) -> None:
    model: Any = shuffled(Einsum(equation, *shape))
    letter = equation.split(",")[1].index("i")
    with torch.no_grad():
        model.weight.movedim(letter, 0)[[1, 2]] = 0
        model.first.weight[[4, 5]] = 0
        model.first.bias[4], model.first.bias[5] = -1, 1
    # Behind the relu one is zero, and the other one a constant, which einsum reads.
    result = removed(model, vectors())
    assert shapes(result)["first.weight"] == (5, 12) and routes(result) == {"zero": 3}
