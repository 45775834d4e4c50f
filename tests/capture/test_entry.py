"""The entry check: a call outside of what was captured is refused, never computed wrong."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

import fxprune
from fxprune.capture.entry import EntryCheck, TensorInput
from fxprune.errors import InputError
from tests.oracle import assert_close, quick, zeroed


class Of(nn.Module):
    """`function(linear, x, y)` with linear [16, 16]; `y` may be missing."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(16, 16), function

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.function(self.linear, x) if y is None else self.function(self.linear, x, y)


# What a model may do with a size: branch, divide, cut, fold, compare two of them, look it up.
ONE: dict[str, Callable[..., Any]] = {
    "mean": lambda f, x: f(x).sum(0) / x.shape[0],
    "numel": lambda f, x: f(x) / x.numel(),
    "float": lambda f, x: f(x) / float(x.shape[0]),
    "sqrt": lambda f, x: f(x) / math.sqrt(x.shape[0]),
    "power": lambda f, x: f(x) / x.shape[0] ** 0.5,
    "tensor": lambda f, x: f(x) / torch.tensor([float(x.shape[0])]),
    "above": lambda f, x: 2 * f(x) if x.shape[0] > 4 else f(x),
    "is one": lambda f, x: 2 * f(x) if x.shape[0] == 1 else f(x),
    "odd": lambda f, x: f(x) / (2 if x.shape[0] % 2 else 4),
    "among": lambda f, x: f(x) * (2 if x.shape[0] in (3, 5) else 1),
    "look up": lambda f, x: f(x) * {3: 2.0, 5: 4.0}.get(x.shape[0], 1.0),
    "as text": lambda f, x: f(x) * len(f"{x.shape[0]:d}" * x.shape[0]),
    "whole shape": lambda f, x: f(x) * (2 if tuple(x.shape) == (3, 16) else 1),
    "max": lambda f, x: f(x) / max(x.shape[0], 4),
    "loop": lambda f, x: sum(f(x[i]) for i in range(x.shape[0])),
    "rows": lambda f, x: sum((i + 1) * f(row) for i, row in enumerate(x)),
    "slices": lambda f, x: f(x)[:4].sum(0) + f(x)[2:].sum(0) + f(x)[-2:].sum(0),
    "half": lambda f, x: f(x)[: x.shape[0] // 2].sum(0),
    "chunk": lambda f, x: torch.cat([(i + 1) * c for i, c in enumerate(f(x).chunk(2))]),
    "split": lambda f, x: torch.cat([(i + 1) * c for i, c in enumerate(f(x).split(2))]),
    "tensor split": lambda f, x: torch.cat([(i + 1) * c for i, c in enumerate(f(x).tensor_split(3))]),
    "pairs": lambda f, x: f(x).view(x.shape[0] // 2, 2, -1).sum(1),
    "literal": lambda f, x: f(x).reshape(3, -1),
    "squeeze": lambda f, x: f(x).squeeze(),
    "transpose": lambda f, x: f(x) @ f(x).T,
    "arange": lambda f, x: f(x) * torch.arange(x.shape[0])[:, None],
    "deviation": lambda f, x: f(x).var(0, correction=0),
}
TWO: dict[str, Callable[..., Any]] = {
    "add": lambda f, x, y: f(x) + y,
    "apart": lambda f, x, y: f(x).sum(0) + y.sum(0),
    "if equal": lambda f, x, y: f(x).sum(0) + y.sum(0) if x.shape[0] == y.shape[0] else f(x).sum(0),
    "product": lambda f, x, y: f(x).sum(0) + y.view(-1, 8).sum(0).repeat(2) * (x.shape[0] * y.shape[0]),
    "cat": lambda f, x, y: f(torch.cat([x, y])).mean(0),
    "ratio": lambda f, x, y: f(x) + y.repeat_interleave(x.shape[0] // y.shape[0], 0),
    "smaller": lambda f, x, y: f(x).sum(0) if x.shape[0] < y.shape[0] else 2 * f(y).sum(0),
}


def takes(function: Callable[..., Any], *sizes: int) -> bool:
    """Whether the model itself can take tensors of these sizes."""
    try:
        Of(function)(*(torch.randn(n, 16) for n in sizes))
    except (RuntimeError, ZeroDivisionError):
        return False
    return True


def right_or_refused(model: nn.Module, result: Any, *args: Tensor) -> bool:
    """Whether the result answered; where it did, it was right."""
    try:
        got = result(*args)
    except InputError:
        return False
    with torch.no_grad():
        assert_close(got, zeroed(model, result)(*args))
    return True


@pytest.mark.parametrize(("name", "captured"), [(f, n) for f in ONE for n in (1, 2, 3, 6) if takes(ONE[f], n)])
def test_one_size(name: str, captured: int) -> None:
    model = Of(ONE[name]).eval()
    result = quick(model, torch.randn(captured, 16))
    answered = [n for n in range(1, 14) if right_or_refused(model, result, torch.randn(n, 16))]
    assert captured in answered


PAIRS = ((1, 1), (3, 3), (6, 2), (4, 1), (1, 4), (2, 3))


@pytest.mark.parametrize(("name", "captured"), [(f, p) for f in TWO for p in PAIRS if takes(TWO[f], *p)])
def test_two_sizes(name: str, captured: tuple[int, int]) -> None:
    model = Of(TWO[name]).eval()
    sample = tuple(torch.randn(n, 16) for n in captured)
    result = quick(model, *sample)
    assert right_or_refused(model, result, *sample)
    for n in (1, 2, 3, 4, 6):
        for m in (1, 2, 3, 4):
            right_or_refused(model, result, torch.randn(n, 16), torch.randn(m, 16))


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(ONE)),
    batch=st.integers(1, 5),
    length=st.integers(1, 8),
    other=st.tuples(st.integers(1, 7), st.integers(1, 20)),
)
def test_a_fixed_sequence(name: str, batch: int, length: int, other: tuple[int, int]) -> None:
    """The same functions along dim 1, which is fixed at capture."""
    assume(takes(ONE[name], length))
    model = Of(lambda f, x: torch.stack([ONE[name](f, sample) for sample in x.unbind()])).eval()
    result = quick(model, torch.randn(batch, length, 16))
    assert right_or_refused(model, result, torch.randn(batch, length, 16))
    right_or_refused(model, result, torch.randn(*other, 16))


def test_a_batch_of_one_stands_for_every_batch() -> None:
    model = Of(ONE["mean"]).eval()
    result = quick(model, torch.randn(1, 16))
    assert all(right_or_refused(model, result, torch.randn(n, 16)) for n in (1, 2, 7))


def test_what_is_broadcast_does_not_fix_the_batch() -> None:
    model = Of(TWO["add"]).eval()
    result = quick(model, torch.randn(3, 16), torch.randn(1, 16))
    assert all(right_or_refused(model, result, torch.randn(n, 16), torch.randn(1, 16)) for n in (1, 2, 7))


def test_ranges_and_relations_of_dynamic_shapes() -> None:
    model = Of(TWO["apart"]).eval()
    batch = Dim("batch", min=4, max=8)
    result = quick(model, torch.randn(5, 16), torch.randn(6, 16), dynamic_shapes=({0: batch}, {0: batch + 1}))
    for n, m, fits in ((4, 5, True), (8, 9, True), (5, 5, False), (3, 4, False), (9, 10, False)):
        assert right_or_refused(model, result, torch.randn(n, 16), torch.randn(m, 16)) == fits


def test_a_model_that_reads_strides_is_held_to_those_of_its_example() -> None:
    model, x = Of(lambda f, x: f(x) if x.is_contiguous() else 2 * f(x)).eval(), torch.randn(4, 16)
    other = torch.randn(16, 5).t()
    for example, same, changed in ((x, torch.randn(5, 16), other), (x.t().contiguous().t(), other, x)):
        result = quick(model, example)
        assert "strides" in str(result.report)
        assert_close(result(same), zeroed(model, result)(same))
        with pytest.raises(InputError, match="contiguous") as error:
            result(changed)
        assert error.value.why and error.value.do
    plain = quick(Of(lambda f, x: f(x)).eval(), x)
    assert plain(other).shape == (5, 16)


def test_a_dynamic_int() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor, n: int) -> Tensor:
            return self.linear(x) * n if n < 4 else self.linear(x)

    model = Scale().eval()
    result: Any = quick(model, torch.randn(2, 16), 3, dynamic_shapes=({0: Dim.DYNAMIC}, Dim.DYNAMIC))
    for n in (2, 3):
        x = torch.randn(5, 16)
        assert_close(result(x, n), zeroed(model, result)(x, n).detach())
    for n in (5, 2.5, True, None, torch.tensor(2)):
        with pytest.raises(InputError):
            result(torch.randn(5, 16), n)


