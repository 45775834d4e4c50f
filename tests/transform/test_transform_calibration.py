"""transform with values: calibration in one call, selections from calibrate, and values that do not fit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Channels, Drop, Plan, Rule, Unstructured
from fxprune.capture.capture import capture
from fxprune.errors import InputError
from fxprune.graph.program import put_values
from fxprune.select.selection import Selection

QUICK = {"compile": False, "measure": False}


class Block(nn.Module):
    """x [b, 16] -> x plus what two linears make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(16, 4)).eval()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
ROWS = [torch.randn(40, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
MANY_IMAGES = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
HALF = Plan([Rule("*.*.weight", Unstructured(0.5))])


def quick(model: nn.Module, x: Tensor = X, plan: Plan | None = None, **rest: Any) -> Any:
    return fxprune.transform(model, plan, (x,), options=QUICK, progress=False, **rest)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def by_hand(model: nn.Module, selection: Selection) -> nn.Module:
    """The model with the selection's values and masks written in: what the result must compute."""
    pruned = copy.deepcopy(model)
    tensors = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(selection.apply(name, tensor))
    return pruned


def test_one_call_is_calibrate_and_then_transform() -> None:
    model = residual()
    before = state(model)
    once = quick(model, plan=HALF, calibration=ROWS)
    selection = fxprune.calibrate(model, HALF, ROWS, progress=False)
    twice = quick(model, selection=selection)
    torch.testing.assert_close(once(X), twice(X))  # where weights lie in memory moves the last bit
    torch.testing.assert_close(once(X), by_hand(model, selection)(X))
    plain = quick(model, plan=HALF)
    assert (once(X) - model(X)).norm() < 0.8 * (plain(X) - model(X)).norm()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_result_tells_how_it_was_fitted_and_what_the_plan_met() -> None:
    report = quick(residual(), plan=HALF, calibration=ROWS).report
    assert "4 by refit, on up to 160 rows" in str(report)
    assert any("passed over" in note for note in report.notes)
    assert "calibrate" in report.seconds
    tied = residual()
    tied[1].up.weight = tied[0].up.weight
    told = str(quick(tied, plan=HALF, calibration=ROWS).report)
    assert "it is read at several places" in told


def test_statistics_are_values_too_and_are_folded() -> None:
    model = convolutions()
    plan = Plan([Rule("*.weight", Unstructured(0.6))])
    selection = fxprune.calibrate(model, plan, MANY_IMAGES, progress=False)
    assert {"1.running_mean", "4.running_mean"} <= selection.values.keys()
    result = quick(model, IMAGES, selection=selection)
    torch.testing.assert_close(result(IMAGES), by_hand(model, selection)(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "refit"])
def test_channels_leave_with_their_values(method: str) -> None:
    model = convolutions()
    plan = Plan([Rule("0.weight", Channels(0.5)), Rule("3.weight", Unstructured(0.3))])
    selection = fxprune.calibrate(model, plan, MANY_IMAGES, method, progress=False)
    result = quick(model, IMAGES, selection=selection)
    assert result.report.parameters[1] < result.report.parameters[0]
    assert all(row.ok for row in result.report.checks)
    if method == "refit":
        plain = quick(model, IMAGES, plan)
        assert (result(IMAGES) - model(IMAGES)).norm() < 0.8 * (plain(IMAGES) - model(IMAGES)).norm()


def test_a_trainable_result_starts_from_the_values_and_shares_nothing() -> None:
    model = residual()
    selection = fxprune.calibrate(model, HALF, ROWS, progress=False)
    values = {name: value.clone() for name, value in selection.values.items()}
    student = quick(model, selection=selection, trainable=True)
    torch.testing.assert_close(student(X), by_hand(model, selection)(X))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(values[name], value) for name, value in selection.values.items())


def test_a_dropped_block_and_calibration_of_the_rest() -> None:
    model = residual()
    plan = Plan([Rule("0.*.weight", Unstructured(0.5)), Drop("1")])
    selection = fxprune.calibrate(model, plan, ROWS, progress=False)
    assert selection.drop == ("1",)
    result = quick(model, selection=selection)
    first, _, head = by_hand(model, selection).children()
    torch.testing.assert_close(result(X), head(first(X)))


def test_the_results_selection_holds_the_values_and_replays() -> None:
    model = residual()
    first = quick(model, plan=HALF, calibration=ROWS)
    assert first.selection.values and first.selection.fits
    saved = pickle.loads(pickle.dumps(first.selection))
    assert torch.equal(quick(model, selection=saved)(X), first(X))


def test_channels_that_calibrated_masks_left_without_effect_leave() -> None:
    model = residual()
    selection = fxprune.calibrate(model, HALF, ROWS, progress=False)
    weight = selection.values["0.up.weight"]
    weight[::2] = 0
    selection.mask["0.up.weight"] = type(selection.mask["0.up.weight"]).pack(weight != 0)
    result = quick(model, selection=selection)
    assert result.report.dead is not None and result.report.parameters[1] < result.report.parameters[0]
    torch.testing.assert_close(result(X), by_hand(model, selection)(X))


def test_tied_parameters_get_one_value_and_storage_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    program = capture(model, (torch.ones(2, 4),), {}).program
    value = torch.ones(4, 4)
    found = put_values(program, {"0.weight": value, "gone.weight": value})
    assert found.get_parameter("0.weight") is found.get_parameter("1.weight")
    assert torch.equal(found.get_parameter("1.weight"), value)
    assert found.get_parameter("0.weight").data_ptr() != value.data_ptr()
    assert not torch.equal(program.get_parameter("0.weight"), value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("9.up.weight", torch.ones(32, 16), "no parameter of this name"),
        ("0.up.weight", torch.ones(16, 32), "[16, 32]"),
        ("0.up.weight", torch.ones(32, 16, dtype=torch.float64), "float64"),
        ("0.up.bias", torch.full((32,), torch.nan), "NaN or infinity"),
        ("0.up.weight", [1.0], "a list"),
    ],
)
def test_values_that_do_not_fit(name: str, value: Any, words: str) -> None:
    model = residual()
    before = state(model)
    with pytest.raises(InputError) as refused:
        quick(model, selection=Selection(values={name: value}))
    assert words in refused.value.why and name in refused.value.where and refused.value.do
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_an_exported_program_is_calibrated_as_the_model() -> None:
    exported = torch.export.export(residual(), (X,))
    with pytest.raises(InputError, match="Pass the model itself"):
        fxprune.transform(exported, HALF, calibration=ROWS, options=QUICK, progress=False)


def test_nothing_to_calibrate() -> None:
    with pytest.raises(InputError, match="not pruned") as refused:
        fxprune.calibrate(residual(), None, ROWS, progress=False)
    assert "no mask" in refused.value.why


def test_errors_name_the_argument_that_was_given() -> None:
    model = residual()
    with pytest.raises(InputError, match="calibration="):
        quick(model, plan=HALF, calibration=torch.randn(4, 16))
    with pytest.raises(InputError, match=r"calibration\[1\]"):
        quick(model, plan=HALF, calibration=[ROWS[0], torch.randn(4, 15)])


def test_the_sizes_that_may_differ_are_those_of_the_result() -> None:
    model = residual()
    shapes = {0: torch.export.Dim("rows", max=50)}
    found = quick(model, plan=HALF, calibration=ROWS, dynamic_shapes=(shapes,))
    assert found(X).shape == (6, 4)
    with pytest.raises(InputError, match=r"calibration\[1\]"):
        quick(model, plan=HALF, calibration=[ROWS[0], torch.randn(60, 16)], dynamic_shapes=(shapes,))
