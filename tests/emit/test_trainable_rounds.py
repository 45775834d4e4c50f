"""Pruning again what was pruned and trained: every kind of graph trains on, round after round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune import Channels, Plan, Rule
from tests.emit.trainable_models import assert_same, net
from tests.structured_oracle import randomised, shrunk


def network() -> Any:
    return randomised(
        nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 64), nn.ReLU())
    )


def train(module: Any, x: Tensor, steps: int = 2) -> None:
    """Steps of an optimiser in train mode, each of which must move every parameter that has a gradient."""
    module.train()
    optimiser = torch.optim.AdamW(module.parameters(), 1e-2)
    for _ in range(steps):
        before = [p.detach().clone() for p in module.parameters()]
        optimiser.zero_grad()
        module(x).square().sum().backward()
        optimiser.step()
        assert all(p.grad is not None for p in module.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    module.eval()


def test_channels_leave_in_rounds() -> None:
    result, x, sizes = network(), torch.randn(8, 16), []
    for _ in range(3):
        result = shrunk(result, x, plan=Plan([Rule("*", Channels(0.25, align=1))]), trainable=True)
        sizes.append(result.get_parameter("0.weight").shape[0])
        train(result, x)
    assert sizes == [48, 36, 27]


@pytest.mark.parametrize("kind", ["symbolic_trace", "export"])
def test_a_graph_module_trains(kind: str) -> None:
    model, x = net(), torch.randn(4, 3, 6, 6)
    graph = torch.fx.symbolic_trace(model) if kind == "symbolic_trace" else torch.export.export(model, (x,)).module()
    result = shrunk(graph, x, plan=None, trainable=True)
    for module in (result, model):
        module.zero_grad()
        module(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_same(result.get_parameter(name).grad, parameter.grad)
