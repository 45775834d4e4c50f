"""Bad models, options and calls of structured pruning and of analyze, and calls of the result that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Channels, Plan, Rule
from fxprune.errors import CaptureError, InputError, PlanError
from tests.structured_oracle import shrunk
from tests.transform.bad_structured_models import Net, X, net
from tests.transform.test_bad_input import refused

# --- models and calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [lambda m: m.train(), lambda m: m.left.weight.data.fill_(math.nan)])
def test_models_that_cannot_be_transformed(spoil: Callable[[Any], Any]) -> None:
    model = net()
    spoil(model)
    refused(InputError, model, lambda: shrunk(model, X, plan=Plan([Rule("*", Channels(0.5))])))


def test_meta_is_for_analysis_only() -> None:
    with torch.device("meta"):
        model = Net().eval()
    with pytest.raises(InputError, match="meta device"):
        shrunk(model, X, plan=Plan([Rule("*", Channels(0.5))]))
    assert fxprune.analyze(model, (X,))["left.weight[0]"].free


def test_analyze_refuses_what_it_cannot_trace() -> None:
    model = net()
    refused(InputError, model, lambda: fxprune.analyze(model, X), "one tensor")  # pyright: ignore
    refused(PlanError, model, lambda: fxprune.analyze(model, (X,)).why("lift.weight", 0), where="lift.weight")
    coupling = fxprune.analyze(model, (X,))
    for dim in (2, "0", None, True, 0.0):
        refused(PlanError, model, lambda dim=dim: coupling.why("left.weight", dim), repr(dim), where="left.weight")
    for name in (3, None, ["left.weight"]):
        refused(PlanError, model, lambda name=name: coupling.why(name, 0), "no such parameter")


@pytest.mark.parametrize("model", [3, "x", None], ids=repr)
def test_analyze_refuses_what_is_no_model(model: Any) -> None:
    refused(InputError, net(), lambda: fxprune.analyze(model, (X,)), type(model).__name__)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), ("missing 1 required",)), (((torch.randn(4, 9),),), ("[4, 9]",)), (((X, X),), ("positional",))],
    ids=["none", "another shape", "too many"],
)
def test_analyze_says_that_the_model_refuses_the_call(device: str, arguments: Any, words: tuple[str, ...]) -> None:
    with torch.device(device):
        model = Net().eval()
    if device == "meta":
        with pytest.raises(InputError, match="cannot run the model on the example inputs"):
            fxprune.analyze(model, *arguments)
    else:
        refused(InputError, model, lambda: fxprune.analyze(model, *arguments), "cannot run the model", *words)


def test_analyze_of_a_model_that_runs_but_cannot_be_captured() -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    model = Branching().eval()
    refused(CaptureError, model, lambda: fxprune.analyze(model, (X,)), "Change that line")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_analyze_refuses_training_mode(device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(InputError, match=r"training mode.*model\.eval\(\)"):
        fxprune.analyze(model, (X,))
    assert fxprune.analyze(model.eval(), (X,))["0.weight[0]"].free


def test_calls_of_the_result_that_do_not_fit() -> None:
    model = net()
    result = shrunk(model, X)
    for x in (torch.randn(4, 9), X[0], X.double()):
        refused(InputError, model, lambda x=x: result(x))


@pytest.mark.parametrize("options", [[1], "compile", 3], ids=repr)
def test_options_that_are_no_dict(options: Any) -> None:
    model = net()
    refused(InputError, model, lambda: shrunk(model, X, options=options), type(options).__name__)
