"""Weights that forward computes from parameters are computed once, and what they come to is pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import fxprune
from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.graph import computed
from tests.oracle import QUICK, assert_close, snapshot


class Standardised(nn.Conv2d):
    """A convolution by its weight without mean and spread."""

    @property
    def effective(self) -> Tensor:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return (self.weight - mean) / (std + 1e-5)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.effective, self.bias, padding=1)


class LowRank(nn.Linear):
    """A linear layer with a product of two thin matrices added to its weight."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.down, self.up = nn.Parameter(torch.randn(2, i)), nn.Parameter(torch.randn(o, 2))

    @property
    def effective(self) -> Tensor:
        return self.weight + 0.3 * (self.up @ self.down)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.effective, self.bias)


class Scaled(nn.Linear):
    """A linear layer whose rows have scales."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.scale = nn.Parameter(torch.rand(o, 1) + 0.5)

    @property
    def effective(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.effective.t() + self.bias


class NormedHook(nn.Module):
    """A linear layer under torch.nn.utils.weight_norm, the hook."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.inner = nn.utils.weight_norm(nn.Linear(i, o))

    @property
    def effective(self) -> Tensor:
        return torch._weight_norm(self.inner.weight_v, self.inner.weight_g)

    def forward(self, input: Tensor) -> Tensor:
        return self.inner(input)


