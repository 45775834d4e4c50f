"""Calls of a result: nested and keyword arguments, aliases, copies, pickles, and what a result is not."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Plan, Rule, Unstructured
from fxprune.errors import InputError
from tests.oracle import COMPILED, HALF, QUICK, Apply, assert_close, assert_right, quick, zeroed


@pytest.fixture(autouse=True)
def compiled_code_does_not_pile_up() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    """Linears of different sizes around a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(24, 32), nn.Sequential(nn.Linear(32, 40), nn.GELU(), nn.Linear(40, 24))

    def forward(self, x: Tensor) -> Tensor:
        y = self.query(x)
        return self.out((y @ y.transpose(-1, -2)).softmax(-1) @ y)


def net() -> Any:
    return Attention().eval()


Pair = namedtuple("Pair", "a b")


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, first: dict[str, Any], pair: Pair, *, flag: bool, count: int, nothing: None = None) -> Any:
        y = self.linear(first["x"]) - 2 * first["more"][0] + 3 * first["more"][1]["z"]
        y = y * count if flag and nothing is None else y
        return {"y": y, "list": [pair.b, (y.argmax(-1), None)], "pair": Pair(y + pair.a, 7), "size": y.shape[0]}


def structured(n: int, *, swapped: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, z = torch.randn(n, 16), torch.randn(n, 16)
    first = {"x": x, "more": [torch.randn(n, 16), {"z": z}]}
    if swapped:
        first = dict(reversed(first.items()))
    kwargs: dict[str, Any] = {"flag": True, "count": 3}
    return (first, Pair(torch.randn(n, 16), torch.randn(n, 2))), dict(reversed(kwargs.items())) if swapped else kwargs


@pytest.mark.parametrize("options", [QUICK, COMPILED], ids=["eager", "compiled"])
def test_nested_inputs_and_outputs(options: dict[str, Any]) -> None:
    model = Structured().eval()
    args, kwargs = structured(3)
    result: Any = fxprune.transform(model, HALF, args, kwargs, options=options, progress=False)
    for n, swapped in ((3, False), (3, True), (5, True)):
        args, kwargs = structured(n, swapped=swapped)
        assert_right(result, model, *args, **kwargs)
    for change in ({"count": 4}, {"count": 3.0}, {"flag": False}, {"flag": 1}):
        with pytest.raises(InputError, match="fixed when the model was captured"):
            result(*args, **{**kwargs, **change})


def test_keyword_arguments_in_any_order_and_by_position() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, a: Tensor, b: Tensor | None = None, c: float = 1.0) -> Tensor:
            return self.linear(a) * c if b is None else self.linear(a) - b * c

    model = Two().eval()
    a, b = torch.randn(2, 16), torch.randn(2, 16)
    result = quick(model, plan=HALF, kwargs={"b": b, "a": a})
    for args, kwargs in (((), {"a": a, "b": b}), ((), {"b": b, "a": a})):
        assert_right(result, model, *args, **kwargs)
    result = quick(model, a, kwargs={"b": b})
    for args, kwargs in (((a, b), {}), ((a,), {"b": b}), ((), {"b": b, "a": a})):
        assert_right(result, model, *args, **kwargs)
    for args, kwargs in (((a,), {}), ((a, b, 2.0), {}), ((a, b), {"b": b}), ((a, None), {}), ((a, b), {"d": b})):
        with pytest.raises(InputError):
            result(*args, **kwargs)


def test_star_arguments() -> None:
    model = Apply(lambda linear, *xs, scale: linear(xs[0]) - 2 * xs[1] * scale).eval()
    x, y, scale = torch.randn(2, 16), torch.randn(2, 16), torch.randn(1)
    result = quick(model, x, y, kwargs={"scale": scale})
    assert_right(result, model, x, y, scale=scale)
    assert_right(result, model, y, x, scale=-scale)
    for args in ((x,), (x, y, y)):
        with pytest.raises(InputError):
            result(*args, scale=scale)


