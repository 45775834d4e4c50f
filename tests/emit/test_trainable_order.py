"""Trainable results hold their parameters and buffers in the order of the model, which optimisers go by."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.select.mask import PackedMask
from tests.emit.trainable_models import trainable
from tests.structured_oracle import shrunk


class Shuffled(nn.Module):
    """Declares its parts in another order than it calls them, with a tied weight and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 8)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.tied, self.unread = nn.Linear(8, 8), nn.Linear(8, 2)
        self.tied.weight = self.first[0].weight
        self.zeta, self.alpha = (nn.Parameter(torch.randn(8)) for _ in range(2))
        self.shift, self.scale = (nn.Buffer(torch.randn(8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.tied(self.first(x) * self.scale * self.alpha) + self.zeta * self.shift)


def copies(result: Any) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return [result, copy.deepcopy(result), pickle.loads(pickle.dumps(result))]


@pytest.mark.parametrize("exported", [False, True])
def test_names_come_in_the_models_order(exported: bool) -> None:
    model, x = Shuffled().eval(), torch.randn(4, 8)
    asked: Any = torch.export.export(model, (x,)) if exported else model
    for plan in (None, Plan([Rule("*", Unstructured(0.5))]), Plan([Rule("*", Channels(0.5, align=1))])):
        for other in copies(shrunk(asked, x, plan=plan, trainable=True)):
            assert [n for n, _ in other.named_parameters()] == [n for n, _ in model.named_parameters()]
            buffers = [n for n, _ in other.named_buffers() if not n.endswith("_keep")]
            assert buffers == [n for n, _ in model.named_buffers()]
            assert [n for n in other.state_dict() if not n.endswith("_keep")] == list(model.state_dict())


def test_masks_come_after_what_they_mask() -> None:
    result = trainable(Shuffled().eval(), torch.randn(4, 8), masks={"alpha": PackedMask.pack(torch.arange(8) > 3)})
    for other in copies(result):
        assert [n for n, _ in other.named_buffers(recurse=False)] == ["shift", "scale", "alpha_keep"]


def test_a_weight_stands_where_its_pruned_one_stood() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    nn.utils.parametrizations.weight_norm(model[1])
    assert [n for n, _ in model.named_parameters()][:3] == ["0.bias", "0.weight_orig", "1.bias"]
    result = shrunk(model.eval(), torch.randn(4, 8), plan=None, trainable=True)
    assert [n for n, _ in result.named_parameters()] == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_an_optimisers_state_goes_on_at_the_right_weights() -> None:
    model, x = Shuffled(), torch.randn(6, 8)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    model(x).square().sum().backward()
    optimiser.step()
    result = shrunk(model.eval(), x, plan=None, trainable=True)
    ours = torch.optim.Adam(result.parameters(), 0.01)
    ours.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for module, each in ((model, optimiser), (result, ours)):
        each.zero_grad()
        module(x).square().sum().backward()
        each.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result.get_parameter(name), parameter, rtol=1e-5, atol=1e-5)
