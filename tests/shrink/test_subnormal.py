"""Weights that decayed below the least normal number are zeros: in masks, dead channels, folds and values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fxprune
from fxprune.backend import fxprune as backend
from fxprune.select.selection import Selection
from tests.oracle import QUICK, TOLERANCE, assert_close

TINY = 1e-41


class Convolutions(nn.Module):
    """A convolution, its norm and a head, so that channels of the convolution can leave."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))))


IMAGE = torch.randn(2, 3, 8, 8)


def decayed(value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Convolutions().to(dtype).eval()
    with torch.no_grad():
        model.norm.bias.normal_()
        model.norm.weight[8:] = value
        model.norm.bias[8:] = value
        model.head.weight[:, :4] = value
        model.head.bias[:3] = value
    return model


def subnormals(module: nn.Module) -> int:
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point() and t.itemsize > 1]
    return sum(int(((t.abs() < torch.finfo(t.dtype).tiny) & (t != 0)).sum()) for t in tensors)


def result_of(model: nn.Module, *args: Any, **more: Any) -> Any:
    return fxprune.transform(model, None, args, options=QUICK, progress=False, **more)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, TINY), (torch.float64, 1e-310), (torch.bfloat16, 1e-39)])
def test_decayed_channels_leave_as_zero_ones_do(dtype: torch.dtype, value: float) -> None:
    model, image = decayed(value, dtype), IMAGE.to(dtype)
    before = [(tensor, tensor.clone()) for tensor in model.state_dict().values()]
    result, exact = result_of(model, image), result_of(decayed(0.0, dtype), image)
    assert all(torch.equal(tensor, was) for tensor, was in before)
    assert {n: t.shape for n, t in result.named_parameters()} == {n: t.shape for n, t in exact.named_parameters()}
    assert result.report.parameters == exact.report.parameters and result.report.parameters[1] < 400
    assert subnormals(result) == 0
    assert torch.equal(result(image), exact(image))
    told = [note for note in result.report.notes if "subnormal" in note]
    assert told == ["83 subnormal values in norm.weight, norm.bias, head.weight, ... were taken as zeros"]
    assert any(row.what == "without subnormals = pruned model" and row.ok for row in result.report.checks)


def test_small_weights_in_float16_stay() -> None:
    model = decayed(1e-7, torch.float16)
    result = result_of(model, IMAGE.half())
    assert result.report.parameters is None and not [n for n in result.report.notes if "subnormal" in n]


def test_weights_that_decayed_are_packed_without_them() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        weight = model[0].weight
        weight[weight.abs() < weight.abs().quantile(0.8)] = TINY
    x = torch.randn(4, 64)
    result = result_of(model, x)
    assert result.selection.reached("0.weight") == pytest.approx(0.8, abs=0.01)
    assert subnormals(result) == 0
    assert_close(result(x), model(x).detach())


def test_with_a_plan_they_are_the_first_to_go_and_those_left_are_zeros() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        model[0].weight[:, :16] = TINY
    x = torch.randn(4, 64)
    plan = fxprune.Plan([fxprune.Rule("2.weight", fxprune.Unstructured(0.5))])
    result: Any = fxprune.transform(model, plan, (x,), options=QUICK, progress=False)
    assert subnormals(result) == 0


def test_where_something_large_makes_up_for_them_they_stay() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16, bias=False)
            self.linear.weight.data.mul_(1e-38)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x * 1e18) * 1e18

    model, x = Scaled().eval(), torch.randn(4, 16)
    assert subnormals(model)
    for check in (True, False):
        result = result_of(model, x, check=check)
        assert_close(result(x), model(x).detach())
    told = result_of(model, x).report.notes
    assert [n.level for n in told if "subnormal values in linear.weight stay" in n] == ["missed"]


def test_folding_a_norm_makes_none() -> None:
    model = decayed(0.5)
    with torch.no_grad():
        model.norm.weight[8:] = 1e-36
        model.conv.weight[:, :, 0].mul_(1e-3)
    assert subnormals(model) == 0
    result = result_of(model, IMAGE)
    assert "conv.weight_folded_bias" in dict(result.named_parameters()) and subnormals(result) == 0
    assert_close(result(IMAGE), model(IMAGE).detach())


def test_calibrated_values_have_none() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(4, 16)
    value = torch.randn(16, 16)
    value[:, ::2] = TINY
    given = Selection(values={"0.weight": value})
    result = result_of(model, x, selection=given)
    assert subnormals(result) == 0 and torch.equal(result.selection.values["0.weight"], value)
    with torch.no_grad():
        oracle = copy.deepcopy(model)
        oracle[0].weight.copy_(value)
        assert_close(result(x), oracle(x))


def test_a_result_that_trains_starts_from_zeros() -> None:
    model = decayed(TINY)
    result: Any = fxprune.transform(model, None, (IMAGE,), trainable=True, progress=False)
    assert subnormals(result) == 0 and all(p.requires_grad for p in result.parameters())
    assert_close(result(IMAGE).detach(), model(IMAGE).detach())


@torch.no_grad()
def test_the_backend_packs_weights_without_them() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    weight = model[0].weight
    weight[weight.abs() < weight.abs().quantile(0.8)] = TINY
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=backend, options=QUICK)
    x = torch.randn(4, 64)
    assert float((compiled(x) - model(x)).abs().max()) <= TOLERANCE
    assert int((weight == TINY).sum()) > 0


def test_pruning_functions_keep_torchs_masks() -> None:
    models = [nn.Linear(8, 8), nn.Linear(8, 8)]
    for model, module in zip(models, (prune, fxprune.prune), strict=True):
        model.weight.data.copy_(torch.linspace(1, 2, 64).view(8, 8)).view(-1)[:20] = TINY * torch.arange(20)
        module.l1_unstructured(model, "weight", amount=10)
    assert torch.equal(models[0].weight_mask, models[1].weight_mask)
