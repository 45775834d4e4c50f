"""A capture is held against the user's model on every call that a check uses, and what parts is told or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxprune.check.calls import Call
from fxprune.check.capture_checked import Checked, capture_checked
from fxprune.errors import CaptureError, CheckError, InputError
from tests.check import models
from tests.check.models import made
from tests.oracle import Apply, assert_right, quick, snapshot


def centred(*shape: int) -> Tensor:
    """Near zero on the average, and positive at the start."""
    x = torch.randn(*shape)
    x = x - x.mean(0)
    return x * x[0].sign()


X = centred(4, 16)


def checked(model: nn.Module, *args: Any, **more: Any) -> Checked:
    return capture_checked(model, Call("example", args, {}), None, check=True, fold_masks=True, **more)


def calls_of(found: Checked) -> list[str]:
    return [row.call.split(" [")[0] for row in found.checks]


def test_every_call_is_held() -> None:
    found = checked(Apply(lambda linear, x, flag: linear(x) * flag).eval(), X, torch.ones(4, 1, dtype=torch.bool))
    assert calls_of(found) == ["example", "second input", "flags turned", "second size", "size 1"]
    assert all(row.ok and row.compared == 1 for row in found.checks) and not found.notes
    assert found.proof is not None and [call.label for call in found.proof.calls] == [row.call for row in found.checks]


@pytest.mark.parametrize("kind", [models.Shortcut, models.ReadsValue, models.BranchesOnValue])
def test_what_only_the_second_input_shows(kind: Any) -> None:
    model = made(kind)
    x = X if kind is not models.ReadsValue else X * (2.0 / X.max())
    before = snapshot(model)
    with pytest.raises(CaptureError, match="does not compute what the model computes") as error:
        quick(model, x)
    assert error.value.where == "second input" and ".item()" in error.value.why and error.value.do
    assert snapshot(model) == before


def test_what_only_turned_flags_show() -> None:
    def forward(linear: nn.Linear, x: Tensor, flag: Tensor) -> Tensor:
        return linear(x) if torch.compiler.is_exporting() or bool(flag.all()) else -linear(x)

    with pytest.raises(CaptureError) as error:
        checked(Apply(forward).eval(), X, torch.ones(4, 1, dtype=torch.bool))
    assert error.value.where == "flags turned"


def test_what_a_graph_raises_is_a_way_to_be_wrong() -> None:
    def forward(linear: nn.Linear, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            torch._check(x[0, 0].round().int().item() == 1)
        return linear(x)

    x = X.clone()
    x[0, 0] = 1.0
    with pytest.raises(CaptureError, match="it raises"):
        checked(Apply(forward).eval(), x)


def test_a_value_of_the_first_input_that_is_kept() -> None:
    model = made(models.KeepsFirst)
    before = snapshot(model)
    found = checked(model, X)
    assert snapshot(model) == before
    assert all(row.ok for row in found.checks)
    assert any("keeps something of one call" in note and note.level == "warning" for note in found.notes)
    # Every call is answered as the first one.
    for x in (X, torch.randn(5, 16)):
        expected = made(models.KeepsFirst)
        expected.load_state_dict(model.state_dict())
        torch.testing.assert_close(found.captured.program(x), expected(x))


def test_a_value_of_an_earlier_call_is_the_models_own() -> None:
    model = made(models.KeepsFirst)
    model(X)
    result = quick(model, torch.randn(4, 16))
    assert_right(result, model, torch.randn(3, 16))


@pytest.mark.parametrize("kind", [models.Noisy, models.Counts])
def test_a_model_that_answers_a_call_in_two_ways(kind: Any) -> None:
    model = made(kind)
    with pytest.raises(CheckError, match="random numbers, or keep state"):
        quick(model, X)
    assert not model.calls


def test_a_model_that_is_ready_after_its_first_call() -> None:
    model: Any = made(models.MakesItself)
    result = quick(model, X)
    assert model.table is None
    assert_right(result, model, torch.randn(3, 16))


@pytest.mark.parametrize("shapes", [None, ({0: Dim.DYNAMIC},)], ids=["free", "asked for"])
def test_a_capture_that_is_wrong_at_size_one_refuses_it(shapes: Any) -> None:
    model = made(models.OneIsAnother)
    result = quick(model, X, dynamic_shapes=shapes)
    assert any("size 1" in note and note.level == "fallback" for note in result.report.notes)
    assert_right(result, model, torch.randn(2, 16))
    with pytest.raises(InputError, match="only right where"):
        result(torch.randn(1, 16))


def test_a_model_that_fails_at_size_one_is_told() -> None:
    found = checked(made(models.FailsAtOne), X)
    assert any("refuses size 1" in note and note.level == "warning" for note in found.notes)
    assert "size 1" not in calls_of(found)


def test_size_one_of_each_dynamic_dimension() -> None:
    model = made(models.Sums)
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    found = capture_checked(model, Call("example", (torch.randn(2, 3, 16),), {}), shapes, check=True, fold_masks=True)
    assert [row.call for row in found.checks][-2:] == ["size 1 [1, 3, 16]", "size 1 [2, 1, 16]"]


def test_the_fast_path_of_an_encoder() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.arange(12) >= torch.tensor([[12], [8], [10]])
    example = Call("example", (torch.randn(3, 12, 16),), {"src_key_padding_mask": padding})
    found = capture_checked(model, example, None, check=True, fold_masks=True)
    assert all(row.ok for row in found.checks)
    assert sum("fast path" in note for note in found.notes) == 1
    assert torch.backends.mha.get_fastpath_enabled()
