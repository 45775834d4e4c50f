"""What calls of a model change is put back by value: attributes, containers, tensors however they were written to."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from fxprune.capture import state
from fxprune.capture.admit import untouched
from fxprune.capture.state import fingerprint
from fxprune.errors import InputError
from tests.oracle import snapshot


class Notes:
    """An object of the model's own package."""

    def __init__(self) -> None:
        self.lines: list[str] = ["first"]


class Holder(nn.Module):
    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.register_buffer("running", torch.arange(8.0))
        self.log: list[Any] = []
        self.nested: dict[str, Any] = {"a": [1, {"b": {2}}], "c": (deque([3]), OrderedDict(x=1, y=2))}
        self.unregistered = [nn.Linear(2, 2)]
        self.plain = torch.ones(3)
        self.array = np.ones(3)
        self.words = np.array(["not", "numbers"])
        self.notes = Notes()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def told(model: Holder) -> Any:
    """All that a holder holds, by value."""
    nested = len(model.nested["a"]), model.nested["a"][1]["b"].copy(), list(model.nested["c"][0])
    return (
        snapshot(model),
        list(model.log),
        (list(model.nested), nested, list(model.nested["c"][1].items())),
        (model.unregistered[0].weight.tolist(), model.plain.tolist(), model.array.tolist(), list(model.notes.lines)),
        model.generator.get_state().tolist(),
    )


def _data(model: Holder) -> None:
    model.linear.weight.data = model.linear.weight.data * 2


def _data_in_place(model: Holder) -> None:
    model.linear.weight.data.mul_(2)


def _set(model: Holder) -> None:
    with torch.no_grad():
        model.linear.weight.set_(torch.zeros(9, 9))


def _statistics(model: Holder) -> None:
    nn.functional.batch_norm(torch.randn(5, 4), model.norm.running_mean, model.norm.running_var, training=True)


WRITES: dict[str, Callable[[Holder], object]] = {
    "an attribute": lambda m: setattr(m, "cache", torch.ones(2)),
    "a list": lambda m: m.log.append(1),
    "a list in a dict": lambda m: m.nested["a"].append(3),
    "a set in a dict in a list": lambda m: m.nested["a"][1]["b"].add(5),
    "a deque in a tuple": lambda m: m.nested["c"][0].append(5),
    "the order of a dict": lambda m: m.nested["c"][1].move_to_end("x"),
    "a module in a list": lambda m: m.unregistered[0].weight.data.zero_(),
    "a tensor that is no buffer": lambda m: m.plain.add_(1),
    "an array": lambda m: m.array.fill(2),
    "an object": lambda m: m.notes.lines.append("second"),
    "a generator": lambda m: torch.rand(3, generator=m.generator),
    "a buffer": lambda m: m.running.add_(1),
    "a buffer through numpy": lambda m: np.copyto(m.running.numpy(), 7),
    "a parameter through .data": _data,
    "a parameter in place through .data": _data_in_place,
    "a parameter's storage": _set,
    "another parameter": lambda m: setattr(m.linear, "weight", nn.Parameter(torch.zeros(4, 6))),
    "requires_grad": lambda m: m.linear.weight.requires_grad_(False),
    "running statistics": _statistics,
    "a mode": lambda m: m.norm.train(),
    "a hook": lambda m: m.linear.register_forward_hook(lambda *_: None),
    "a submodule": lambda m: m.add_module("more", nn.ReLU()),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_is_put_back(name: str) -> None:
    model = Holder().eval()
    before = told(model)
    with untouched(model) as kept:
        WRITES[name](model)
        after = told(model)
        assert kept.restore() or name == "requires_grad"
        assert told(model) == before and after != before
        WRITES[name](model)
    assert told(model) == before


def test_what_is_put_back_is_put_back_after_an_error() -> None:
    model = Holder().eval()
    before = told(model)
    with pytest.raises(ZeroDivisionError), untouched(model):
        model.log.append(1)
        raise ZeroDivisionError
    assert told(model) == before


def test_random_streams_and_settings_are_put_back() -> None:
    def seen() -> Any:
        dtype, mode = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
        numbers = np.random.get_state()[1].tolist()  # pyright: ignore
        return torch.get_rng_state().tolist(), random.getstate(), numbers, dtype, mode, torch.is_grad_enabled()

    model = nn.Linear(2, 2)
    before = seen()
    with untouched(model):
        torch.rand(3), random.random(), np.random.rand(3)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(not before[4])
        torch.set_grad_enabled(False)
    assert seen() == before


def test_a_large_weight_that_is_written_to_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_COPIED", 40)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)).eval()
    with pytest.raises(InputError, match="writes to its weights") as error, untouched(model):
        model[0].weight.data[2, 3] += 1
        model[0].bias.data.zero_()
    assert "0.weight" in error.value.where and "more" not in error.value.where
    # New memory under an old parameter costs nothing to undo, whatever its size.
    before = snapshot(model)
    with untouched(model):
        model[0].weight.data = torch.zeros(4, 8)
    assert snapshot(model) == before


def test_masks_of_pruning_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_COPIED", 0)
    model = nn.Linear(8, 4).eval()
    prune.l1_unstructured(model, "weight", 0.5)
    with pytest.raises(InputError, match="writes to its weights"), untouched(model):
        model.weight_mask[0] = 0


@given(st.data())
def test_a_fingerprint_sees_every_change(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int8, torch.complex64]))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    tensor = torch.randint(1, 100, shape).to(dtype)
    if len(shape) > 1 and data.draw(st.booleans()):
        tensor = tensor.transpose(0, 1)
    first = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == first
    flat = tensor.clone().contiguous().view(-1)
    place = data.draw(st.integers(0, flat.numel() - 1))
    change = data.draw(st.sampled_from(["value", "signs", "places"]))
    changed = flat.clone()
    if change == "value":
        changed[place] += 1
    elif change == "signs":
        changed = -changed
    else:
        changed = changed.roll(1)
    assert torch.equal(changed, flat) == (fingerprint(changed) == fingerprint(flat))


def test_a_fingerprint_of_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(3 * state._CHUNK + 5)
    first = fingerprint(tensor)
    tensor[[0, state._CHUNK]] = tensor[[state._CHUNK, 0]]
    assert fingerprint(tensor) != first
