"""Plans: what they accept, which names they bind, how they are shown and saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fxprune.errors import PlanError
from fxprune.plan import Candidate, Existing, Plan, Rule, Unstructured, near

W = Candidate((4, 6), torch.float32, True)
NORM = Candidate((6,), torch.float32, False, "1-D")
IDS = Candidate((3, 3), torch.int64, False, "int64 is not floating point")
MODEL = {
    "encoder.0.attn.q.weight": W,
    "encoder.0.norm.weight": NORM,
    "encoder.1.attn.q.weight": W,
    "encoder.1.norm.weight": NORM,
    "head.weight": W,
    "table": IDS,
}
HALF = Unstructured(0.5)


def refused(make: Callable[[], object], *words: str) -> None:
    """`make` raises a PlanError that has all four parts and these words."""
    with pytest.raises(PlanError) as error:
        make()
    assert error.value.what and error.value.where and error.value.why and error.value.do
    for word in words:
        assert word in str(error.value), str(error.value)


def test_star_crosses_dots_and_passes_over_what_it_cannot_use() -> None:
    binding = Plan([Rule("encoder.*.weight", HALF)]).bind(MODEL)
    assert binding.assigned == {"encoder.0.attn.q.weight": 0, "encoder.1.attn.q.weight": 0}
    assert binding.skipped == ((0, "encoder.0.norm.weight", "1-D"), (0, "encoder.1.norm.weight", "1-D"))
    assert binding.overridden == () and binding.excluded == ()


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("*", 3), ("encoder.?.attn.q.weight", 2), ("encoder.[1-9]*", 1), ("*[!0].attn*", 1), ("head.weight", 1)],
)
def test_globs(pattern: str, count: int) -> None:
    assert len(Plan([Rule(pattern, HALF)]).bind(MODEL).assigned) == count


def test_later_rules_win_and_it_is_recorded() -> None:
    plan = Plan([Rule("*", HALF), Rule("encoder.*", Existing()), Rule("encoder.0.attn.q.weight", HALF)])
    binding = plan.bind(MODEL)
    assert binding.assigned == {"encoder.0.attn.q.weight": 2, "encoder.1.attn.q.weight": 1, "head.weight": 0}
    assert binding.overridden == (
        ("encoder.0.attn.q.weight", 0, 1),
        ("encoder.1.attn.q.weight", 0, 1),
        ("encoder.0.attn.q.weight", 1, 2),
    )
    assert binding.names(1) == ["encoder.1.attn.q.weight"]


def test_exclude_binds_wildcards_only() -> None:
    plan = Plan([Rule("*", HALF)], exclude=["head*"])
    binding = plan.bind(MODEL)
    assert "head.weight" not in binding.assigned
    assert binding.excluded == ((0, "head.weight", "head*"),)
    assert Plan([Rule("head.weight", HALF)], exclude=["head*"]).bind(MODEL).assigned == {"head.weight": 0}


def test_tied_parameters_answer_to_all_their_names() -> None:
    aliases = {"head.weight": "head.weight", "wte.weight": "head.weight"}
    assert Plan([Rule("wte.*", HALF)]).bind(MODEL, aliases).assigned == {"head.weight": 0}
    assert Plan([Rule("wte.weight", HALF)]).bind(MODEL, aliases).assigned == {"head.weight": 0}
    assert "head.weight" not in Plan([Rule("*", HALF)], ["wte.*"]).bind(MODEL, aliases).assigned


def test_empty_plan_binds_nothing() -> None:
    assert Plan([]).bind(MODEL).assigned == {}


def test_binding_errors() -> None:
    def bind(pattern: str, sparsity: Any = HALF, scope: str = "local", exclude: tuple[str, ...] = ()) -> None:
        refused(lambda: Plan([Rule(pattern, sparsity, scope)], exclude).bind(MODEL), *words)

    words = ["rule 0", '"haed.weight"', "head.weight"]
    bind("haed.weight")
    words = ["rule 0", '"Encoder.*.wieght"', "encoder.0.attn.q.weight"]
    bind("Encoder.*.wieght")
    words = ["encoder.0.norm.weight", "[6]", "1-D"]
    bind("encoder.0.norm.weight")
    words = ["table", "int64 is not floating point"]
    bind("table")
    words = ["*norm*", "encoder.0.norm.weight (1-D)", "encoder.1.norm.weight (1-D)"]
    bind("*norm*")
    words = ["head*", 'head.weight (excluded by "*d.w*")']
    bind("head*", exclude=("*d.w*",))
    words = ["exclude", '"haed*"', "head.weight"]
    bind("*", exclude=("haed*",))
    words = ['"head.weight" [4, 6]', "25", "24"]
    bind("head.weight", Unstructured(25))
    words = ["3 weights", "73", "72"]
    bind("*", Unstructured(73), "global")


def test_a_count_is_held_against_the_rule_that_won() -> None:
    big = {**MODEL, "big": Candidate((10, 10), torch.float32, True)}
    plan = Plan([Rule("*", Unstructured(100)), Rule("*.weight", HALF)])
    assert plan.bind(big).assigned["big"] == 0


@pytest.mark.parametrize("amount", [float("nan"), -0.1, 1.0001, float("inf"), -1, True, "0.5", None, 1j])
def test_bad_amounts(amount: Any) -> None:
    refused(lambda: Unstructured(amount), "amount", repr(amount))


@pytest.mark.parametrize("amount", [0, 0.0, 1.0, 7, np.int64(7), np.float32(0.25)])
def test_good_amounts(amount: Any) -> None:
    kept = Unstructured(amount).amount
    assert kept == amount and type(kept) in (int, float)


def test_other_malformed_plans() -> None:
    anything: Any = None
    refused(lambda: Unstructured(0.5, "l7"), "l7", "l1")
    refused(lambda: Unstructured(0.5, anything), "NoneType")
    refused(lambda: Rule("", HALF), "pattern")
    refused(lambda: Rule(anything, HALF), "pattern")
    refused(lambda: Rule("*", anything), "Unstructured", "Existing")
    refused(lambda: Rule("*", HALF, "everywhere"), "everywhere", "global")
    refused(lambda: Plan(anything), "None")
    wrong: Any = Rule("*", HALF)
    refused(lambda: Plan(wrong), "[Rule(...)]")
    wrong = [HALF]
    refused(lambda: Plan(wrong), "Unstructured")
    refused(lambda: Plan([Rule("*", HALF)], "head"), "head")
    wrong = [3]
    refused(lambda: Plan([Rule("*", HALF)], wrong), "3")


def test_plans_are_values() -> None:
    rule = Rule("*", HALF, "global")
    assert Plan([rule]) == Plan((rule,)) and hash(Plan([rule])) == hash(Plan((rule,)))
    with pytest.raises(AttributeError):
        rule.scope = "local"  # pyright: ignore[reportAttributeAccessIssue]


def test_print() -> None:
    text = str(Plan([Rule("a.*", Unstructured(0.9), "global"), Rule("b", Existing())], ["c.*"]))
    for word in ("a.*", "90%", "l1", "global", "existing", "c.*", "excluded"):
        assert word in text
    assert "3 elements" in str(Plan([Rule("a", Unstructured(3))]))
    assert "no rules" in str(Plan())


def test_json_round_trip() -> None:
    rules = [Rule("a.*", Unstructured(1.0), "global"), Rule("b", Unstructured(1)), Rule("c", Existing())]
    plan = Plan(rules, ["d*", "e"])
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert [type(r.sparsity.amount) for r in back.rules if isinstance(r.sparsity, Unstructured)] == [
        float,
        int,
    ]


def test_json_errors() -> None:
    refused(lambda: Plan([Rule("a", Unstructured(0.5, torch.abs))]).to_json(), "function", '"a"')
    good = json.loads(Plan([Rule("a", HALF)], ["b"]).to_json())

    def changed(**change: Any) -> Callable[[], Plan]:
        return lambda: Plan.from_json(json.dumps({**good, **change}))

    refused(lambda: Plan.from_json("{"), "JSON")
    refused(lambda: Plan.from_json("[]"), "fxprune_plan")
    refused(changed(fxprune_plan=2), "fxprune_plan")
    refused(changed(rules=None))
    refused(changed(rules=[3]))
    refused(changed(exclude=3))
    rule = good["rules"][0]
    refused(changed(rules=[{**rule, "sparsity": {"kind": "unstructred", "amount": 0.5}}]), "unstructured")
    refused(changed(rules=[{**rule, "sparsity": {"kind": "unstructured", "amout": 0.5}}]), "amout")
    refused(changed(rules=[{**rule, "sparsity": {"kind": "unstructured", "amount": 2.5}}]), "2.5")
    refused(changed(rules=[{"pattern": "a"}]), "sparsity")


def test_near_matches_ignore_case_and_wildcards() -> None:
    names = [f"encoder.layer.{i}.output.dense.weight" for i in range(4)] + ["pooler.dense.weight"]
    assert near("Encoder.*.wieght", names)[0] in names[:4]
    assert near("pooler.dnse.weight", names)[0] == "pooler.dense.weight"
    assert near("zzz", names) == []
    assert len(near("*", [str(i) for i in range(100)])) <= 5
