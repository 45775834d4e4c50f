"""Subnormal numbers: which dtypes have them taken as zeros, and what the other elements hide."""

from __future__ import annotations

import pytest
import torch

from fxprune.select import mask
from fxprune.select.subnormal import count_subnormal, flush, flush_hidden

LEAST = {torch.float32: 1.1754943508222875e-38, torch.bfloat16: 1.1754943508222875e-38, torch.float64: 2.3e-308}


@pytest.mark.parametrize("dtype", LEAST)
def test_what_is_below_the_least_normal_number_becomes_zero(dtype: torch.dtype) -> None:
    least = LEAST[dtype]
    x = torch.tensor([1.0, least, -least, least / 8, -least / 8, 0.0, -0.0], dtype=dtype)
    assert count_subnormal(x, hidden=False) == count_subnormal(x, hidden=True) == 2
    flushed = flush(x)
    assert torch.equal(flushed, torch.tensor([1.0, least, -least, 0, 0, 0, 0], dtype=dtype))
    assert not flushed[3:].signbit().any() and flushed.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.int64])
def test_small_weights_of_other_dtypes_are_weights(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, 1e-5, 1e-7]).to(dtype)
    assert count_subnormal(x, hidden=False) == 0 and flush_hidden(x) is x


def test_elements_as_small_as_all_others_are_not_hidden() -> None:
    x = torch.tensor([1e-41, 1e-38, 0.0])
    assert count_subnormal(x, hidden=False) == 2 and count_subnormal(x, hidden=True) == 0
    assert flush_hidden(x) is x
    x[2] = 1e-30
    assert count_subnormal(x, hidden=True) == 2


def test_they_are_counted_in_pieces_of_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask, "CHUNK", 8)
    x = torch.ones(9, 7)
    x[2:5, 1:3] = -1e-40
    assert count_subnormal(x, hidden=True) == count_subnormal(x.t(), hidden=True) == 6
    assert count_subnormal(torch.empty(0, 3), hidden=False) == 0