class Around(nn.Module):
    """Two layers around one whose weight is computed."""

    def __init__(self, middle: nn.Module, layer: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.first, self.middle, self.last = layer(8, 12), middle, layer(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


def pixels(i: int, o: int) -> nn.Module:
    return nn.Conv2d(i, o, 1)


MODELS: dict[str, Callable[[], tuple[Around, Tensor]]] = {
    "standardised": lambda: (Around(Standardised(12, 16, 3), pixels), torch.randn(2, 8, 6, 6)),
    "low rank": lambda: (Around(LowRank(12, 16)), torch.randn(5, 8)),
    "scaled": lambda: (Around(Scaled(12, 16)), torch.randn(5, 8)),
    "normed by a hook": lambda: (Around(NormedHook(12, 16)), torch.randn(5, 8)),
}
PLANS = {"half the channels": Channels(0.5), "most elements": Unstructured(0.75)}


@pytest.fixture(params=MODELS)
def model_and_input(request: pytest.FixtureRequest) -> tuple[Around, Tensor]:
    model, x = MODELS[request.param]()
    return model.eval(), x


def transformed(model: Any, sparsity: Any, x: Tensor, pattern: str = "*", **more: Any) -> Any:
    plan = None if sparsity is None else Plan([Rule(pattern, sparsity)])
    return fxprune.transform(model, plan, (x,), progress=False, **{"options": QUICK, **more})


def told(result: Any) -> list[str]:
    return [note for note in result.report.notes if "computes from parameters" in note]


def twin(model: Around) -> Around:
    """A model with a plain layer in the middle that holds what its weight comes to."""
    middle: Any = model.middle
    effective, is_conv = middle.effective, middle.effective.dim() == 4
    layer = nn.Conv2d(12, 16, 3, padding=1) if is_conv else nn.Linear(12, 16)
    layer.weight, layer.bias = nn.Parameter(effective.detach()), getattr(middle, "inner", middle).bias
    result = Around(layer, pixels if is_conv else nn.Linear).eval()
    result.first, result.last = model.first, model.last
    return result


@pytest.mark.parametrize("exported", [False, True], ids=["", "exported"])
@pytest.mark.parametrize("sparsity", PLANS)
def test_the_result_is_that_of_a_plain_model(
    model_and_input: tuple[Around, Tensor], sparsity: str, exported: bool
) -> None:
    model, x = model_and_input
    given = torch.export.export(model, (x,)) if exported else model
    dense = model(x)
    before = snapshot(model)
    result = transformed(given, PLANS[sparsity], x)
    expected = transformed(twin(model), PLANS[sparsity], x)
    assert_close(result(x), expected(x))
    assert not torch.allclose(dense, expected(x), atol=1e-2)
    assert sorted(p.numel() for p in result.parameters()) == sorted(p.numel() for p in expected.parameters())
    assert len(result.report.weights) == len(expected.report.weights)
    assert len(told(result)) == 1 and "middle" in told(result)[0]
    assert any(row.what == "weights computed once = your model" and row.ok for row in result.report.checks)
    assert snapshot(model) == before


def test_an_exported_parametrization() -> None:
    model = Around(parametrizations.weight_norm(nn.Linear(12, 16))).eval()
    x = torch.randn(5, 8)
    for sparsity in PLANS.values():
        result = transformed(torch.export.export(model, (x,)), sparsity, x)
        assert_close(result(x), transformed(model, sparsity, x)(x))


def test_dead_channels_of_a_computed_weight_leave() -> None:
    model, x = Around(Scaled(12, 16)).eval(), torch.randn(5, 8)
    with torch.no_grad():
        model.middle.scale[:6] = 0
    result = transformed(model, None, x, options={"compile": False, "align": 1})
    assert result.get_parameter("middle.weight").shape == (10, 12)
    assert_close(result(x), model(x))


def test_its_name_is_that_of_the_parameter_of_its_shape() -> None:
    model, x = Around(Scaled(12, 16)).eval(), torch.randn(5, 8)
    result = transformed(model, Unstructured(0.5), x, "middle.weight")
    assert list(result.selection.mask) == ["middle.weight"]
    assert_close(transformed(model, None, x, selection=result.selection)(x), result(x))
    assert "middle.weight" in str(fxprune.analyze(model, (x,)))


def test_a_part_that_is_named_stays_by_itself() -> None:
    model, x = Around(LowRank(12, 16)).eval(), torch.randn(5, 8)
    result = transformed(model, Unstructured(0.5), x, "middle.up")
    assert list(result.selection.mask) == ["middle.up"] and not told(result)
    with torch.no_grad():
        model.middle.up.masked_fill_(~result.selection.mask["middle.up"].unpack(), 0)
    assert_close(result(x), model(x))


class Unlike(nn.Module):
    """Weights that stay computed: of another shape, of half the bytes, read elsewhere, written to, by the input."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("read", "written", "moved", "by_input"):
            self.register_parameter(name, nn.Parameter(torch.randn(8, 8)))
        self.thin, self.wide = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))
        self.narrow = nn.Parameter(torch.randn(8, 8, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.thin @ self.wide)
        x = F.linear(x, self.narrow.float() * 2) + F.linear(x, self.read * 2) * self.read[0]
        x = F.linear(x, self.moved.flip(0).t()) + F.linear(x, self.by_input * x.mean())
        doubled = self.written * 2
        doubled[0] = 0
        return F.linear(x, doubled)


def test_what_stays_computed() -> None:
    model, x = Unlike().eval(), torch.randn(5, 8)
    result = transformed(model, Channels(0.5), x)
    assert not told(result)
    assert {name for name, _ in result.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert_close(result(x), model(x))


def test_one_that_does_not_come_out_equal_stays_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Around(Scaled(12, 16)).eval(), torch.randn(5, 8)
    monkeypatch.setattr(computed, "_computed", lambda program, parts: torch.zeros(16, 12))
    result = transformed(model, Channels(0.5), x)
    assert "stay computed: once for all they differ by" in told(result)[0]
    assert not any(row.what == "weights computed once = your model" for row in result.report.checks)


def test_in_training_they_stay_computed() -> None:
    model, x = Around(Scaled(12, 16)).eval(), torch.randn(5, 8)
    result = transformed(model, Unstructured(0.75), x, trainable=True)
    assert not told(result) and result.get_parameter("middle.scale").requires_grad
    # The scales of rows are no weight: zeros among them would take whole rows.
    assert sorted(result.selection.mask) == ["first.weight", "last.weight", "middle.weight"]
    assert any("middle.scale" in note for note in result.report.notes)


@pytest.mark.parametrize("exported", [False, True], ids=["", "exported"])
def test_the_mask_of_a_part_is_no_mask_of_what_it_comes_to(exported: bool) -> None:
    model, x = Around(LowRank(12, 16)).eval(), torch.randn(5, 8)
    prune.l1_unstructured(model.middle, "weight", 0.5)
    given = torch.export.export(model, (x,)) if exported else model
    expected = model(x)
    assert_close(transformed(given, None, x)(x), expected)
    result = transformed(given, Unstructured(0.25), x)
    name = "middle.weight_orig" if exported else "middle.weight"
    assert result.selection.mask[name].unpack().double().mean() == 0.75
