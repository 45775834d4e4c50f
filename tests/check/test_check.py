"""The comparison that every result passes: it must see what is wrong, whatever stands beside it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxprune.check.calls import Call, second_call
from fxprune.check.compare import compare, nothing_compared, outputs
from tests.oracle import Apply, quick

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
        ([INF], [INF * torch.tensor([1.0, -1.0])], False),
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


def test_each_output_has_the_tolerance_of_its_own_type() -> None:
    """The rounding of a half type is larger than an error of float32, and does not hide it."""
    half = ONES.bfloat16()
    assert compare("a = b", CALL, [half, ONES], [half * 1.01, ONES]).ok
    for order in (slice(None), slice(None, None, -1)):
        row = compare("a = b", CALL, [half, ONES][order], [half * 1.01, ONES + 1e-3][order])
        assert not row.ok and row.error == pytest.approx(1e-3, rel=1e-3)


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


# --- sentinels, and outputs of several scales ------------------------------------------------------------------------

SENTINELS = (-1e9, torch.finfo(torch.float32).min, 1e30, -65504.0, -math.inf)


@given(st.sampled_from(SENTINELS), st.floats(0.02, 0.98), st.floats(0.01, 5.0), st.integers(0, 2**32))
def test_a_sentinel_hides_nothing(value: float, share: float, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(6, 50, generator=generator) / 5
    hidden = torch.rand(6, 50, generator=generator) < share
    hidden[0, :2] = torch.tensor([True, False])
    expected = x.masked_fill(hidden, value)
    right = expected + 1e-6 * spread * torch.randn(6, 50, generator=generator)
    row = compare("a = b", CALL, [expected], [right])
    assert row.ok and row.compared == pytest.approx(float((~hidden).float().mean()))
    wrong = right.clone()
    wrong[0, 1] += 0.01 * spread
    assert not compare("a = b", CALL, [expected], [wrong]).ok
    wrong = right.clone()
    wrong[0, 0] = value * 0.99 if math.isfinite(value) else 1.0
    assert not compare("a = b", CALL, [expected], [wrong]).ok


def test_sentinels_that_were_added() -> None:
    x = torch.randn(4, 100)
    hidden = torch.arange(100) >= 20
    for value in (-1e9, torch.finfo(torch.float32).min):
        expected = x + torch.where(hidden, value, 0.0)
        row = compare("a = b", CALL, [expected], [expected + torch.where(hidden, 0.0, 1e-2)])
        assert not row.ok and row.compared == pytest.approx(0.2)


def test_what_stands_far_below_is_no_reason_for_sentinels() -> None:
    # What cancels leaves rounding of the others behind.
    expected = torch.tensor([5.0, -4.0, 3.0, 1e-7])
    assert compare("a = b", CALL, [expected], [expected + torch.tensor([0.0, 0.0, 0.0, 3e-7])]).ok


@given(st.integers(0, 2**32), st.floats(10.0, 1e12))
def test_a_huge_element_hides_nothing(seed: int, huge: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(40, 30, generator=generator)
    expected[3, 4] = huge
    assert compare("a = b", CALL, [expected], [expected * (1 + 1e-6)]).ok
    wrong = expected.clone()
    wrong[5, 6] += 0.1
    assert not compare("a = b", CALL, [expected], [wrong]).ok


def test_a_large_element_of_a_single_row_hides_little() -> None:
    expected = torch.randn(1, 200)
    expected[0, 7] = 5e3
    assert compare("a = b", CALL, [expected], [expected * (1 + 1e-6)]).ok
    wrong = expected.clone()
    wrong[0, 9] += 0.1
    assert not compare("a = b", CALL, [expected], [wrong]).ok


@pytest.mark.parametrize("small", ["few", "many", "half"])
def test_channels_of_other_scales(small: str) -> None:
    count = {"few": 1, "many": 30, "half": 16}[small]
    expected = torch.randn(64, 32)
    expected[:, count:] *= 5000
    noise = torch.randn(64, 32) * expected.abs().mean(0)
    assert compare("a = b", CALL, [expected], [expected + 1e-6 * noise]).ok
    wrong = expected.clone()
    wrong[:, 0] *= 1.05
    assert not compare("a = b", CALL, [expected], [wrong]).ok


@given(st.integers(0, 2**32), st.sampled_from(["normal", "relu", "softmax", "heavy", "cancelled", "dead channel"]))
def test_rounding_is_no_error(seed: int, kind: str) -> None:
    """float32 against float64 through some layers, in outputs of many kinds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 64, generator=generator)
    weights = [torch.randn(64, 64, generator=generator) / 8 for _ in range(4)]

    def run(dtype: torch.dtype) -> torch.Tensor:
        y = x.to(dtype)
        for weight in weights:
            y = (y @ weight.to(dtype)).tanh()
        if kind == "relu":
            return y.relu()
        if kind == "softmax":
            return (20 * y).softmax(-1)
        if kind == "heavy":
            return (y * 6).exp()
        if kind == "cancelled":
            return y - y.mean(0) * 0.999
        return y * (torch.arange(64) > 0) + y.mean().square() * 1e-9 if kind == "dead channel" else y

    row = compare("a = b", CALL, [run(torch.float32)], [run(torch.float64).float()])
    assert row.ok and row.compared == 1


@pytest.mark.parametrize(
    ("values", "compared", "blind"),
    [
        ([torch.full((3,), math.nan)], 0.0, (0,)),
        ([torch.full((3,), math.inf)], 0.0, (0,)),
        ([torch.full((3,), -1e9)], 0.0, (0,)),
        ([torch.full((3,), -65504.0).half()], 0.0, (0,)),
        ([torch.tensor([-1e9, math.nan])], 0.0, (0,)),
        ([torch.ones(3), torch.full((3,), math.nan)], 0.5, (1,)),
        ([torch.tensor([1.0, 2.0, math.nan, -1e9])], 0.5, ()),
        ([torch.zeros(3)], 1.0, ()),
        ([torch.tensor([0.0, 0.0, -1e9, -1e9])], 0.5, ()),
        ([torch.full((3,), 7.0)], 1.0, ()),
        ([torch.tensor([1, 2])], 1.0, ()),
        ([None, "a"], 0.0, ()),
        ([torch.zeros(0)], 0.0, ()),
    ],
)
def test_a_row_says_what_it_compared(values: list[Any], compared: float, blind: tuple[int, ...]) -> None:
    row = compare("a = b", CALL, values, values)
    assert row.ok and row.compared == compared and row.blind == blind
    told = nothing_compared([row])
    assert bool(told) == (bool(blind) or not compared)
    assert all(note.level == "warning" and "example" in note for note in told)
    assert ("nothing to compare" in row.verdict) == (not compared)


@pytest.mark.parametrize(
    ("forward", "told"), [(lambda y: y / 0, True), (lambda y: (y, y * math.nan), True), (tuple, False)]
)
def test_the_report_tells_of_checks_that_compared_nothing(forward: Any, told: bool) -> None:
    model = Apply(lambda linear, x: forward([linear(x)]) if forward is tuple else forward(linear(x))).eval()
    report = quick(model, torch.randn(4, 16)).report
    assert any(note.startswith("nothing to compare") for note in report.notes) is told
