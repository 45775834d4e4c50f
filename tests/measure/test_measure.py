"""The benchmark: shape of what it returns, and what it compares. Nothing here asserts a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.errors import InputError
from fxprune.measure.benchmark import _ways, benchmark, device_of
from fxprune.measure.timing import interleave, interleave_graphs


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
    result = benchmark(lambda: None, lambda: None, threads=before + 1, rounds=3, progress=False)
    assert result.threads == before + 1
    assert torch.get_num_threads() == before


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match="training mode"):
        benchmark(nn.Linear(2, 2), nn.Linear(2, 2), (torch.randn(1, 2),), progress=False)


def test_a_bare_tensor_as_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="Pass a tuple"):
        benchmark(nn.Identity(), nn.Identity(), torch.randn(1, 2), progress=False)  # pyright: ignore[reportArgumentType]


def test_on_a_gpu_the_dense_side_may_record_cuda_graphs() -> None:
    model = nn.Linear(2, 2).eval()
    on_cpu = ["eager", "torch.compile", "torch.compile + freezing"]
    assert list(_ways(model, None)) == list(_ways(model, torch.device("cpu"))) == on_cpu
    graphs = ["torch.compile, reduce-overhead", "torch.compile, max-autotune"]
    assert list(_ways(model, torch.device("cuda"))) == on_cpu + graphs


def test_the_device_is_that_of_the_first_tensor_on_one() -> None:
    assert device_of((torch.ones(1), [torch.ones(2)]), {"mask": None}) is None and device_of() is None


@pytest.mark.cuda
def test_what_runs_on_a_gpu_is_timed_between_events() -> None:
    x = torch.randn(64, 64, device="cuda")
    assert device_of(("text", [x])) == x.device
    calls: list[int] = []
    samples = interleave([lambda: calls.append(1), lambda: x @ x], x.device, seconds=0.0, min_rounds=4)
    assert [len(s) for s in samples] == [4, 4] and len(calls) == 5 and min(samples[1]) > 0
    graphs = interleave_graphs([lambda: x @ x], x.device, seconds=0.0, min_rounds=4)
    assert len(graphs[0]) == 4 and min(graphs[0]) > 0
    result = benchmark(nn.Linear(64, 64).eval().cuda(), lambda x: x, (x,), rounds=5, progress=False)
    assert result.device == torch.cuda.get_device_name() and len(result.a.samples) == 5
