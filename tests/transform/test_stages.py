"""The loop over the stages: stopping after one, verifying each, and which errors a note may stand for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.errors import CheckError, InputError
from fxprune.graph.program import Program, copy_program
from fxprune.shrink import proved
from tests.oracle import assert_close, quick
from tests.structured_oracle import mlp, zeroed

transform_module = importlib.import_module("fxprune.transform")
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
PLAN = Plan([Rule("0.weight", Channels(0.5, align=1)), Rule("2.weight", Unstructured(0.5))])
EAGER = {"compile": False, "measure": False}


def small(model: nn.Module, plan: Plan | None = PLAN, **more: Any) -> Any:
    return fxprune.transform(model, plan, (X,), options=EAGER, progress=False, **more)


@pytest.mark.parametrize("stage", ["capture", "couple", "select", "shrink", "fold", "lower", "emit"])
def test_a_transform_stops_after_any_stage(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(16, 24, 8)
    monkeypatch.setenv("FXPRUNE_STOP", stage)
    result = small(model)
    assert isinstance(result, torch.fx.GraphModule) and list(result.report.seconds)[-1] == stage
    said = [note for note in result.report.notes if f"stopped after {stage}" in note]
    assert len(said) == (stage != "emit") and all(note.level == "warning" for note in said)
    if stage in ("capture", "couple", "select"):
        assert_close(result(X), model(X))
    if stage in ("fold", "lower", "emit"):
        assert_close(result(X), zeroed(model, result)(X))
    shapes = {tuple(p.shape) for p in result.parameters()}
    assert ((12, 16) in shapes) == (stage not in ("capture", "couple", "select"))


def test_a_result_that_trains_stops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_STOP", "shrink")
    assert "as shrink left it" in small(mlp(16, 24, 8), trainable=True).report.compiled


@pytest.mark.parametrize("name", ["polish", "calibrate"])
def test_a_stage_that_there_is_not_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_STOP", name)
    with pytest.raises(InputError, match=f"cannot stop after '{name}' at FXPRUNE_STOP.*capture, couple, select"):
        small(mlp(16, 24, 8))


def test_the_stages_are_those_of_the_design() -> None:
    spine = ["capture", "couple", "select", "shrink"]
    assert [stage.name for stage in transform_module.INFERENCE] == [*spine, "fold", "lower", "emit"]
    assert [stage.name for stage in transform_module.TRAINING] == [*spine, "emit"]


def test_a_stage_that_breaks_a_promise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = transform_module.fold

    def wrong(*args: Any) -> Program:
        program = fold(*args)
        bias = next(n for n in program.graph.nodes if n.op == "get_attr" and str(n.target).endswith("bias"))
        bias.target = "nothing.of.this.name"
        return program

    monkeypatch.setattr(transform_module, "fold", wrong)
    monkeypatch.setenv("FXPRUNE_CHECK", "1")
    with pytest.raises(CheckError, match="the stage fold left a program that breaks a promise"):
        small(mlp(16, 24, 8))
    monkeypatch.setenv("FXPRUNE_CHECK", "0")
    with pytest.raises(AttributeError):
        small(mlp(16, 24, 8))


@pytest.mark.parametrize("stage", ["shrink", "find_dead"])
def test_a_fault_of_a_stage_is_a_note_for_users_and_an_error_for_tests(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("a fault of our own")

    monkeypatch.setattr(proved, stage, fails)
    model, plan = mlp(16, 24, 8), PLAN
    if stage == "find_dead":
        plan = None
        fxprune.prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    monkeypatch.setenv("FXPRUNE_CHECK", "1")
    with pytest.raises(KeyError, match="a fault of our own"):
        small(model, plan)
    monkeypatch.delenv("FXPRUNE_CHECK")
    result = small(model, plan)
    said = [note for note in result.report.notes if "a fault of our own" in note]
    assert said and all(note.level == "missed" for note in said)
    assert_close(result(X), model(X) if stage == "find_dead" else zeroed(model, result)(X))


def test_level_2_holds_what_every_stage_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_CHECK", "2")
    held = [row.what for row in small(mlp(16, 24, 8)).report.checks]
    assert [f"after {stage} = pruned model" in held for stage in ("shrink", "fold", "lower")] == [True] * 3


def test_level_2_names_a_stage_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = transform_module.fold

    def wrong(*args: Any) -> Program:
        program = copy_program(fold(*args))
        weight = next(p for p in program.parameters() if p.dim() == 2)
        weight.data = weight.data * 1.01
        return program

    monkeypatch.setattr(transform_module, "fold", wrong)
    monkeypatch.setenv("FXPRUNE_CHECK", "2")
    with pytest.raises(CheckError, match=r"after fold = pruned model.*The stage fold is at fault"):
        small(mlp(16, 24, 8))


def test_notes_say_how_much_they_matter() -> None:
    def levels(notes: Iterable[Any]) -> dict[str, str]:
        return {str(note): note.level for note in notes}

    plan = Plan([Rule("*", Unstructured(0.5)), Rule("2.weight", Unstructured(0.75))])
    unchecked = quick(mlp(16, 24, 8), X, plan=plan, check=False)
    found = levels(unchecked.report.notes)
    assert found["nothing was checked: check=False"] == "warning"
    assert found["2.weight: rule 1 replaces rule 0"] == "info"
    aligned = fxprune.transform(
        mlp(16, 10, 8), Plan([Rule("0.weight", Channels(0.5), scope="global")]), (X,), options=EAGER, progress=False
    )
    assert "missed" in levels(aligned.report.notes).values()
