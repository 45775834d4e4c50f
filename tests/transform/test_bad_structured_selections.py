"""Bad selections of structured pruning: of other models, of no indices, and of what may not shrink or leave."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Channels, FxPruneError, Plan, Rule, Unstructured
from fxprune.errors import InputError
from fxprune.select.mask import PackedMask
from fxprune.select.selection import Selection
from tests.structured_oracle import randomised, shrunk
from tests.transform.bad_structured_models import X, net
from tests.transform.test_bad_input import refused

# --- selections --------------------------------------------------------------------------------------------------


def test_a_selection_of_another_model() -> None:
    model = net()
    other = randomised(nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 6)))
    theirs = shrunk(other, X).selection
    error = refused(FxPruneError, model, lambda: shrunk(model, X, plan=None, selection=theirs), "0.weight[0]")
    assert "another graph" in error.why


def indices(*values: Any) -> Tensor:
    return torch.tensor(values)


INDICES = {
    "beyond the size": indices(0, 5, 24),
    "negative": indices(-1, 3),
    "not ascending": indices(5, 3),
    "twice": indices(3, 3),
    "none": indices().long(),
    "fractions": indices(0.5, 2.0),
    "too many": torch.arange(25),
    "two dimensions": indices(0, 1)[None],
}


@pytest.mark.parametrize("keep", INDICES.values(), ids=INDICES)
def test_a_selection_whose_indices_are_none(keep: Tensor) -> None:
    model = net()
    selection = Selection(keep={"left.weight[0]": keep})
    refused(FxPruneError, model, lambda: shrunk(model, X, plan=None, selection=selection), "left.weight[0]")


def test_a_selection_of_the_same_names_and_other_sizes() -> None:
    model = randomised(nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 6)))
    wider = randomised(nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 6)))
    theirs = shrunk(wider, X, plan=Plan([Rule("0.weight", Channels(0.5))])).selection
    refused(FxPruneError, model, lambda: shrunk(model, X, plan=None, selection=theirs), "0.weight[0]")


def test_a_selection_of_a_frozen_group() -> None:
    """A graph output may not shrink, whoever asks."""
    model = net()
    selection = Selection(keep={"head.weight[0]": torch.arange(3)})
    error = refused(FxPruneError, model, lambda: shrunk(model, X, plan=None, selection=selection), "head.weight[0]")
    assert "graph output" in error.why


def test_a_selection_that_drops_what_is_no_block() -> None:
    model = net()
    refused(FxPruneError, model, lambda: shrunk(model, X, plan=None, selection=Selection(drop=("plain.0",))), "plain.0")


def replay(model: nn.Module, selection: Any, *words: str, where: str) -> None:
    error = refused(InputError, model, lambda: shrunk(model, X, plan=None, selection=selection), *words, where=where)
    assert "selection" in error.what


@pytest.mark.parametrize(
    ("tables", "words", "where"),
    [
        ({"keep": {"left.weight[0]": [0, 1]}}, ("a list",), "left.weight[0]"),
        ({"mask": {"left.weight": torch.ones(24, 10).bool()}}, ("a Tensor", "PackedMask"), "left.weight"),
        ({"mask": {"lift.weight": PackedMask.pack(torch.ones(24, 10).bool())}}, ("no parameter",), "lift.weight"),
        ({"values": {"left.weight": torch.ones(24, 9)}}, ("[24, 9]",), "left.weight"),
        ({"values": {"left.weight": [1.0]}}, ("a list", "Tensor"), "left.weight"),
        ({"values": {"lift.weight": torch.ones(24, 10)}}, ("no parameter",), "lift.weight"),
    ],
    ids=str,
)  # fmt: skip
def test_a_selection_that_holds_something_else(tables: dict[str, Any], words: tuple[str, ...], where: str) -> None:
    replay(net(), Selection(**tables), *words, where=where)


@pytest.mark.parametrize("examples", [(X,), None], ids=["with example inputs", "pending"])
@pytest.mark.parametrize("selection", ["x", {}, 3], ids=repr)
def test_what_is_no_selection(selection: Any, examples: Any) -> None:
    model = net()
    act = lambda: fxprune.transform(model, None, examples, selection=selection, progress=False)  # noqa: E731
    refused(InputError, model, act, type(selection).__name__, "as a selection")


def test_a_replayed_selection_stays_the_callers() -> None:
    model = net()
    plan = Plan([Rule("left.weight", Channels(0.5)), Rule("hidden.weight", Unstructured(0.5))])
    mine = shrunk(model, X, plan=plan).selection
    before = {field.name: getattr(mine, field.name) for field in dataclasses.fields(mine)}
    copies = {name: dict(table) for name, table in before.items() if isinstance(table, dict)}
    theirs = shrunk(model, X, plan=None, selection=mine).selection
    assert theirs is not mine and theirs.keep.keys() == mine.keep.keys() and theirs.mask.keys() == mine.mask.keys()
    for name in copies:
        assert getattr(theirs, name) is not getattr(mine, name)
        getattr(theirs, name).clear()
    for name, table in before.items():
        assert getattr(mine, name) is table and copies.get(name, table) == table