def test_the_check_is_plain_data() -> None:
    sizes = TensorInput(torch.float32, torch.device("cpu"), ("s0", 16))
    check = EntryCheck(("x", "n"), ("x", "n"), (sizes, ("constant", 3)), (("a[0].size()[0] % 2 == 0", "x is even"),))
    for entry in (check, copy.deepcopy(check), pickle.loads(pickle.dumps(check))):
        entry.check((torch.ones(4, 16), 3), {})
        entry.check((torch.ones(4, 16),), {"n": 3})
        for bad, word in ((torch.ones(3, 16), "x is even"), (torch.ones(4, 15), "16"), ("x", "str")):
            with pytest.raises(InputError, match=word):
                entry.check((bad, 3), {})
        with pytest.raises(InputError, match="fixed"):
            entry.check((torch.ones(4, 16), 4), {})


def test_a_guard_that_divides_by_zero_is_not_met() -> None:
    sizes = TensorInput(torch.float32, torch.device("cpu"), ("s0",))
    check = EntryCheck(("x",), ("x",), (sizes,), (("8 // (a[0].size()[0] - 2) > 0", "8 // (x - 2) > 0"),))
    check.check((torch.ones(3),), {})
    with pytest.raises(InputError):
        check.check((torch.ones(2),), {})


@pytest.mark.parametrize("by_name", [False, True])
def test_an_exported_program_with_two_inputs(by_name: bool) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, a: Any, b: Any) -> Any:
            return self.linear(a["x"]) + b

    model, x, y = Two().eval(), torch.randn(3, 8), torch.randn(3, 8)
    args, kwargs = (({"x": x},), {"b": y}) if by_name else (({"x": x}, y), {})
    auto = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(model, args, kwargs, dynamic_shapes={"a": {"x": auto}, "b": auto})
    result = fxprune.transform(exported, options={"compile": False}, progress=False)
    z = torch.randn(5, 8)
    assert torch.equal(result({"x": z}, b=z) if by_name else result({"x": z}, z), model({"x": z}, z))
    with pytest.raises(
        InputError, match=r"b.size\(\)\[0\] == a\['x'\].size\(\)\[0\]; got a\['x'\] \[5, 8\], b \[3, 8\]"
    ):
        result({"x": z}, b=y) if by_name else result({"x": z}, y)
