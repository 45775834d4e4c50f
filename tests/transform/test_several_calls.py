"""Example calls of several sizes: what differs is dynamic, all are checked, and layouts are chosen for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Plan, Rule, Unstructured
from fxprune.capture.several import differing, is_several, widest
from fxprune.errors import InputError
from fxprune.lower.layouts.choose import Chooser
from tests.oracle import assert_close

QUICK = {"options": {"compile": False}, "progress": False}


class Tokens(nn.Module):
    """[batch, tokens] -> [batch, tokens, 8], with every token looking at every other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 8)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        padded = None if mask is None else mask == 0
        return self.last(self.attend(x, x, x, key_padding_mask=padded, need_weights=False)[0])


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(11, (batch, tokens))


SIZES = [(2, 7), (1, 5), (3, 1), (1, 1), (5, 12)]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "calls", [[(ids(2, 5),), (ids(2, 9),)], [(ids(1, 5),), (ids(1, 1),)], [(ids(4, 1),), (ids(2, 1),), (ids(1, 6),)]]
)
def test_what_differs_is_dynamic(calls: list[Any], trainable: bool) -> None:
    model = Tokens().eval()
    result = fxprune.transform(model, None, calls, trainable=trainable, **QUICK)
    for size in SIZES:
        x = ids(*size)
        assert_close(result(x).detach(), model(x).detach())


def test_calls_by_name_and_what_all_have_in_common() -> None:
    model = Tokens().eval()
    calls = [{"ids": ids(2, n)} for n in (5, 9)]
    # One mask for both would be one size for both.
    with pytest.raises(InputError, match="cannot run the model on the example inputs"):
        fxprune.transform(model, None, calls, {"mask": torch.ones(2, 5)}, **QUICK)
    masked = [{**call, "mask": torch.ones(call["ids"].shape)} for call in calls]
    result = fxprune.transform(model, None, masked, **QUICK)
    for size in SIZES:
        x, mask = ids(*size), torch.ones(size)
        mask[:, 1:] = torch.rand(mask[:, 1:].shape).round()
        assert_close(result(ids=x, mask=mask), model(x, mask).detach())
    one = fxprune.transform(model, None, {"ids": ids(2, 5)}, {"mask": None}, **QUICK)
    assert_close(one(calls[0]["ids"]), model(calls[0]["ids"]).detach())


def test_every_call_is_checked_and_tuned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    choose, seen = Chooser.choose, []
    monkeypatch.setattr(Chooser, "choose", lambda self, site: (seen.append(site.tokens), choose(self, site))[1])
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval()
    plan = Plan([Rule("*", Unstructured(0.9))])
    calls = [(torch.randn(n, 64),) for n in (3, 17, 1)]
    result = fxprune.transform(model, plan, calls, **QUICK)
    held = {row.call for row in result.report.checks if row.what == "result = pruned model"}
    assert {"example call 2", "example call 3"} <= held
    assert seen == [(1, 3, 17)]


@pytest.mark.parametrize("check", [True, False])
def test_a_size_that_the_model_fixes_is_told_with_the_call(check: bool) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * (2 if x.shape[1] == 5 else 3)

    with pytest.raises(InputError, match=r"one graph for these example calls at example: cannot call with"):
        fxprune.transform(
            Fixed().eval(), None, [(torch.randn(2, 5, 4),), (torch.randn(2, 6, 4),)], check=check, **QUICK
        )


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([(ids(2, 3),), (ids(2, 3), torch.ones(2, 3))], "nested otherwise"),
        ([(ids(2, 3), torch.ones(2, 3)), (ids(2, 3), torch.ones(2, 3).double())], "flat input 2 is torch.float32"),
        ([(ids(2, 3),), (ids(2, 3)[0],)], "flat input 1 is torch.int64 with 2 dim"),
        ([(ids(2, 3), 1), (ids(2, 3), True)], "flat input 2 is 1 in the first and True"),
    ],
)
def test_what_differs_in_more_than_sizes_is_refused(calls: list[Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        fxprune.transform(Tokens().eval(), None, calls, **QUICK)
    assert "call 2 of example_inputs" in error.value.where and error.value.do
    with pytest.raises(InputError, match="beside several example calls"):
        fxprune.transform(Tokens().eval(), None, calls, dynamic_shapes=({0: 3},), **QUICK)


@pytest.mark.parametrize("check", [True, False])
def test_an_exported_program_takes_the_calls_that_it_takes(check: bool) -> None:
    model, x = nn.Linear(4, 3).eval(), torch.randn(3, 4)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=9)},))
    result = fxprune.transform(exported, None, [(x,), (torch.randn(9, 4),)], check=check, **QUICK)
    assert_close(result(x), model(x).detach())
    with pytest.raises(InputError, match="cannot run the model on the example inputs"):
        fxprune.transform(exported, None, [(x,), (torch.randn(10, 4),)], check=check, **QUICK)


def test_what_is_a_list_of_calls() -> None:
    x, y = torch.ones(2), torch.ones(3)
    assert is_several([(x,), (y,)]) and is_several([{"x": x}, {"x": y}])
    for one in ((x,), [x, y], [(x,)], ((x,), (y,)), [(x,), x], [{"x": x}], {"x": x}, [], None):
        assert not is_several(one)
    with pytest.raises(InputError, match="a dict holds arguments by name"):
        fxprune.transform(nn.Linear(2, 2).eval(), None, {1: x}, **QUICK)
    with pytest.raises(InputError, match="a dict holds arguments by name"):
        fxprune.transform(nn.Linear(2, 2).eval(), None, {"input": x}, {"input": x}, **QUICK)


def test_the_graph_is_that_of_the_call_with_the_largest_smallest_size() -> None:
    calls: list[Any] = [((ids(3, 1),), {}), ((ids(2, 4),), {}), ((ids(1, 9),), {})]
    assert differing(calls).dims == ((0, 1),)
    assert widest(calls, differing(calls)) is calls[1]
