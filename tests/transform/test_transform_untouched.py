"""transform leaves the user's model, its hooks, random numbers and inputs as they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune import Plan, Rule, Unstructured
from tests.oracle import assert_right, quick, snapshot
from tests.transform.transform_models import compiled_code_does_not_pile_up as compiled_code_does_not_pile_up
from tests.transform.transform_models import net

# --- the user's model, random numbers and inputs stay as they were ----------------------------------------------------


def test_measuring_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(768, 1024), nn.ReLU(), nn.Linear(1024, 768)).eval()
    model[2].weight.requires_grad_(False)
    x = torch.randn(64, 768)
    kept, before, random = dict(vars(x)), snapshot(model), torch.random.get_rng_state()
    result: Any = fxprune.transform(model, Plan([Rule("*", Unstructured(0.97))]), (x,), progress=False)
    assert snapshot(model) == before
    assert torch.equal(random, torch.random.get_rng_state())
    assert vars(x) == kept
    assert_right(result, model, x)


def test_attributes_that_forward_sets_are_put_back() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls, self.last = nn.Linear(16, 8), 0, None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = self.linear(x)
            return self.last * 2

    model = Remembers().eval()
    before = snapshot(model)
    result = quick(model, torch.randn(3, 16))
    assert snapshot(model) == before and model.calls == 0 and model.last is None
    assert_right(result, model, torch.randn(3, 16))


def test_hooks_of_the_user_run_and_stay() -> None:
    model, x = net(), torch.randn(2, 7, 24)
    model.query.register_forward_hook(lambda _, __, out: out * 2)
    model.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    before = snapshot(model)
    result = quick(model, x)
    assert snapshot(model) == before
    assert_right(result, model, x)
