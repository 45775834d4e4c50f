"""Plans: what they accept, which names they bind, how they are shown and saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxprune.errors import PlanError
from fxprune.plan.patterns import Existing
from fxprune.plan.plan import (
    Blocks,
    Candidate,
    Channels,
    Drop,
    Plan,
    Rule,
    SemiStructured,
    Sparsity,
    Unstructured,
    near,
)

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
MODULES = ["", "encoder", "head"]
MODULES += [f"encoder.{i}{part}" for i in range(2) for part in ("", ".attn", ".attn.q", ".norm")]
HALF = Unstructured(0.5)
ROWS = Unstructured(0.5, per_row=True)


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


def test_other_malformed_plans() -> None:
    anything: Any = None
    refused(lambda: Rule("", HALF), "pattern")
    refused(lambda: Rule(anything, HALF), "pattern")
    refused(lambda: Rule("*", anything), "Unstructured", "Existing", "Channels")
    refused(lambda: Rule("*", HALF, "everywhere"), "everywhere", "global", "isomorphic")
    refused(lambda: Rule("*", HALF, "isomorphic"), "isomorphic", "Unstructured")
    refused(lambda: Rule("*", Existing(), "isomorphic"), "isomorphic", "Existing")
    assert Rule("*", Channels(0.5), "isomorphic").scope == "isomorphic"
    refused(lambda: Drop(""), "Drop", "module's path")
    refused(lambda: Drop(anything), "Drop", "None")
    refused(lambda: Plan(anything), "None")
    wrong: Any = Rule("*", HALF)
    refused(lambda: Plan(wrong), "[Rule(...), Drop(...)]")
    wrong = Drop("head")
    refused(lambda: Plan(wrong), "[Rule(...), Drop(...)]")
    wrong = [HALF]
    refused(lambda: Plan(wrong), "Unstructured")
    refused(lambda: Plan([Rule("*", HALF)], "head"), "head")
    wrong = [3]
    refused(lambda: Plan([Rule("*", HALF)], wrong), "3")
    wrong = [Drop("head")]
    refused(lambda: Plan([Rule("*", HALF)], wrong), "Drop")


def test_channels_bind_weights_as_other_patterns_do() -> None:
    rules = [Rule("*", Channels(0.5)), Rule("encoder.*", HALF), Rule("encoder.1.*", Channels(0.25), "isomorphic")]
    binding = Plan(rules, ["head*"]).bind(MODEL)
    assert binding.assigned == {"encoder.0.attn.q.weight": 1, "encoder.1.attn.q.weight": 2}
    assert ("encoder.0.attn.q.weight", 0, 1) in binding.overridden
    assert (0, "encoder.0.norm.weight", "1-D") in binding.skipped
    assert binding.excluded == ((0, "head.weight", "head*"),)
    refused(lambda: Plan([Rule("encoder.0.norm.weight", Channels(0.5))]).bind(MODEL), "rule 0", "1-D")


@pytest.mark.parametrize("scope", ["local", "global"])
def test_numbers_of_channels_are_not_held_against_elements(scope: str) -> None:
    assert len(Plan([Rule("*", Channels(10**6), scope)]).bind(MODEL).assigned) == 3


def test_drops_stand_beside_rules_and_leave_their_numbers() -> None:
    first, second = Rule("*", HALF), Rule("head.weight", Existing())
    plan = Plan([Drop("encoder.1"), first, Drop("head"), second])
    assert plan.rules == (first, second)
    assert plan.drops == (Drop("encoder.1"), Drop("head"))
    assert plan.bind(MODEL).assigned["head.weight"] == 1
    assert Plan([Drop("encoder.1")]).bind(MODEL).assigned == {}


@pytest.mark.parametrize(
    ("patterns", "bound"),
    [
        ([], []),
        (["encoder.1"], ["encoder.1"]),
        (["encoder.*"], ["encoder.0", "encoder.1"]),
        (["encoder.[1-9]"], ["encoder.1"]),
        (["*.attn"], ["encoder.0.attn", "encoder.1.attn"]),
        (["*.q"], ["encoder.0.attn.q", "encoder.1.attn.q"]),
        (["*"], ["encoder", "head"]),
        (["encoder.1", "*.attn"], ["encoder.0.attn", "encoder.1"]),
        (["*.attn", "encoder.1"], ["encoder.0.attn", "encoder.1"]),
    ],
)
def test_drops_bind_the_outermost_modules_that_match(patterns: list[str], bound: list[str]) -> None:
    blocks = Plan([Drop(pattern) for pattern in patterns]).blocks(iter(MODULES))
    assert sorted(blocks) == bound
    assert list(blocks) == [path for path in MODULES if path in bound]
    assert all(blocks[path].pattern in patterns for path in bound)


def test_a_name_that_only_begins_alike_is_not_inside() -> None:
    assert list(Plan([Drop("block?*")]).blocks(["block1", "block1.norm", "block10"])) == ["block1", "block10"]


def test_the_later_of_two_drops_has_the_block() -> None:
    blocks = Plan([Drop("encoder.?"), Drop("encoder.1")]).blocks(MODULES)
    assert blocks == {"encoder.0": Drop("encoder.?"), "encoder.1": Drop("encoder.1")}


def test_drops_that_match_no_module() -> None:
    refused(lambda: Plan([Drop("encoder.2")]).blocks(MODULES), '"encoder.2"', "10 modules", "path", "encoder.0")
    refused(lambda: Plan([Drop("enocder.1.attn")]).blocks(MODULES), "Near it: encoder.1.attn")
    refused(lambda: Plan([Drop("decoder.[35]")]).blocks(MODULES), '"decoder.[35]"', "pattern")
    refused(lambda: Plan([Drop("zzz")]).blocks(MODULES), "named_modules")
    refused(lambda: Plan([Drop("encoder.1"), Drop("Head")]).blocks(MODULES), '"Head"')


def test_plans_are_values() -> None:
    rule = Rule("*", HALF, "global")
    assert Plan([rule]) == Plan((rule,)) and hash(Plan([rule])) == hash(Plan((rule,)))
    assert Plan([rule, Drop("a")]) == Plan((Drop("a"), rule)) != Plan([rule])
    assert hash(Plan([rule, Drop("a")])) == hash(Plan((Drop("a"), rule)))
    with pytest.raises(AttributeError):
        rule.scope = "local"  # pyright: ignore[reportAttributeAccessIssue]


def test_print() -> None:
    text = str(Plan([Rule("a.*", Unstructured(0.9), "global"), Rule("b", Existing())], ["c.*"]))
    for word in ("a.*", "90%", "l1", "global", "existing", "c.*", "excluded"):
        assert word in text
    assert "3 elements" in str(Plan([Rule("a", Unstructured(3))]))
    assert "no rules" in str(Plan())
    text = str(Plan([Rule("a.*", Channels(0.3), "isomorphic"), Drop("layer.3")]))
    for word in ("a.*", "channels", "30% of channels by L2 norm", "isomorphic", "layer.3", "drop", "residual"):
        assert word in text
    assert "layer.3" in str(Plan([Drop("layer.3")]))


def test_json_round_trip() -> None:
    rules = [Rule("a.*", Unstructured(1.0), "global"), Rule("b", Unstructured(1)), Rule("c", Existing())]
    plan = Plan(rules, ["d*", "e"])
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert [type(r.sparsity.amount) for r in back.rules if isinstance(r.sparsity, Unstructured)] == [
        float,
        int,
    ]


@pytest.mark.parametrize(
    "channels",
    [Channels(0.3), Channels(3), Channels(0.0, math.inf, -1, "mixed", "max", 1, 4), Channels(0.5, norm=1.5)],
)
def test_json_carries_channels_and_drops(channels: Channels) -> None:
    plan = Plan([Rule("a.*", channels, "isomorphic"), Drop("layer.[35]"), Drop("b")], ["c"])
    text = plan.to_json()
    back = Plan.from_json(text)
    assert back == plan
    kept = back.rules[0].sparsity
    assert isinstance(kept, Channels) and type(kept.amount) is type(channels.amount)
    assert "Infinity" not in text and "NaN" not in text


def test_json_without_drops_reads_as_before() -> None:
    old = """{"fxprune_plan": 1, "rules": [{"pattern": "a", "sparsity": {"kind": "unstructured", "amount": 0.5,
        "score": "l1"}, "scope": "local"}], "exclude": ["b"]}"""
    plan = Plan([Rule("a", HALF)], ["b"])
    assert Plan.from_json(old) == plan
    assert json.loads(plan.to_json()) == json.loads(old)


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
    refused(changed(rules=[{**rule, "sparsity": {"kind": "channels", "amount": 1.0}}]), "1.0", "min_keep")
    refused(changed(rules=[{**rule, "sparsity": {"kind": "channels", "amount": 0.5, "norm": "two"}}]), "two")
    refused(changed(rules=[{**rule, "scope": "isomorphic"}]), "isomorphic")
    refused(changed(drops="layer.3"), "drops")
    refused(changed(drops=None), "drops")
    refused(changed(drops=[3]), "drops", "3")
    refused(changed(drops=[""]), "Drop")


def test_near_matches_ignore_case_and_wildcards() -> None:
    names = [f"encoder.layer.{i}.output.dense.weight" for i in range(4)] + ["pooler.dense.weight"]
    assert near("Encoder.*.wieght", names)[0] in names[:4]
    assert near("pooler.dnse.weight", names)[0] == "pooler.dense.weight"
    assert near("zzz", names) == []
    assert len(near("*", [str(i) for i in range(100)])) <= 5


@pytest.mark.parametrize(
    "sparsity", [ROWS, SemiStructured(3, 16, "random"), Blocks(0.9), Blocks(3, (1, 8), math.inf, "random")]
)
def test_groups_and_tiles_are_shown_and_saved(sparsity: Sparsity) -> None:
    plan = Plan([Rule("a.*", sparsity)], ["b"])
    assert sparsity.describe() in str(plan)
    text = plan.to_json()
    back = Plan.from_json(text)
    assert back == plan and type(back.rules[0].sparsity) is type(sparsity)
    assert "Infinity" not in text


def test_json_errors_of_groups_and_tiles() -> None:
    refused(lambda: Plan([Rule("a", Blocks(0.5, score=torch.abs))]).to_json(), "function", "l1, l2")
    text = Plan([Rule("a", SemiStructured())]).to_json()
    for old, new, word in [
        ('"m": 4', '"m": 99', "99"),
        ('"m": 4', '"k": 4', "k"),
        ("semis", "simis", "semistructured"),
    ]:
        refused(lambda old=old, new=new: Plan.from_json(text.replace(old, new)), word)
    assert "per_row" not in Plan([Rule("a", Unstructured(0.5))]).to_json()
    assert "uniform" not in Plan([Rule("a", Channels(0.5))]).to_json()
    uniform = Plan([Rule("a", Channels(0.5, uniform=True))])
    assert Plan.from_json(uniform.to_json()) == uniform
    assert json.loads(Plan([Rule("a", ROWS)]).to_json())["rules"][0]["sparsity"]["per_row"] is True


@pytest.mark.parametrize("sparsity", [ROWS, SemiStructured()])
def test_what_cannot_be_pooled(sparsity: Sparsity) -> None:
    refused(lambda: Rule("a", sparsity, "global"), '"global"', "nothing to pool", '"a"')
    refused(lambda: Rule("a", sparsity, "isomorphic"), "isomorphic", type(sparsity).__name__)


SHAPES = {
    "fits.weight": Candidate((64, 32), torch.float32, True),
    "odd.weight": Candidate((64, 30), torch.float32, True),
    "conv.weight": Candidate((64, 32, 3, 3), torch.float32, True),
    "depthwise.weight": Candidate((64, 1, 3, 3), torch.float32, True),
    "turned.weight": Candidate((32, 30), torch.float32, True, inputs=0),
    "table.weight": Candidate((64, 32), torch.float32, True, role="lookup"),
    "norm.weight": Candidate((64,), torch.float32, False, "1-D"),
}


def test_wildcards_pass_over_what_does_not_fit() -> None:
    binding = Plan([Rule("*", SemiStructured())]).bind(SHAPES)
    assert set(binding.assigned) == {"fits.weight", "conv.weight", "turned.weight"}
    why = {name: reason for _, name, reason in binding.skipped}
    assert why["odd.weight"] == "its 30 inputs are no multiple of 4"
    assert why["depthwise.weight"] == "its 1 inputs are no multiple of 4"
    assert "looked up" in why["table.weight"] and "SemiStructured" in why["table.weight"]
    assert why["norm.weight"] == "1-D"

    binding = Plan([Rule("*", Blocks(0.5))]).bind(SHAPES)
    assert set(binding.assigned) == {"fits.weight", "conv.weight"}
    why = {name: reason for _, name, reason in binding.skipped}
    assert why["turned.weight"] == "its 30 outputs are no multiple of 32"
    assert why["odd.weight"] == "its 30 inputs are no multiple of 32"

    assert set(Plan([Rule("*", ROWS)]).bind(SHAPES).assigned) == set(SHAPES) - {"norm.weight"}


def test_full_names_and_empty_wildcards_are_errors() -> None:
    def bind(pattern: str, sparsity: Sparsity, scope: str = "local") -> Callable[[], object]:
        return lambda: Plan([Rule(pattern, sparsity, scope)]).bind(SHAPES)

    refused(bind("odd.weight", SemiStructured()), '"odd.weight" [64, 30]', "2:4", "its 30 inputs", "multiple of 4")
    refused(bind("turned.weight", Blocks(0.5)), "[32, 30]", "32x32 tiles", "its 30 outputs")
    refused(bind("table.weight", Blocks(0.5)), "looked up")
    refused(bind("norm.weight", SemiStructured()), "1-D")
    refused(bind("o*", SemiStructured()), "rule 0 binds nothing", "odd.weight (its 30 inputs are no multiple of 4)")
    refused(bind("fits.weight", Blocks(3)), "asks for 3 tiles", "only 2", "[64, 32]")
    refused(bind("[fc]*", Blocks(21), "global"), "asks for 21 tiles", "the 2 weights", "only 20")
    refused(bind("fits.weight", Unstructured(2049, per_row=True)), "2049 elements", "only 2048")
    assert Plan([Rule("[fc]*", Blocks(20), "global")]).bind(SHAPES).names(0) == ["fits.weight", "conv.weight"]


def test_without_a_graph_shapes_prove_nothing() -> None:
    """A [30, 32] that turns out to be stored as [inputs, outputs] may or may not fit; only its dtype is known."""
    known = {"w": Candidate((30, 32), torch.float32, True, role="unknown")}
    for sparsity in (SemiStructured(), Blocks(9)):
        assert Plan([Rule("w", sparsity)]).bind(known).assigned == {"w": 0}
    refused(lambda: Plan([Rule("w", Unstructured(961))]).bind(known), "961")
