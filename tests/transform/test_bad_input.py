"""Bad input: a clear error in four parts, and nothing changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import fxprune
from fxprune import FxPruneError, Plan, Rule, Unstructured
from fxprune.errors import CaptureError, CheckError, InputError, PlanError
from fxprune.select.selection import Selection
from tests.oracle import HALF, QUICK, quick, snapshot


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16))
        self.table = nn.Parameter(torch.arange(6).reshape(2, 3), requires_grad=False)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) + self.table.sum()


def encoder() -> Any:
    return Encoder().eval()


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def refused(
    kind: type[FxPruneError], model: nn.Module, act: Callable[[], Any], *words: str, where: str | None = None
) -> FxPruneError:
    """The error that `act` raises: of this kind, in four parts, with these words, and with the model as it was."""
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        act()
    error = caught.value
    assert error.what and error.why and error.do, error
    text = str(error)
    for part in (error.what, error.where, error.why.rstrip("."), error.do):
        assert part in text
    for word in words:
        assert word in text, text
    if where is not None:
        assert where in error.where
    assert snapshot(model) == before
    return error


# --- plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [(X,), None], ids=["with example inputs", "pending"])
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("encoder.0.wieght", ("encoder.0.weight",)),
        ("encoders.*.weight", ("encoder.0.weight",)),
        ("*.kernel", ("*.kernel",)),
        ("Encoder.0.weight", ("encoder.0.weight",)),
    ],
)
def test_names_that_bind_nothing_list_near_ones(examples: Any, pattern: str, words: tuple[str, ...]) -> None:
    model = encoder()
    plan = Plan([Rule(pattern, Unstructured(0.5))])
    refused(PlanError, model, lambda: fxprune.transform(model, plan, examples, progress=False), *words, where=pattern)


@pytest.mark.parametrize("amount", [math.nan, -0.1, -1, 1.5, True, False, math.inf, "0.5", None])
def test_amounts_that_are_none(amount: Any) -> None:
    model = encoder()
    error = refused(PlanError, model, lambda: Unstructured(amount))
    assert repr(amount) in error.what


@pytest.mark.parametrize("scope", ["local", "global"])
def test_an_int_larger_than_the_weight(scope: str) -> None:
    model = encoder()
    plan = Plan([Rule("encoder.*.weight", Unstructured(16 * 24 * 2 + 1), scope=scope)])
    refused(PlanError, model, lambda: quick(model, X, plan=plan), "there are only")


@pytest.mark.parametrize("examples", [(X,), None], ids=["with example inputs", "pending"])
def test_a_parameter_that_is_not_floating_point(examples: Any) -> None:
    model = encoder()
    plan = Plan([Rule("table", Unstructured(0.5))])
    act = lambda: fxprune.transform(model, plan, examples, options=QUICK, progress=False)  # noqa: E731
    refused(PlanError, model, act, "int64 is not floating point", where="table")


def test_a_wildcard_passes_over_what_it_cannot_use_and_says_so() -> None:
    result = quick(encoder(), X)
    assert [w.name for w in result.report.weights] == ["encoder.0.weight", "encoder.2.weight"]
    assert any("int64 is not floating point" in note for note in result.report.notes)


def test_a_layer_norm_by_full_name() -> None:
    model = encoder()
    plan = Plan([Rule("encoder.1.weight", Unstructured(0.5))])
    refused(PlanError, model, lambda: quick(model, X, plan=plan), "1-D", where="encoder.1.weight")


def test_what_is_no_plan_and_what_cannot_go_together() -> None:
    model = encoder()
    with pytest.raises(InputError, match="as a plan"):
        fxprune.transform(model, {"encoder.*": 0.5}, (X,))  # pyright: ignore[reportArgumentType]
    refused(InputError, model, lambda: quick(model, X, selection=Selection()), "plan and a selection")
    refused(InputError, model, lambda: fxprune.transform(model, trainable=True), "trainable")
    both = {"plan": None, "selection": Selection(), "calibration": [X]}
    refused(InputError, model, lambda: quick(model, X, **both), "selection and calibrate")
    refused(InputError, model, lambda: fxprune.transform(model, calibration=[X]), "example inputs")


def test_a_selection_of_another_model() -> None:
    model, other = encoder(), nn.Sequential(nn.Linear(16, 8)).eval()
    theirs = quick(other, X).selection
    refused(InputError, model, lambda: quick(model, X, plan=None, selection=theirs), where="0.weight")
    wider = nn.Sequential(nn.Linear(16, 9)).eval()
    refused(InputError, wider, lambda: quick(wider, X, plan=None, selection=theirs), "[8, 16]", where="[9, 16]")


# --- example inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("examples", "kwargs", "words"),
    [
        ((), None, ("forward() missing",)),
        ((torch.randn(4, 15),), None, ("[4, 15]",)),
        ((torch.ones(4, 16, dtype=torch.long),), None, ("int64",)),
        ((torch.randn(4, 16, device="meta"),), None, ("meta",)),
        ((X, X), None, ("positional",)),
        ((X,), {"y": X}, ("'y'",)),
        (X, None, ("one tensor",)),
        ("x", None, ("str",)),
        ((X,), [X], ("list",)),
        ((None,), None, ("NoneType",)),
    ],
)
def test_example_inputs_that_do_not_fit(examples: Any, kwargs: Any, words: tuple[str, ...]) -> None:
    model = encoder()
    refused(InputError, model, lambda: fxprune.transform(model, HALF, examples, kwargs, progress=False), *words)


def test_the_models_own_error_is_the_cause() -> None:
    model = encoder()
    error = refused(InputError, model, lambda: quick(model, torch.randn(4, 15)))
    assert isinstance(error.__cause__, RuntimeError)


# --- models ------------------------------------------------------------------------------------------------------


def test_what_is_no_model() -> None:
    for thing in (lambda x: x, torch.ones(2), None):
        with pytest.raises(InputError, match="cannot transform a"):
            fxprune.transform(thing, HALF, (X,))  # pyright: ignore[reportArgumentType]
    model = encoder()
    compiled: Any = torch.compile(model)
    refused(InputError, model, lambda: quick(compiled, X), "compiled")


def test_a_model_in_training_mode() -> None:
    model = encoder().train()
    refused(InputError, model, lambda: quick(model, X), ".eval()")
    refused(InputError, model, lambda: fxprune.transform(model, HALF), ".eval()")
    model = encoder()
    model.encoder[1].train()
    refused(InputError, model, lambda: quick(model, X), where="encoder.1")


def test_an_exported_program_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5)).train()
    exported = torch.export.export(model, (X,))
    with pytest.raises(InputError, match="training mode"):
        fxprune.transform(exported, HALF, (X,), options=QUICK, progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("hooks", [False, True])
def test_weights_that_are_not_finite(value: float, hooks: bool) -> None:
    model = encoder()
    with torch.no_grad():
        model.encoder[2].weight[1, 3] = value
    if hooks:
        torch_prune.identity(model.encoder[2], "weight")
    refused(InputError, model, lambda: quick(model, X), "1 of 384", where="encoder.2.weight")


def test_weights_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 8)).eval()
    for examples in ((X,), None):
        with pytest.raises(InputError, match=r"meta device.*to_empty"):
            fxprune.transform(model, HALF, examples)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line to name
            return self.linear(x)
        return -self.linear(x)


def test_a_model_that_export_cannot_capture_names_the_line() -> None:
    model = Branches().eval()
    before = dict(vars(X))
    error = refused(CaptureError, model, lambda: quick(model, X), "test_bad_input.py", "torch.export", where="Branches")
    assert "x.sum() > 0" in error.where
    assert error.__cause__ is not None and not isinstance(error.__cause__, FxPruneError)
    assert vars(X) == before


class Forward(nn.Module):
    state: Tensor

    def __init__(self, act: Callable[[Forward, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(16, 16), act
        self.register_buffer("state", torch.zeros(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x)


def keeps(self: Forward, x: Tensor) -> Tensor:
    self.state[1].add_(1)
    return self.linear(x)


def uses(self: Forward, x: Tensor) -> Tensor:
    self.state += 1
    return self.linear(x) * self.state[0]


@pytest.mark.parametrize("forward", [keeps, uses])
def test_a_model_that_keeps_state(forward: Any) -> None:
    model = Forward(forward).eval()
    refused(InputError, model, lambda: quick(model, X), "keeps state", where="state")
    assert not model.state.any()


def test_a_model_that_draws_random_numbers() -> None:
    model = Forward(lambda self, x: self.linear(x) + torch.rand_like(x)).eval()
    refused(CheckError, model, lambda: quick(model, X), "random numbers")


# --- calls of the result -----------------------------------------------------------------------------------------


def test_calls_that_do_not_fit() -> None:
    model = encoder()
    result = quick(model, X)
    for args in ((torch.randn(4, 15),), (X.double(),), (X[0],), (X[None],), (), (X, X), (None,), ([X],)):
        refused(InputError, model, lambda args=args: result(*args))
    refused(InputError, model, lambda: result(X, other=1), "other")
    refused(InputError, model, lambda: result(X.to("meta")), "meta")


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"layuot": "dense"}, {"layout": "nonzero"}, {"compile": 1}, {"tune_for": 0}, {"tune_for": [True]}],
    ids=str,
)
def test_options_that_do_not_exist(options: dict[str, Any]) -> None:
    model = encoder()
    before = snapshot(model)
    with pytest.raises(InputError):
        fxprune.transform(model, HALF, (X,), options=options)
    with pytest.raises(InputError):
        fxprune.transform(model, HALF, (X,), mode="fastest")
    assert snapshot(model) == before


def test_tune_for_needs_a_dynamic_batch() -> None:
    model = Forward(lambda self, x: self.linear(x.view(4, 16))).eval()
    act = lambda: fxprune.transform(model, HALF, (X,), options={**QUICK, "tune_for": [1, 8]})  # noqa: E731
    refused(InputError, model, act, where="tune_for")


def test_an_error_is_readable_after_pickling() -> None:
    import pickle

    error = InputError("cannot", where="here", why="so", do="Do that.")
    again = pickle.loads(pickle.dumps(error))
    assert (again.what, again.where, again.why, again.do) == ("cannot", "here", "so", "Do that.")
    assert str(again) == "cannot at here: so. Do that."


def test_a_model_of_torchscript() -> None:
    for model in (torch.jit.script(nn.Linear(4, 4)), torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4))):
        with pytest.raises(InputError, match="TorchScript") as error:
            fxprune.transform(model.eval(), None, (torch.randn(2, 4),))
        assert error.value.where == "Linear" and error.value.do
