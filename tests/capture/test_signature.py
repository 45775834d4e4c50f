"""Arguments of a call: bound as the model binds them, whatever way the example was given."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.capture.signature import left_out, positional
from fxprune.errors import InputError
from tests.oracle import assert_close

A, B = torch.randn(3, 8), torch.randn(3, 8)
QUICK = {"options": {"compile": False}, "progress": False}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
        y = self.linear(a) * scale - 2 * b
        return y if mask is None else y * mask


EXAMPLES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "by position": ((A, B), {}),
    "by name": ((), {"a": A, "b": B}),
    "by name, the other way round": ((), {"b": B, "a": A}),
    "with defaults": ((A, B, 1.0), {"mask": None}),
    "with defaults by name": ((), {"mask": None, "b": B, "scale": 1.0, "a": A}),
    "both": ((A,), {"scale": 1.0, "b": B}),
}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("example", EXAMPLES)
def test_a_call_may_be_written_in_any_way(example: str, trainable: bool) -> None:
    model = Model().eval()
    args, kwargs = EXAMPLES[example]
    result = fxprune.transform(model, None, args, kwargs, trainable=trainable, **QUICK)
    for each in (result, pickle.loads(pickle.dumps(result))):
        for args, kwargs in EXAMPLES.values():
            assert_close(each(*args, **kwargs).detach(), model(A, B).detach())


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((A, B), {"scale": 2.0}, "scale = 2.0: the model was captured without it, which is 1.0"),
        ((A, B, 2), {}, "scale = 2"),
        ((A, B), {"mask": torch.ones(3, 8)}, r"mask = a tensor of shape \[3, 8\]: .* without it, which is None"),
        ((A, B), {"c": None}, "cannot take the arguments c"),
        ((A, B), {"a": A}, 'two values for "a"'),
        ((A, B, 1.0, None), {}, "cannot take the arguments 1 positional"),
        ((A,), {}, 'without argument "b"'),
    ],
)
def test_a_call_that_is_another_is_refused(args: Any, kwargs: Any, words: str) -> None:
    result = fxprune.transform(Model().eval(), None, (A, B), **QUICK)
    with pytest.raises(InputError, match=words) as error:
        result(*args, **kwargs)
    assert error.value.do


def test_a_value_that_was_given_at_capture_has_to_be_given_unless_it_is_the_default() -> None:
    model = Model().eval()
    result = fxprune.transform(model, None, (A, B), {"scale": 2.0}, **QUICK)
    assert_close(result(A, B, 2.0), model(A, B, 2.0))
    with pytest.raises(InputError, match='without argument "scale"'):
        result(A, B)


def test_arguments_beyond_the_parameters() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, *others: Tensor, **more: Tensor) -> Tensor:
            return x + 2 * others[0] + 3 * others[1] + 4 * more["y"]

    model, xs = Sum().eval(), [torch.randn(2, 3) for _ in range(4)]
    result = fxprune.transform(model, None, xs[:3], {"y": xs[3]}, **QUICK)
    assert_close(result(*xs[:3], y=xs[3]), model(*xs[:3], y=xs[3]))
    with pytest.raises(InputError):
        result(*xs, y=xs[3])


def test_an_exported_program_has_its_own_names() -> None:
    model = Model().eval()
    exported = torch.export.export(model, (A,), {"b": B})
    result = fxprune.transform(exported, **QUICK)
    assert_close(result(A, b=B), model(A, B))
    # It knows no places for what it took by name, and would not know which is meant.
    with pytest.raises(InputError, match="1 positional"):
        result(A, B)


class Configured(nn.Module):
    """A model that reads what it is not told off its configuration, as those of transformers do."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.linear, self.config = nn.Linear(8, 8), SimpleNamespace(**config)

    def forward(self, x: Tensor, output_all: bool | None = None, **kwargs: Any) -> Any:
        output_all = self.config.output_all if output_all is None else output_all
        use_cache = kwargs.get("use_cache") if kwargs.get("use_cache") is not None else self.config.use_cache
        y = self.linear(x)
        return [y, x] if output_all else [y] if use_cache else y


def test_what_none_stands_for_is_in_the_configuration() -> None:
    model = Configured(output_all=False, use_cache=True).eval()
    result = fxprune.transform(model, None, (A,), **QUICK)
    told: list[dict[str, Any]] = [
        {"output_all": False}, {"output_all": None, "use_cache": True}, {"use_cache": None}
    ]  # fmt: skip
    for kwargs in told:
        assert_close(result(A, **kwargs)[0], model(A, **kwargs)[0].detach())
    for kwargs in ({"output_all": True}, {"use_cache": False}):
        with pytest.raises(InputError, match="captured without it"):
            result(A, **kwargs)
    result = fxprune.transform(model, None, (A,), {"output_all": False}, **QUICK)
    assert_close(result(A)[0], model(A)[0].detach())


def test_what_a_signature_says() -> None:
    def forward(x: Any, n: int = 3, *rest: Any, flag: bool = True, table: Any = A, **more: Any) -> None: ...

    assert positional(forward) == ("x", "n")
    assert left_out(forward) == {"n": (3,), "flag": (True,)}
    assert positional(None) == positional(dict) == () and left_out(None) == left_out(dict) == {}
