"""transform against the oracle: sizes, shapes and strides of the inputs, at capture and at later calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxprune
from fxprune.errors import InputError
from tests.oracle import COMPILED, HALF, QUICK, Apply, assert_right, quick
from tests.transform.transform_models import compiled_code_does_not_pile_up as compiled_code_does_not_pile_up
from tests.transform.transform_models import net

# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [QUICK, COMPILED], ids=["eager", "compiled"])
def test_every_number_of_tokens(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(48, 72), nn.GELU(), nn.Linear(72, 40, bias=False), nn.SiLU()).eval()
    result: Any = fxprune.transform(model, HALF, (torch.randn(8, 48),), options=options, progress=False)
    for tokens in (1, 7, 8, 31, 64, 65, 512):
        assert_right(result, model, torch.randn(tokens, 48))


@pytest.mark.parametrize("tokens", [1, 7, 8, 31, 64, 65, 512])
def test_captured_at_every_number_of_tokens(tokens: int) -> None:
    model = net()
    result = quick(model, torch.randn(1, tokens, 24))
    for batch in (1, 3):
        assert_right(result, model, torch.randn(batch, tokens, 24))


def test_compiled_with_another_batch() -> None:
    model = net()
    result: Any = fxprune.transform(model, HALF, (torch.randn(1, 7, 24),), options=COMPILED, progress=False)
    assert "torch.compile" in result.report.compiled
    for batch in (1, 2, 9):
        assert_right(result, model, torch.randn(batch, 7, 24))


def test_a_dynamic_sequence() -> None:
    model = net()
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    result = quick(model, torch.randn(2, 16, 24), dynamic_shapes=shapes)
    for batch, length in ((2, 16), (1, 3), (3, 65), (1, 512)):
        assert_right(result, model, torch.randn(batch, length, 24))


def test_a_fixed_size_is_refused() -> None:
    model = Apply(lambda linear, x: linear(x).sum(1) / x.shape[1]).eval()
    result = quick(model, torch.randn(2, 128, 16))
    with pytest.raises(InputError, match=r"shape \[2, 64, 16\].*128") as error:
        result(torch.randn(2, 64, 16))
    assert error.value.do
    assert_right(result, model, torch.randn(3, 128, 16))


def test_a_division_by_a_dynamic_size_follows_it() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).sum(1) / x.shape[1]

    model = Mean().eval()
    result = quick(model, torch.randn(2, 128, 16), dynamic_shapes={"x": {0: Dim.AUTO, 1: Dim.AUTO}})
    for size in (128, 64, 1):
        assert_right(result, model, torch.randn(2, size, 16))


def test_tune_for_several_sizes() -> None:
    model = nn.Sequential(nn.Linear(48, 72)).eval()
    options = {**QUICK, "tune_for": [1, 8, 64]}
    result: Any = fxprune.transform(model, HALF, (torch.randn(8, 48),), options=options, progress=False)
    assert_right(result, model, torch.randn(64, 48))


def test_non_contiguous_inputs() -> None:
    model = net()
    result = quick(model, torch.randn(2, 7, 24))
    assert_right(result, model, torch.randn(7, 2, 24).transpose(0, 1))
    assert_right(result, model, torch.randn(2, 24, 7).transpose(1, 2))
    assert_right(result, model, torch.randn(2, 14, 48)[:, ::2, ::2])
    assert_right(result, model, torch.randn(1, 7, 24).expand(4, 7, 24))
    assert_right(quick(model, torch.randn(2, 24, 7).transpose(1, 2)), model, torch.randn(2, 7, 24))
    assert_right(quick(model, torch.randn(1, 7, 24).expand(4, 7, 24)), model, torch.randn(2, 7, 24))


def test_one_dimensional_inputs() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    result = quick(model, torch.randn(16))
    assert_right(result, model, torch.randn(16))
    with pytest.raises(InputError):
        result(torch.randn(2, 16))


def test_a_size_that_only_a_run_tells() -> None:
    model = Apply(lambda linear, x: linear(x[x.sum(1) > 0])).eval()
    result = quick(model, torch.randn(30, 16))
    assert_right(result, model, torch.randn(50, 16))
