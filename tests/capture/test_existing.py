"""Folding hooks and parametrizations: the values and masks that come out, and the model that stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

from fxprune import Plan, Rule, Unstructured
from fxprune.capture.hooks import fold_existing
from fxprune.errors import CaptureError
from tests.oracle import assert_close, quick, snapshot


def test_a_model_without_pruning_is_handed_back() -> None:
    model = nn.Linear(4, 4)
    assert fold_existing(model) == (model, {})


def test_hooks_become_plain_weights_that_share_everything_else() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    torch_prune.l1_unstructured(model[0], "bias", 2)
    before = snapshot(model)
    folded, masks = fold_existing(model)
    assert snapshot(model) == before
    assert masks.keys() == {"0.weight", "0.bias"}
    assert torch.equal(masks["0.weight"], model[0].weight_mask != 0)
    assert torch.equal(folded.get_parameter("0.weight"), model[0].weight)
    assert folded.get_parameter("1.weight") is model[1].weight
    assert folded.get_buffer("2.running_mean") is model[2].running_mean
    assert not folded.get_submodule("0")._forward_pre_hooks
    assert list(folded.state_dict()) != list(model.state_dict())


def test_masked_infinities_are_zero() -> None:
    model = nn.Linear(4, 4).eval()
    with torch.no_grad():
        model.weight[0, 0] = float("inf")
    mask = torch.ones(4, 4)
    mask[0, 0] = 0
    torch_prune.custom_from_mask(model, "weight", mask)
    folded, _ = fold_existing(model)
    assert folded.get_parameter("weight")[0, 0] == 0


def test_a_tied_weight_stays_tied_under_one_mask_and_comes_apart_under_two() -> None:
    for same in (True, False):
        model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
        model[1].weight = model[0].weight
        first = torch.ones(4, 4)
        first[0] = 0
        torch_prune.custom_from_mask(model[0], "weight", first)
        torch_prune.custom_from_mask(model[1], "weight", first if same else first.t().contiguous())
        folded, _ = fold_existing(model)
        weights = [folded.get_parameter(f"{place}.weight") for place in (0, 1)]
        assert (weights[0] is weights[1]) == same
        assert all(torch.equal(weight, layer.weight) for weight, layer in zip(weights, model, strict=True))


def test_a_mask_that_is_gone_is_named() -> None:
    model = nn.Linear(4, 4).eval()
    torch_prune.identity(model, "weight")
    del model._buffers["weight_mask"]
    with pytest.raises(CaptureError, match="weight_mask"):
        fold_existing(model)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrizations_are_folded_on_a_copy() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    parametrize.register_parametrization(model[0], "weight", Double())
    parametrizations.weight_norm(model[1])
    before, expected = snapshot(model), model(torch.ones(1, 8)).detach()
    folded, masks = fold_existing(model)
    assert masks == {} and not any(map(parametrize.is_parametrized, folded.modules()))
    assert snapshot(model) == before and all(map(parametrize.is_parametrized, model))
    assert_close(folded(torch.ones(1, 8)).detach(), expected)
    assert_close(quick(model, torch.randn(3, 8), plan=None)(torch.ones(1, 8)), expected)


def test_spectral_norm_keeps_its_vectors() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    parametrizations.spectral_norm(model[0])
    model.eval()
    before, x = snapshot(model), torch.randn(3, 8)
    result = quick(model, x, plan=None)
    assert snapshot(model) == before
    assert_close(result(x), model(x).detach())


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm"])
def test_a_mask_under_a_parametrization_is_a_mask_of_its_weight(kind: str) -> None:
    model: Any = nn.Sequential(nn.Linear(16, 16)).eval()
    getattr(parametrizations, kind)(model[0])
    part = "original" if kind == "spectral_norm" else "original1"
    torch_prune.l1_unstructured(model.eval()[0].parametrizations.weight, part, 0.5)
    x = torch.randn(3, 16)
    expected = model(x).detach()
    before = snapshot(model)
    keep = getattr(model[0].parametrizations.weight, f"{part}_mask") != 0
    folded, masks = fold_existing(model)
    assert folded.get_parameter("0.weight").requires_grad and torch.equal(masks["0.weight"], keep)
    result = quick(model, x, plan=None)
    assert {row.name: row.layout for row in result.report.weights} == {"0.weight": "nonzeros"}
    assert_close(result(x), expected)
    more = quick(model, x, plan=Plan([Rule("0.weight", Unstructured(0.75))]))
    assert more.selection.reached("0.weight") == 0.75
    assert not (more.selection.mask["0.weight"].unpack() & ~keep).any()
    student = quick(model, x, plan=None, trainable=True)
    notes = [note for note in student.report.notes if "parametrizations" in note and "0.weight" in note]
    assert [note.level for note in notes] == ["warning"]
    student.train()(x).square().sum().backward()
    grad = student.get_parameter("0.weight").grad
    assert bool((grad[keep] != 0).all()) and not grad[~keep].any()
    assert snapshot(model) == before
