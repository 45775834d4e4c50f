"""The comparison that every result passes: it must see what is wrong, whatever stands beside it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fxprune.check.calls import Call, second_call
from fxprune.check.compare import compare, outputs

CALL = Call("example", (), {})
ONES = torch.ones(3)
NAN, INF = torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf])


@pytest.mark.parametrize(
    ("expected", "got", "ok"),
    [
        ([ONES], [ONES], True),
        ([ONES], [ONES + 9e-5], True),
        ([ONES], [ONES + 2e-4], False),
        ([1000 * ONES], [1000 * ONES + 0.05], True),
        ([ONES, ONES], [ONES], False),
        ([ONES], [torch.ones(3, 1)], False),
        ([ONES], [ONES.double()], False),
        ([ONES.double()], [ONES.double() + 1e-8], False),
        ([ONES.bfloat16()], [ONES.bfloat16() * 1.01], True),
        ([torch.tensor([1, 2])], [torch.tensor([1, 3])], False),
        ([torch.zeros(2)], [torch.zeros(2)], True),
        ([torch.zeros(0)], [torch.zeros(0)], True),
        ([3, None, "a"], [3, None, "a"], True),
        ([3], [3.0], False),
        ([NAN], [NAN], True),
        ([NAN], [torch.tensor([1.0, 0.0])], False),
        ([INF], [-INF], False),
        ([torch.tensor([1.0, 0.0])], [NAN], False),
        ([NAN, ONES], [torch.tensor([2.0, math.nan]), ONES], False),
        ([ONES, ONES], [torch.full((3,), math.nan), ONES], False),
        ([ONES, ONES], [ONES, torch.full((3,), math.inf)], False),
        ([torch.tensor([1j])], [torch.tensor([1j])], True),
        ([torch.tensor([1j])], [torch.tensor([-1j])], False),
    ],
)
def test_compare(expected: list[Any], got: list[Any], ok: bool) -> None:
    assert compare("a = b", CALL, expected, got).ok is ok


def test_the_second_input_is_like_the_first() -> None:
    mask = torch.zeros(8, 8).masked_fill(torch.ones(8, 8).triu(1).bool(), -math.inf)
    floats, ints = 5 + 2 * torch.randn(100, 50), torch.arange(40)
    first = Call("example", (floats, floats, mask, ints), {"n": 3, "empty": torch.empty(0, 4), "none": None})
    second = second_call(first)
    a, b, new_mask, new_ints = second.args
    assert abs(a.mean() - 5) < 0.2 and abs(a.std() - 2) < 0.2
    assert not torch.equal(a, floats) and not torch.equal(a, b)
    assert torch.equal(torch.isinf(new_mask), torch.isinf(mask)) and not new_mask.isnan().any()
    assert torch.equal(new_ints.sort().values, ints)
    assert second.kwargs["n"] == 3 and second.kwargs["none"] is None
    assert torch.equal(second_call(first).args[0], a)


def test_a_call_is_copied_with_its_strides() -> None:
    tensors = (torch.randn(4, 6).t(), torch.randn(1, 3).expand(5, 3), torch.randn(8, 8)[::2, 1::3], torch.empty(0, 2))
    call = Call("example", tensors, {"scalar": torch.tensor(2.0)})
    args, kwargs = call.copy()
    for mine, theirs in zip((*args, kwargs["scalar"]), (*tensors, call.kwargs["scalar"]), strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()
        assert mine.numel() == 0 or mine.data_ptr() != theirs.data_ptr()


def test_outputs_leave_the_call_as_it_was() -> None:
    x = torch.zeros(3)
    assert torch.equal(outputs(lambda x: x.add_(1), Call("example", (x,), {}))[0], torch.ones(3))
    assert not x.any()
