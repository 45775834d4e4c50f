"""What a wildcard binds: what may pay. What it passes over is told, and a full name binds it all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Blocks, Channels, Plan, Rule, SemiStructured, Unstructured
from fxprune.errors import PlanError
from tests.oracle import assert_close

QUICK = {"options": {"compile": False}, "progress": False}


class Text(nn.Module):
    def __init__(self, *, tied: bool = False, bag: bool = False) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(32, 16) if bag else nn.Embedding(32, 16)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 32, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids)).relu())


IDS = torch.randint(32, (2, 5))


@pytest.mark.parametrize("sparsity", [Unstructured(0.5), SemiStructured(2, 4), Blocks(0.5, (4, 4))])
@pytest.mark.parametrize("bag", [False, True])
def test_tables_are_passed_over(sparsity: Any, bag: bool) -> None:
    model = Text(bag=bag).eval()
    result = fxprune.transform(model, Plan([Rule("*", sparsity)]), (IDS,), **QUICK)
    assert [w.name for w in result.report.weights] == ["body.weight", "head.weight"]
    (note,) = [note for note in result.report.notes if "table.weight" in note]
    assert "embedding" in note and "passed over" in note
    with pytest.raises(PlanError, match=r"binds nothing.*table.weight"):
        fxprune.transform(model, Plan([Rule("table*", sparsity)]), (IDS,), **QUICK)


def test_a_tied_table_is_passed_over_under_each_of_its_names() -> None:
    model = Text(tied=True).eval()
    result = fxprune.transform(model, Plan([Rule("*", Unstructured(0.5))]), (IDS,), **QUICK)
    assert [w.name for w in result.report.weights] == ["body.weight"]
    with pytest.raises(PlanError, match="binds nothing"):
        fxprune.transform(model, Plan([Rule("head.*", Unstructured(0.5))]), (IDS,), **QUICK)


@pytest.mark.parametrize("name", ["table.weight", "head.weight"])
def test_a_full_name_binds_a_table(name: str) -> None:
    model = Text(tied=True).eval()
    plan = Plan([Rule("*", Unstructured(0.5)), Rule(name, Unstructured(0.25))])
    result = fxprune.transform(model, plan, (IDS,), **QUICK)
    assert result.report["table.weight"].reached == pytest.approx(0.25)
    assert result.report["body.weight"].reached == pytest.approx(0.5)


def test_channels_leave_tables_as_before() -> None:
    model = Text().eval()
    result = fxprune.transform(model, Plan([Rule("*", Channels(0.5))]), (IDS,), **QUICK)
    assert result.get_parameter("table.weight").shape == (32, 8)


def test_zeros_that_a_table_has_already_stay() -> None:
    model = Text().eval()
    with torch.no_grad():
        model.table.weight.mul_(torch.arange(32 * 16).reshape(32, 16) % 7 % 2)
    result = fxprune.transform(model, None, (IDS,), **QUICK)
    assert result.report["table.weight"].reached == pytest.approx(4 / 7, abs=0.01)


class Computed(nn.Module):
    """Weights that are scaled, joined, cut and moved before a product reads them, and one that is only added."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.shift = (nn.Parameter(torch.randn(n, 8)) for n in (8, 8, 4))
        self.scaled, self.cut = (nn.Parameter(torch.randn(16, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.scaled[4:12] * 0.5) + self.shift
        y = y @ torch.cat([self.left, self.right.t()], 1)
        return nn.functional.linear(y, torch.cat([self.cut[:8], self.cut[8:]], 1))


RECURRENT: dict[str, Any] = {
    "LSTM": nn.LSTM(8, 8, batch_first=True, bidirectional=True),
    "GRU": nn.GRU(8, 8, num_layers=2, batch_first=True),
    "RNN": nn.RNN(8, 8, batch_first=True),
}


class First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(8, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


@pytest.mark.parametrize("sparsity", [Unstructured(0.5), SemiStructured(2, 4), Blocks(0.5, (4, 4))])
@pytest.mark.parametrize("name", [*RECURRENT, "bilinear", "computed"])
def test_every_weight_of_a_product_is_masked(name: str, sparsity: Any) -> None:
    model = {"bilinear": Both, "computed": Computed}.get(name, lambda: First(RECURRENT[name]))().eval()
    x = torch.randn(3, 4, 8)
    result = fxprune.transform(model, Plan([Rule("*", sparsity)]), (x,), **QUICK)
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1 and n != "shift"}
    assert {w.name for w in result.report.weights} == set(weights)
    with torch.no_grad():
        zeroed = {n: p.clone() for n, p in model.named_parameters()}
        for w in result.report.weights:
            assert w.layout == "dense" and "no sparse kernel" in str(w.refused)
            assert w.reached == pytest.approx(0.5, abs=0.01)
            zeroed[w.name] *= result.selection.mask[w.name].unpack()
        assert_close(result(x), torch.func.functional_call(model, zeroed, (x,)))


def test_a_count_that_may_have_been_meant_as_a_percentage_is_told() -> None:
    model, x = nn.Linear(128, 128).eval(), torch.randn(2, 128)

    def told(amount: Any, scope: str = "local") -> list[Any]:
        plan = Plan([Rule("*", Unstructured(amount), scope=scope)])
        notes = fxprune.transform(model, plan, (x,), **QUICK).report.notes
        return [note for note in notes if "an int counts elements" in note]

    for scope in ("local", "global"):
        (note,) = told(90, scope)
        assert note.level == "warning" and "90% is written 0.9" in note and "16,384" in note
    assert not told(0.9) and not told(8192) and not told(164)


def test_a_group_that_alignment_keeps_from_shrinking_is_told() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(2, 16)

    def told(amount: float, **more: Any) -> list[Any]:
        notes = fxprune.transform(model, Plan([Rule("*", Channels(amount, **more))]), (x,), **QUICK).report.notes
        return [note for note in notes if "lose much less" in note]

    (note,) = told(0.3)
    assert note.level == "missed" and "a multiple of 8" in note and "0.weight[0]" in note
    assert not told(0.3, align=1) and told(0.99, align=4) and not told(0.5, align=4)


def test_weights_inside_autocast_say_where_they_are() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.inner(x)
            return self.outer(y.float())

    model, x = Mixed().eval(), torch.randn(2, 8)
    result = fxprune.transform(model, Plan([Rule("*", Unstructured(0.5))]), (x,), **QUICK)
    assert [w.name for w in result.report.weights] == ["outer.weight"]
    (note,) = [note for note in result.report.notes if "inner.weight" in note]
    assert "torch.autocast: take it out of forward" in note
