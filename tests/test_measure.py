"""The benchmark: shape of what it returns, and what it compares. Nothing here asserts a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.errors import InputError
from fxprune.measure import benchmark
from fxprune.timing import interleave


def test_interleave_gives_every_function_as_many_rounds() -> None:
    calls: list[str] = []
    a, b = interleave([lambda: calls.append("a"), lambda: calls.append("b")], seconds=0.0, min_rounds=3, max_rounds=3)
    assert len(a) == len(b) == 3
    assert min(*a, *b) >= 0
    assert "".join(calls).replace("a", "") and "".join(calls).rstrip("b").endswith("a")


def test_an_uncompiled_module_is_run_in_the_best_of_three_ways() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    result = benchmark(model, lambda x: x, (torch.randn(2, 8),), rounds=5, progress=False)
    assert result.a.way in ("eager", "torch.compile", "torch.compile + freezing")
    assert result.b.way == "as given"
    assert len(result.a.samples) == len(result.b.samples) == 5
    assert result.ratio == pytest.approx(result.a.median / result.b.median)
    assert result.ratio_low <= result.ratio <= result.ratio_high
    text = str(result)
    assert "threads" in text and "interval" in text and result.device in text


def test_threads_are_set_and_put_back() -> None:
    before = torch.get_num_threads()
    result = benchmark(lambda: None, lambda: None, threads=1, rounds=3, progress=False)
    assert result.threads == 1
    assert torch.get_num_threads() == before


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match="training mode"):
        benchmark(nn.Linear(2, 2), nn.Linear(2, 2), (torch.randn(1, 2),), progress=False)


def test_a_bare_tensor_as_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="Pass a tuple"):
        benchmark(nn.Identity(), nn.Identity(), torch.randn(1, 2), progress=False)  # pyright: ignore[reportArgumentType]
