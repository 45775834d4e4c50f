"""Bad rules of structured pruning: a clear error in four parts, and the user's model bit for bit as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fxprune import Channels, Drop, FxPruneError, Plan, Rule, Unstructured
from fxprune.errors import PlanError
from tests.structured_oracle import kept, randomised, shrunk
from tests.transform.bad_structured_models import X, net
from tests.transform.test_bad_input import refused


def refused_plan(*rules: Rule | Drop, words: tuple[str, ...] = (), where: str | None = None) -> FxPruneError:
    """The error of transforming Net by these rules."""
    model = net()
    return refused(PlanError, model, lambda: shrunk(model, X, plan=Plan(rules)), *words, where=where)


# --- amounts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [math.nan, -0.1, -1, 1.5, True, False, math.inf, "0.5", None])
def test_amounts_that_are_none(amount: Any) -> None:
    model = net()
    error = refused(PlanError, model, lambda: Channels(amount))
    assert repr(amount) in error.what


@pytest.mark.parametrize("amount", [0, 0.0])
def test_nothing_asked_is_no_mistake(amount: Any) -> None:
    model = net()
    result = shrunk(model, X, plan=Plan([Rule("left.weight", Channels(amount))]))
    assert kept(result) == {} and torch.equal(result(X), model(X))


def test_all_asked_as_a_fraction() -> None:
    model = net()
    refused(PlanError, model, lambda: Channels(1.0), "min_keep=1", "Drop(")
    refused(PlanError, model, lambda: Channels(1.0, min_keep=4), "min_keep=4")


@pytest.mark.parametrize("amount", [24, 25, 10**9])
def test_all_asked_as_a_number(amount: int) -> None:
    error = refused_plan(Rule("left.weight", Channels(amount)), words=(f"asks for {amount} units", "it has 24"))
    assert 'group "left.weight[0]"' in error.where and "at most 23" in error.do


def test_the_largest_number_is_taken_down_to_min_keep() -> None:
    result = shrunk(net(), X, plan=Plan([Rule("left.weight", Channels(23, align=1))]))
    assert kept(result) == {"left.weight[0]": 1}


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_a_number_as_large_as_the_pool(scope: str) -> None:
    rule = Rule("left.weight", Channels(24), scope=scope)
    refused_plan(rule, words=("asked for 24 units", 'the group "left.weight[0]"', "it has 24"))
    rule = Rule("*.weight", Channels(40), scope="global")
    model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 6)).eval()
    words = ('the 2 groups of "0.weight[0]" and others', "together they have 40, and each keeps")
    refused(PlanError, model, lambda: shrunk(model, X, plan=Plan([rule])), *words)


def asked_of(how: Channels, scope: str) -> list[str]:
    """What the report of two groups of 24 and 16 says of the amount."""
    model = randomised(nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 6)))
    result = shrunk(model, X, plan=Plan([Rule("*", how, scope=scope)]))
    return [note for note in result.report.notes if "asked for" in note]


def test_a_pooled_amount_that_is_not_reached_is_noted() -> None:
    """The report says what was asked, what was reached, and which setting stood in the way."""
    assert asked_of(Channels(0.5, align=1), "global") == []
    (note,) = asked_of(Channels(0.9, align=1, min_keep=10), "global")
    assert note == (
        'rule 0 asked for 36 of the 40 units of the 2 groups of "0.weight[0]" and others, and 20 leave: '
        "each group keeps at least min_keep=10"
    )
    first, second = asked_of(Channels(0.5, align=16), "isomorphic")
    assert 'asked for 12 of the 24 units of the group "0.weight[0]", and 8 leave' in first
    assert first.endswith("widths are multiples of align=16") and "and 0 leave" in second


@pytest.mark.parametrize(
    "settings",
    [{"norm": 0}, {"norm": -1.0}, {"norm": math.nan}, {"norm": "fro"}, {"norm": True}, {"dim": 0.5}, {"dim": "0"},
     {"unit": "head"}, {"reduce": "median"}, {"align": 0}, {"align": 2.5}, {"min_keep": 0}, {"min_keep": True}],
    ids=str,
)  # fmt: skip
def test_settings_that_do_not_exist(settings: dict[str, Any]) -> None:
    model, (name, value) = net(), next(iter(settings.items()))
    error = refused(PlanError, model, lambda: Channels(0.5, **settings), repr(value))
    assert name in error.what or name in error.where


def test_masks_of_more_elements_than_there_are_beside_channels() -> None:
    refused_plan(Rule("left.weight", Channels(0.5)), Rule("hidden.weight", Unstructured(10**6)), words=("only 384",))


# --- what may not shrink -----------------------------------------------------------------------------------------


def test_a_frozen_axis_by_full_name() -> None:
    error = refused_plan(Rule("head.weight", Channels(0.5)), where="rule 0")
    assert "head.weight" in error.what and "graph output" in error.why and "analyze" in error.do


def test_a_frozen_dimension_by_full_name() -> None:
    error = refused_plan(Rule("left.weight", Channels(0.5, dim=1)))
    assert "left.weight" in error.what and 'graph input "x"' in error.why


def test_a_norms_width_by_full_name() -> None:
    error = refused_plan(Rule("hidden.weight", Channels(0.5)))
    assert "a statistic runs over" in error.why and 'unit="mixed"' in str(error)


def test_a_plain_axis_asked_for_as_mixed() -> None:
    error = refused_plan(Rule("left.weight", Channels(0.5, unit="mixed")))
    assert "no statistic runs over it" in error.why


def test_wildcards_that_meet_only_frozen_axes() -> None:
    error = refused_plan(Rule("head.*", Channels(0.5)), where="head.*")
    assert "rule 0 binds nothing" in error.what and "graph output" in error.why and "head.weight" in error.why
    error = refused_plan(Rule("[hp]*.weight", Channels(0.5)))
    assert "graph output" in error.why and "a statistic runs over" in error.why


def test_a_wildcard_that_meets_some_frozen_axes_says_so() -> None:
    result = shrunk(net(), X, plan=Plan([Rule("*", Channels(0.5, align=1))]))
    assert kept(result) == {"left.weight[0]": 12}
    assert any("head.weight" in note and "graph output" in note for note in result.report.notes)
    assert any("hidden.weight" in note and "a statistic runs over" in note for note in result.report.notes)


@pytest.mark.parametrize("dim", [2, 5, -3])
def test_a_dimension_out_of_range(dim: int) -> None:
    error = refused_plan(Rule("left.weight", Channels(0.5, dim=dim)), words=(f"no dimension {dim}",))
    assert "left.weight" in error.where and "-2 to 1" in error.do


def test_names_that_do_not_exist() -> None:
    refused_plan(Rule("lift.weight", Channels(0.5)), words=("left.weight",), where="lift.weight")
    refused_plan(Rule("*.kernel", Channels(0.5)), where="*.kernel")


def test_a_bias_by_full_name() -> None:
    refused_plan(Rule("left.bias", Channels(0.5)), words=("1-D",), where="left.bias")


def test_a_weight_that_the_graph_does_not_read() -> None:
    model = net()
    model.unused = nn.Linear(4, 4).eval()
    plan = Plan([Rule("unused.weight", Channels(0.5))])
    refused(PlanError, model, lambda: shrunk(model, X, plan=plan), "cannot be pruned", where="unused.weight")


# --- coupled weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [Channels(0.25), Channels(12), Channels(0.5, norm=1), Channels(0.5, align=1), Channels(0.5, min_keep=2)],
    ids=str,
)
def test_coupled_weights_asked_for_unequal_amounts(other: Channels) -> None:
    error = refused_plan(Rule("left.weight", Channels(0.5)), Rule("right.weight", other))
    assert 'group "left.weight[0]"' in error.where
    assert "left.weight" in error.why and "right.weight" in error.why and "unequal amounts" in error.what


def test_coupled_weights_in_unequal_scopes() -> None:
    refused_plan(Rule("left.weight", Channels(0.5)), Rule("right.weight", Channels(0.5), scope="global"))


def test_a_reader_and_a_writer_asked_for_unequal_amounts() -> None:
    error = refused_plan(Rule("left.weight", Channels(0.5)), Rule("hidden.weight", Channels(0.25, dim=1)))
    assert 'group "left.weight[0]"' in error.where


def test_coupled_weights_asked_for_equal_amounts() -> None:
    plan = Plan([Rule("left.weight", Channels(0.5)), Rule("right.weight", Channels(0.5))])
    assert kept(shrunk(net(), X, plan=plan)) == {"left.weight[0]": 16}


# --- blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("plain.0", ("adds to its input",)),
        ("hidden", ("shape changes", "adds to its input")),
        ("head", ("shape changes", "adds to its input")),
        ("plane", ("plain",)),
        ("blocks.*", ()),
    ],
)
def test_blocks_that_cannot_go(path: str, words: tuple[str, ...]) -> None:
    refused_plan(Drop(path), words=words, where=path)


def test_a_block_that_cannot_go_beside_a_rule_that_can() -> None:
    refused_plan(Rule("left.weight", Channels(0.5)), Drop("plain.0"), where="plain.0")
