"""transform leaves the user's model, its hooks, random numbers and inputs as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Plan, Rule, Unstructured
from fxprune.errors import FxPruneError, InputError
from tests.oracle import HALF, assert_right, quick, snapshot
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


class Busy(nn.Module):
    """Writes to whatever it has while it runs, and answers the same each time."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.register_buffer("seen", torch.zeros(3))
        self.log: list[Any] = []
        self.sizes: dict[str, Any] = {"all": [set()]}

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(tuple(x.shape))
        self.sizes["all"][0].add(x.shape[-1])
        self.sizes["last"] = self.log
        torch.rand(2)
        if not torch.compiler.is_exporting():
            self.seen.data.add_(1)
            self.linear.bias.data = self.linear.bias.data.clone()
            torch.set_default_dtype(torch.float64)
        return self.linear(x)


def busy() -> tuple[Busy, Any]:
    model = Busy().eval()
    return model, lambda: (
        snapshot(model),
        list(model.log),
        {name: [set(each) for each in value] for name, value in model.sizes.items()},
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
    )


def _loss(y: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(y.float(), target)


RUNS: dict[str, Any] = {
    "transform": lambda model, x: quick(model, x),
    "unchecked": lambda model, x: quick(model, x, check=False),
    "analyze": lambda model, x: fxprune.analyze(model, (x,)),
    "calibrate": lambda model, x: fxprune.calibrate(model, HALF, [(x,), (x + 1,)], progress=False),
    "gradient_score": lambda model, x: fxprune.gradient_score.taylor(
        model, [(x, torch.zeros(3, 8))], _loss, progress=False
    ),
    "trainable": lambda model, x: fxprune.transform(model, HALF, (x,), trainable=True, progress=False),
}


@pytest.mark.parametrize("name", RUNS)
def test_whatever_the_model_writes_to_is_put_back(name: str) -> None:
    model, seen = busy()
    x = torch.randn(3, 16)
    before = seen()
    RUNS[name](model, x)
    assert seen() == before


class Statistics(nn.Module):
    """A batch-norm of the batch, whatever the mode: its statistics move with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.linear(x), self.norm.running_mean, self.norm.running_var, training=True)


@pytest.mark.parametrize("traced", [False, True])
def test_a_model_that_is_refused_for_its_statistics_keeps_them(traced: bool) -> None:
    model: Any = Statistics().eval()
    if traced:
        model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)).train())
        assert model.training
    before = snapshot(model)
    with pytest.raises(InputError, match=r"training mode|keeps state"):
        quick(model, torch.randn(4, 16))
    assert snapshot(model) == before


def test_an_embedding_that_is_renormalised_is_refused_as_it_was() -> None:
    model = nn.Sequential(nn.Embedding(20, 16, max_norm=0.1), nn.Linear(16, 8)).eval()
    before = snapshot(model)
    with pytest.raises(FxPruneError, match="keeps state"):
        quick(model, torch.arange(6))
    assert snapshot(model) == before


def test_random_scores_move_the_random_stream() -> None:
    """What the user asks to be drawn is drawn anew each time."""
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    plan = Plan([Rule("*", Unstructured(0.5, score="random"))])
    masks = [quick(model, torch.randn(3, 16), plan=plan).selection.mask["0.weight"].unpack() for _ in range(2)]
    assert not torch.equal(*masks)
