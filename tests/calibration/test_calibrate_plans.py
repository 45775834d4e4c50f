"""What a plan asks of calibration: pooled amounts, masks that are there, given scores, dropped blocks, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fxprune import Blocks, Drop, Existing, Plan, Rule, Unstructured
from fxprune.calibration.calibrate import calibrate
from fxprune.calibration.solvers import METHODS
from fxprune.plan.scores import Scores
from fxprune.select.selection import Selection
from tests.calibration.calibrate_case import HALF, applied, chain, model, off, tensors_of
from tests.structured_oracle import net


def quietly(model: nn.Module, plan: Plan | None, data: Any, method: str = "refit", **more: Any) -> Selection:
    return calibrate(model, plan, data, method, progress=False, **more)


@pytest.mark.parametrize("how", [Unstructured(0.5), Blocks(0.5, (4, 4))])
def test_pooled_amounts_are_exact(how: Any) -> None:
    dense, x = model("tokens")
    with torch.no_grad():
        dense.a.weight *= 100
    plan = Plan([Rule("*", how, scope="global")])
    shares = {}
    for method in METHODS:
        found = quietly(dense, plan, [x], method)
        gone = sum(mask.numel() - mask.kept() for mask in found.mask.values())
        assert gone == how.count(1152 // (16 if isinstance(how, Blocks) else 1)) * (
            16 if isinstance(how, Blocks) else 1
        )
        shares[method] = found.reached("a.weight")
    # By magnitude a weight a hundred times as large stays whole; by its share of its output it does not.
    assert shares["magnitude"] < 0.01 and min(shares[m] for m in METHODS if m != "magnitude") > 0.2


def test_masks_that_are_there_stay() -> None:
    dense, x = model("linear")
    prune.l1_unstructured(dense.a, "weight", 0.4)
    mask = dense.a.weight_mask.bool()
    before = tensors_of(dense)
    for method in METHODS:
        found = quietly(dense, None, [x], method)
        assert found.mask.keys() == {"a.weight"} and torch.equal(found.mask["a.weight"].unpack(), mask)
        more = quietly(dense, HALF, [x], method)
        kept = more.mask["a.weight"].unpack()
        assert not bool((kept & ~mask).any()) and more.mask["a.weight"].kept() == 256
    assert tensors_of(dense) == before
    found = quietly(dense, Plan([Rule("a.weight", Existing())]), [x])
    assert torch.equal(found.mask["a.weight"].unpack(), mask) and found.fits["a.weight"].method == "refit"


@pytest.mark.parametrize("method", METHODS)
def test_a_score_that_was_asked_for_keeps_its_mask(method: str) -> None:
    dense, x = model("linear")
    scores = Scores({"a.weight": torch.rand(32, 16)}, method="mine")
    plan = Plan([Rule("a.weight", Unstructured(0.5, score=scores))])
    found = quietly(dense, plan, [x], method)
    gone = scores.of("a.weight", dense.a.weight).flatten().topk(256, largest=False).indices
    assert set(gone.tolist()) == set((~found.mask["a.weight"].unpack()).flatten().nonzero().flatten().tolist())
    assert not torch.equal(found.values["a.weight"], dense.a.weight) or method == "wanda"


def test_later_layers_make_up_for_dropped_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.a(x).relu())

    dense = nn.Sequential(Block(), Block(), nn.Linear(16, 4)).eval()
    plan = Plan([Rule("*", Unstructured(0.5)), Drop("1")])
    found = quietly(dense, plan, [torch.randn(50, 16)])
    assert found.drop == ("1",)
    assert found.mask.keys() == {"0.a.weight", "0.b.weight", "2.weight"} == found.fits.keys()


def test_weights_that_no_rule_binds_are_not_touched() -> None:
    dense, x = model("linear")
    found = quietly(dense, Plan([Rule("b.*", Unstructured(0.5))]), [x])
    assert found.values.keys() == {"b.weight", "b.bias"} and found.mask.keys() == {"b.weight"}


@pytest.mark.parametrize("amount", [0.0, 1.0])
def test_nothing_and_everything(amount: float) -> None:
    dense, x = model("linear")
    plan = Plan([Rule("*", Unstructured(amount))])
    for method in METHODS:
        found = quietly(dense, plan, [x], method)
        for name, mask in found.mask.items():
            assert mask.kept() == (1 - amount) * mask.numel()
            if amount == 0:
                torch.testing.assert_close(found.values[name], dense.get_parameter(name).detach(), rtol=1e-3, atol=1e-3)
        if amount == 1:
            torch.testing.assert_close(applied(dense, found)(x), dense(x).mean(0).expand(24, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    dense, x = model("linear")
    dense, x = dense.to(dtype), x.to(dtype)
    for method in METHODS:
        found = quietly(dense, HALF, [x], method)
        assert all(value.dtype is dtype for value in found.values.values())
        assert off(dense.double(), applied(dense.double(), found), x.double()) < 0.5
        dense = dense.to(dtype)


def test_inputs_that_a_model_writes_to_stay() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return chain(m, x.add_(1))

    dense = net(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8))
    x = torch.randn(20, 8)
    before = x.clone()
    quietly(dense, HALF, [x])
    quietly(dense, Plan([Rule("*", Unstructured(0.5), scope="global")]), [x])
    assert torch.equal(x, before)
