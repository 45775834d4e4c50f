"""Structured pruning of recurrent layers: units leave with all their gates, in every layer and direction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Channels, Plan, Rule
from tests.structured_oracle import net, right, shrunk, sizes


def last_step(m: Any, x: Tensor) -> Tensor:
    return m.head(m.layer(m.stem(x))[0])


RECURRENT = {
    "lstm": (nn.LSTM, {}),
    "stacked lstm": (nn.LSTM, {"num_layers": 2}),
    "bidirectional lstm": (nn.LSTM, {"bidirectional": True}),
    "stacked bidirectional lstm": (nn.LSTM, {"num_layers": 3, "bidirectional": True}),
    "lstm without biases": (nn.LSTM, {"bias": False}),
    "gru": (nn.GRU, {}),
    "stacked bidirectional gru": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "rnn": (nn.RNN, {"num_layers": 2}),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers(kind: str) -> None:
    """The units of all layers and directions leave together, with every gate, and so do the inputs before them."""
    make, settings = RECURRENT[kind]
    layer = make(12, 16, batch_first=True, **settings)
    directions, gates = 1 + layer.bidirectional, layer.weight_ih_l0.shape[0] // 16
    model = net(last_step, stem=nn.Linear(10, 12), layer=layer, head=nn.Linear(16 * directions, 5))
    result = right(model, torch.randn(3, 7, 10), other=torch.randn(5, 7, 10))
    got = sizes(result)
    assert got["stem.weight"] == (6, 10) and got["head.weight"] == (5, 8 * directions)
    assert got["layer.weight_ih_l0"] == (8 * gates, 6) and got["layer.weight_hh_l0"] == (8 * gates, 8)
    last = f"layer.weight_ih_l{layer.num_layers - 1}" + "_reverse" * (directions - 1)
    assert got[last] == (8 * gates, 6 if layer.num_layers == 1 else 8 * directions)
    gone = dict(result.report.removed["layer.weight_ih_l0"])[0].view(gates, 8)
    assert torch.equal(gone - 16 * torch.arange(gates)[:, None], gone[:1].expand(gates, 8))


def test_a_recurrent_layer_whose_state_is_an_output_keeps_its_units() -> None:
    model = net(lambda m, x: m.layer(m.stem(x)), stem=nn.Linear(10, 12), layer=nn.LSTM(12, 16, batch_first=True))
    result = right(model, torch.randn(3, 7, 10), other=torch.randn(5, 7, 10))
    assert sizes(result)["layer.weight_ih_l0"] == (64, 6) and sizes(result)["layer.weight_hh_l0"] == (64, 16)


def test_a_recurrent_layer_from_a_given_state_keeps_its_units() -> None:
    model = net(lambda m, x, h: m.head(m.layer(x, h)[0]), layer=nn.GRU(10, 16, batch_first=True), head=nn.Linear(16, 5))
    plan = Plan([Rule("layer.weight_ih_l0", Channels(0.5))])
    with pytest.raises(fxprune.FxPruneError, match="graph input"):
        shrunk(model, torch.randn(3, 7, 10), torch.randn(1, 3, 16), plan=plan)


def test_a_cell_in_a_loop() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 16), x.new_zeros(x.shape[0], 16)
        for step in m.stem(x).unbind(1):
            state = m.cell(step, state)
        return m.head(state[0])

    model = net(forward, stem=nn.Linear(10, 12), cell=nn.LSTMCell(12, 16), head=nn.Linear(16, 5))
    got = sizes(right(model, torch.randn(3, 4, 10), other=torch.randn(5, 4, 10)))
    assert got["cell.weight_ih"] == (32, 6) and got["cell.weight_hh"] == (32, 8) and got["head.weight"] == (5, 8)
