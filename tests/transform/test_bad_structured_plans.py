"""Texts that are no plan of structured pruning, and plans with one field replaced."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fxprune import Channels, Drop, Plan, Rule
from fxprune.errors import PlanError
from tests.transform.bad_structured_models import net
from tests.transform.test_bad_input import refused

# --- plans as text, and changed --------------------------------------------------------------------------------------


def text_of(sparsity: Any) -> str:
    return json.dumps(
        {"fxprune_plan": 1, "rules": [{"pattern": "a", "sparsity": sparsity, "scope": "local"}], "exclude": []}
    )


@pytest.mark.parametrize(
    "text",
    [
        text_of("abc"),
        text_of([1]),
        text_of(None),
        b"\xff\xfe\xfa",
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 5000,
        3,
        None,
    ],
    ids=["a text", "a list", "nothing", "bytes", "deep lists", "deep objects", "a long number", "3", "None"],
)
def test_texts_that_are_no_plan(text: Any) -> None:
    model = net()
    refused(PlanError, model, lambda: Plan.from_json(text), "cannot read a plan", where="Plan.from_json")


def test_a_plan_whose_text_asks_for_too_much_keeps_its_own_error() -> None:
    with pytest.raises(PlanError, match=r"cannot use amount 1.5"):
        Plan.from_json(text_of({"kind": "channels", "amount": 1.5}))


def test_a_plan_with_one_field_replaced() -> None:
    plan = Plan([Rule("*", Channels(0.5)), Drop("layer.1")], exclude=["head.*"])
    assert dataclasses.replace(plan) == plan
    other = dataclasses.replace(plan, exclude=["left.*"])
    assert (other.rules, other.drops, other.exclude) == (plan.rules, plan.drops, ("left.*",))
    assert dataclasses.replace(plan, drops=()) == Plan(plan.rules, plan.exclude)
    assert Plan([Drop("a")], drops=[Drop("b")]).drops == (Drop("a"), Drop("b"))
    model = net()
    for drops in ("layer.1", [Rule("*", Channels(0.5))], 3):
        refused(PlanError, model, lambda drops=drops: dataclasses.replace(plan, drops=drops), where="Plan(drops=...)")
