"""Results without example inputs: their first call, from several threads, after an error, and from inside itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import FxPruneError
from fxprune.emit.pending import PendingModule
from fxprune.errors import InputError
from tests.oracle import HALF, QUICK, assert_right, quick


def model(width: int = 24) -> nn.Module:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 8)).eval()


def pending(module: nn.Module) -> Any:
    return fxprune.transform(module, HALF, options=QUICK, progress=False)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """What each call returns, or raises, when threads begin them together."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        torch.set_num_threads(1)
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        waiting = [pool.submit(run, call) for call in calls]
        return [w.exception() or w.result() for w in waiting]


def test_threads_that_make_the_first_call_at_once_share_one_transform() -> None:
    original = model()
    result = pending(original)
    finish, made = vars(result)["_finish"], []

    def counted(*call: Any) -> Any:
        made.append(threading.get_ident())
        return finish(*call)

    vars(result)["_finish"] = counted
    inputs = [torch.randn(batch, 16) for batch in (3, 3, 5, 7)]
    found = at_once([lambda x=x: result(x) for x in inputs])
    assert [tuple(y.shape) for y in found] == [(3, 8), (3, 8), (5, 8), (7, 8)]
    assert len(made) == 1 and not isinstance(result, PendingModule)
    for x, y in zip(inputs, found, strict=True):
        assert torch.equal(result(x), y)
        assert_right(result, original, x)


def test_threads_transform_different_models_at_once() -> None:
    models = [model(width) for width in (16, 24, 32, 40)]
    x = torch.randn(3, 16)
    found = at_once([lambda m=m: quick(m, x) for m in models])
    for original, result in zip(models, found, strict=True):
        assert_right(result, original, x)
        assert_right(result, original, torch.randn(5, 16))


def test_an_error_leaves_it_pending_for_all_threads() -> None:
    original = model()
    result = pending(original)
    wrong, x = torch.randn(3, 5), torch.randn(3, 16)
    found = at_once([lambda: result(wrong), lambda: result(wrong)])
    assert [type(error) for error in found] == [InputError, InputError] and result.report.pending
    result(x)
    assert_right(result, original, x)


def test_a_model_that_calls_its_own_result_is_refused() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.fast: list[Any] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.fast[0](self.linear(x))

    loop = Loop().eval()
    result = pending(loop)
    loop.fast.append(result)
    with pytest.raises(FxPruneError, match="inside its own first call"):
        result(torch.randn(2, 16))
    assert result.report.pending


def test_inside_a_compiled_model_the_first_call_transforms() -> None:
    original, x = model(), torch.randn(3, 16)
    result = pending(original)
    outer = torch.compile(nn.Sequential(result, nn.Softmax(-1)), backend="eager")
    with torch.no_grad():
        found = outer(x)
    assert not result.report.pending
    assert torch.equal(found, result(x).softmax(-1)) and torch.equal(outer(x), found)
    assert_right(result, original, x)
