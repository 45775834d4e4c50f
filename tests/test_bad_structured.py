"""Bad input to structured pruning: a clear error in four parts, and the user's model bit for bit as it was."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Channels, Drop, FxPruneError, Plan, Rule, Unstructured
from fxprune.errors import CaptureError, InputError, PlanError
from fxprune.mask import PackedMask
from fxprune.select import Selection
from tests.structured_oracle import kept, randomised, shrunk
from tests.test_bad_input import refused


class Net(nn.Module):
    """Two coupled branches, a norm over their sum, a plain block, a residual block, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(10, 24), nn.Linear(10, 24)
        self.hidden = nn.Linear(24, 16)
        self.plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.hidden((self.left(x) + self.right(x)).relu())
        return self.head(self.norm(y + self.plain(y)))


def net() -> Any:
    return randomised(Net())


X = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))


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
        ("plain", ("adds to its input",)),
        ("hidden", ("shape changes", "adds to its input")),
        ("head", ("shape changes", "adds to its input")),
        ("plane", ("plain",)),
        ("blocks.*", ()),
    ],
)
def test_blocks_that_cannot_go(path: str, words: tuple[str, ...]) -> None:
    refused_plan(Drop(path), words=words, where=path)


def test_a_block_that_cannot_go_beside_a_rule_that_can() -> None:
    refused_plan(Rule("left.weight", Channels(0.5)), Drop("plain"), where="plain")


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
    refused(FxPruneError, model, lambda: shrunk(model, X, plan=None, selection=Selection(drop=("plain",))), "plain")


def replay(model: nn.Module, selection: Any, *words: str, where: str) -> None:
    error = refused(InputError, model, lambda: shrunk(model, X, plan=None, selection=selection), *words, where=where)
    assert "selection" in error.what


@pytest.mark.parametrize(
    ("tables", "words", "where"),
    [
        ({"keep": {"left.weight[0]": [0, 1]}}, ("a list",), "left.weight[0]"),
        ({"mask": {"left.weight": torch.ones(24, 10).bool()}}, ("a Tensor", "PackedMask"), "left.weight"),
        ({"mask": {"lift.weight": PackedMask.ones((24, 10))}}, ("no parameter",), "lift.weight"),
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


@pytest.mark.parametrize("options", [[1], "compile", 3], ids=repr)
def test_options_that_are_no_dict(options: Any) -> None:
    model = net()
    refused(InputError, model, lambda: shrunk(model, X, options=options), type(options).__name__)


# --- models and calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [lambda m: m.train(), lambda m: m.left.weight.data.fill_(math.nan)])
def test_models_that_cannot_be_transformed(spoil: Callable[[Any], Any]) -> None:
    model = net()
    spoil(model)
    refused(InputError, model, lambda: shrunk(model, X, plan=Plan([Rule("*", Channels(0.5))])))


def test_meta_is_for_analysis_only() -> None:
    with torch.device("meta"):
        model = Net().eval()
    with pytest.raises(InputError, match="meta device"):
        shrunk(model, X, plan=Plan([Rule("*", Channels(0.5))]))
    assert fxprune.analyze(model, (X,))["left.weight[0]"].free


def test_analyze_refuses_what_it_cannot_trace() -> None:
    model = net()
    refused(InputError, model, lambda: fxprune.analyze(model, X), "one tensor")  # pyright: ignore
    refused(PlanError, model, lambda: fxprune.analyze(model, (X,)).why("lift.weight", 0), where="lift.weight")
    coupling = fxprune.analyze(model, (X,))
    for dim in (2, "0", None, True, 0.0):
        refused(PlanError, model, lambda dim=dim: coupling.why("left.weight", dim), repr(dim), where="left.weight")
    for name in (3, None, ["left.weight"]):
        refused(PlanError, model, lambda name=name: coupling.why(name, 0), "no such parameter")


@pytest.mark.parametrize("model", [3, "x", None], ids=repr)
def test_analyze_refuses_what_is_no_model(model: Any) -> None:
    refused(InputError, net(), lambda: fxprune.analyze(model, (X,)), type(model).__name__)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), ("missing 1 required",)), (((torch.randn(4, 9),),), ("[4, 9]",)), (((X, X),), ("positional",))],
    ids=["none", "another shape", "too many"],
)
def test_analyze_says_that_the_model_refuses_the_call(device: str, arguments: Any, words: tuple[str, ...]) -> None:
    with torch.device(device):
        model = Net().eval()
    if device == "meta":
        with pytest.raises(InputError, match="cannot run the model on the example inputs"):
            fxprune.analyze(model, *arguments)
    else:
        refused(InputError, model, lambda: fxprune.analyze(model, *arguments), "cannot run the model", *words)


def test_analyze_of_a_model_that_runs_but_cannot_be_captured() -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    model = Branching().eval()
    refused(CaptureError, model, lambda: fxprune.analyze(model, (X,)), "Change that line")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_analyze_refuses_training_mode(device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(InputError, match=r"training mode.*model\.eval\(\)"):
        fxprune.analyze(model, (X,))
    assert fxprune.analyze(model.eval(), (X,))["0.weight[0]"].free


def test_calls_of_the_result_that_do_not_fit() -> None:
    model = net()
    result = shrunk(model, X)
    for x in (torch.randn(4, 9), X[0], X.double()):
        refused(InputError, model, lambda x=x: result(x))


def test_masks_of_more_elements_than_there_are_beside_channels() -> None:
    refused_plan(Rule("left.weight", Channels(0.5)), Rule("hidden.weight", Unstructured(10**6)), words=("only 384",))