def test_one_tensor_for_two_arguments_is_not_one_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, a: Tensor, b: dict[str, Tensor]) -> Tensor:
            return self.linear(a) - b["c"] + 2 * b["d"]

    model, x = Two().eval(), torch.randn(3, 16)
    result = quick(model, x, {"c": x, "d": x})
    assert_right(result, model, torch.randn(3, 16), {"c": torch.randn(3, 16), "d": torch.randn(3, 16)})


def test_an_ordered_dict_is_read_by_key_or_refused() -> None:
    model = Apply(lambda linear, d: linear(d["q"]) - d["p"]).eval()
    p, q = torch.randn(3, 16), torch.randn(3, 16)
    result = quick(model, OrderedDict(q=q, p=p))
    assert_right(result, model, OrderedDict(q=q, p=p))
    for other in (OrderedDict(p=p, q=q), {"q": q, "p": p}, OrderedDict(q=q), OrderedDict(q=q, p=p, r=p)):
        try:
            got = result(other)
        except InputError:
            continue
        assert_close(got, zeroed(model, result)(other).detach())


def test_a_model_that_writes_to_its_input() -> None:
    model = Apply(lambda linear, x: linear(x.add_(1))).eval()
    x = torch.randn(3, 16)
    kept = x.clone()
    result = quick(model, x)
    assert torch.equal(x, kept)
    mine, theirs = torch.randn(3, 16).repeat(2, 1, 1)
    assert_close(result(mine), zeroed(model, result)(theirs).detach())
    assert torch.equal(mine, theirs)


def test_the_result_gives_no_gradients_and_stays_in_eval_mode() -> None:
    result = quick(net(), torch.randn(2, 7, 24))
    assert not result(torch.randn(2, 7, 24)).requires_grad
    assert not any(p.requires_grad for p in result.parameters())
    assert not result.eval().training
    assert not result.train().training


@pytest.mark.parametrize("options", [QUICK, COMPILED], ids=["eager", "compiled"])
def test_autocast_outside_changes_nothing(options: dict[str, Any]) -> None:
    # Half of the linears stay dense: those would follow autocast, and hand bfloat16 to the packed ones.
    model, x = net(), torch.randn(2, 7, 24)
    result = fxprune.transform(model, Plan([Rule("out.*", Unstructured(0.5))]), (x,), options=options, progress=False)
    expected = result(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = result(x)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert not torch.is_autocast_enabled("cpu")


def test_the_result_does_not_follow_the_users_model() -> None:
    model, x = net(), torch.randn(2, 7, 24)
    result = quick(model, x, plan=Plan([Rule("query.weight", Unstructured(0.5))]))
    expected = result(x)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    assert torch.equal(result(x), expected)


@pytest.mark.parametrize("options", [QUICK, COMPILED], ids=["eager", "compiled"])
def test_copies_and_pickles(options: dict[str, Any]) -> None:
    model, x = net(), torch.randn(2, 7, 24)
    result: Any = fxprune.transform(model, HALF, (x,), options=options, progress=False)
    loaded = pickle.loads(pickle.dumps(result))
    buffer = io.BytesIO()
    torch.save(result, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(result), loaded, copy.deepcopy(loaded), torch.load(buffer, weights_only=False)):
        assert isinstance(other, torch.fx.GraphModule)
        assert_right(other, model, x)
        assert_right(other, model, torch.randn(3, 7, 24))
        assert str(other.report) == str(result.report)
        with pytest.raises(InputError):
            other(torch.randn(2, 8, 24))
        assert not other.train().training


def test_weights_take_what_their_layout_takes() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    result = quick(model, torch.randn(4, 512), plan=Plan([Rule("*", Unstructured(0.9))]))
    stored = sum(v.numel() * v.element_size() for v in result.state_dict().values())
    nonzeros = sum(mask.kept() for mask in result.selection.mask.values())
    assert stored < 6 * nonzeros + 0.1 * sum(4 * p.numel() for p in model.parameters())
    assert not any(v.shape == (512, 512) for v in result.state_dict().values())
