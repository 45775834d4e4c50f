"""The form that is emitted: the fastest that is right, against the best that the user has. Times here are made up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fxprune
from fxprune import FxPruneWarning, errors
from fxprune.check import proof
from fxprune.emit import trial
from fxprune.emit.pruned import PrunedModule
from fxprune.errors import CheckError
from fxprune.lower.layouts import choose
from fxprune.measure import ways
from fxprune.measure.model_timing import ModelTiming
from fxprune.measure.timing import Samples
from tests.oracle import assert_close

# Tokens enough that one layout alone takes them.
X = torch.randn(32, 64)


def masked(zeros: float = 0.9) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", zeros)
    return model


def form_of(call: Callable[[], Any]) -> str:
    """What a call that is timed runs: the user's model in some way, or a result in one of its forms."""
    if not isinstance(call, partial) or not isinstance(call.func, PrunedModule):
        return "user"
    result = call.func
    packed = any("nonzeros" in str(node.target) for node in result.graph.nodes)
    options = result.meta["compile"]
    how = "eager" if options is None else "frozen" if "freezing" in options else "not frozen"
    return f"{'packed' if packed else 'dense'}, {how}"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PrunedModule]:
    """transform with made-up seconds for each form, and every linear packed as far as the chooser goes."""

    def transform(seconds: dict[str, float], model: nn.Module | None = None, **options: Any) -> PrunedModule:
        def duel(a: Any, b: Any, *_: Any, **__: Any) -> tuple[Samples, Samples]:
            times = [seconds.get(form_of(call), seconds["user"]) for call in (a, b)]
            return Samples([times[0]], [times[0]]), Samples([times[1]], [times[1]])

        def against(user: Any, pruned: Any, *_: Any) -> ModelTiming:
            a, b = duel(user.call, pruned)
            return ModelTiming(user.name, a.typical, b.typical, (a.alone, b.alone), 1, "made up")

        monkeypatch.setattr(trial, "duel", duel)
        monkeypatch.setattr(trial, "time_against", against)
        monkeypatch.setattr(ways, "has_bfloat16_units", lambda _: False)
        monkeypatch.setattr(choose, "_times", lambda functions, *_: ([2.0] * (len(functions) - 1) + [1.0], True))
        chosen = {"measure": True, **options}
        return fxprune.transform(model or masked(), example_inputs=(X,), options=chosen, progress=False)

    return transform


FAST = {"packed, frozen": 1.0, "dense, frozen": 2.0, "user": 3.0}


def emitted(result: PrunedModule) -> str:
    return form_of(partial(result))


def test_packed_is_emitted_where_it_is_fastest(timed: Any) -> None:
    result = timed(FAST)
    assert emitted(result) == "packed, frozen" and result.report.timing.ratio == pytest.approx(3.0)
    assert {w.layout for w in result.report.weights} == {"nonzeros"}
    assert "3.00x" in str(result.report)


def test_a_slower_packed_model_is_not_kept(timed: Any) -> None:
    result = timed({**FAST, "packed, frozen": 2.5})
    assert emitted(result) == "dense, frozen" and result.report.timing.pruned == 2.0
    assert {(w.layout, w.lowered.bytes) for w in result.report.weights} == {("dense", 64 * 64 * 4)}
    note = next(note for note in result.report.notes if "slower packed (0.80x)" in note)
    assert note.level == "fallback" and "emitted dense" in note
    assert_close(result(X), masked_like(result)(X))


def masked_like(result: PrunedModule) -> nn.Module:
    """The dense result as ordinary layers."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    model.load_state_dict(result.state_dict())
    return model


@pytest.mark.parametrize(("best", "seconds"), [("dense, not frozen", 0.5), ("dense, eager", 0.4)])
def test_other_forms_are_tried_where_the_users_model_is_faster(timed: Any, best: str, seconds: float) -> None:
    slow = {"packed, frozen": 9.0, "dense, frozen": 2.0, "dense, not frozen": 1.5, "dense, eager": 1.6, "user": 1.0}
    result = timed({**slow, best: seconds})
    assert emitted(result) == best and result.report.timing.ratio == pytest.approx(1 / seconds)
    assert ("eager graph" in result.report.compiled) == (best == "dense, eager")


@pytest.mark.parametrize(("best", "seconds"), [("dense, not frozen", 0.5), ("dense, eager", 0.4)])
def test_what_is_packed_is_held_against_what_is_neither_packed_nor_frozen(
    timed: Any, best: str, seconds: float
) -> None:
    slow = {"packed, frozen": 1.9, "packed, not frozen": 1.8, "packed, eager": 1.7, "user": 1.0}
    slow |= {"dense, frozen": 2.0, "dense, not frozen": 1.5, "dense, eager": 1.6}
    assert emitted(timed({**slow, best: seconds})) == best


@pytest.mark.parametrize("compiles", ["not frozen", "nothing"])
def test_what_does_not_compile_frozen_is_compiled_without_freezing(
    compiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(result: PrunedModule, *args: Any) -> Any:
        options = result.meta["compile"]
        if options is not None and (compiles == "nothing" or "freezing" in options):
            raise RuntimeError("itensor expects float")
        return call(result, *args)

    call = PrunedModule.__call__
    monkeypatch.setattr(PrunedModule, "__call__", failing)
    monkeypatch.setattr(errors, "_warned", set())
    with pytest.warns(FxPruneWarning, match="does not compile frozen, so it is compiled without freezing"):
        result = fxprune.transform(masked(), example_inputs=(X,), progress=False)
    notes = [note for note in result.report.notes if note.level == "fallback" and "itensor" in note]
    assert len(notes) == (1 if compiles == "not frozen" else 2)
    assert emitted(result) == ("dense, not frozen" if compiles == "not frozen" else "dense, eager")
    assert result.report.compiled.endswith("Inductor" if compiles == "not frozen" else "(torch.compile failed)")
    assert_close(result(X), masked_like(result)(X))


def test_a_result_that_is_slower_than_the_users_best_says_so(timed: Any) -> None:
    slow = {"packed, frozen": 9.0, "dense, frozen": 2.0, "dense, not frozen": 2.5, "dense, eager": 2.6, "user": 1.0}
    result = timed(slow)
    assert emitted(result) == "dense, frozen" and result.report.timing.ratio == 0.5
    note = next(note for note in result.report.notes if "no faster than your model as it is (0.50x of" in note)
    assert note.level == "missed"


def test_no_other_form_is_compiled_where_the_result_wins(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = trial.emit
    monkeypatch.setattr(trial, "emit", lambda *args: (made.append(args[2]), original(*args))[1])
    timed(FAST)
    assert made == [{"freezing": True}] * 2


def test_a_model_without_zeros_is_timed_too(timed: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval()
    assert timed(FAST, model).report.timing.ratio == pytest.approx(1.5)


def test_with_compile_false_the_users_model_is_eager_too(timed: Any) -> None:
    result = timed({"packed, eager": 1.0, "dense, eager": 2.0, "user": 3.0}, compile=False)
    assert emitted(result) == "packed, eager" and result.report.timing.way == "eager"


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_a_form_whose_code_is_wrong_at_the_second_size_is_not_emitted(
    timed: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = proof.outputs

    def wrong(function: Any, call: Any) -> list[Any]:
        found = original(function, call)
        at_fault = isinstance(function, PrunedModule) and emitted(function).startswith(form)
        return [y * 1.01 for y in found] if at_fault and call.label.startswith("second size") else found

    monkeypatch.setattr(proof, "outputs", wrong)
    if form == "dense":
        with pytest.raises(CheckError, match="second size"):
            timed({**FAST, "packed, frozen": 9.0}, nn.Sequential(nn.Linear(64, 64)).eval())
        return
    result = timed(FAST)
    assert emitted(result) == "dense, frozen"
    assert any("wrong on the second size" in note and note.level == "warning" for note in result.report.notes)


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("compile", [True, False])
def test_a_model_that_its_precision_leaves_no_digit_runs_op_by_op(compile: bool, measure: bool) -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(1e4 * self.norm(self.conv(x)))

    model, x = Noise().eval().bfloat16(), torch.randn(2, 3, 8, 8).bfloat16()
    options = {"compile": compile, "measure": measure}
    result = fxprune.transform(model, example_inputs=(x,), options=options, progress=False)
    with torch.no_grad():
        assert torch.equal(result(x), model(x))
    notes = [note for note in result.report.notes if "and was dropped" in note]
    assert all(note.level == "warning" and "own answer has no digit to compare" in note for note in notes)
    assert len(set(notes)) == len(notes) and (len(notes) > 0) == compile


def test_a_result_that_trains_is_held_at_the_second_size_too(monkeypatch: pytest.MonkeyPatch) -> None:
    original = proof.outputs

    def wrong(function: Any, call: Any) -> list[Any]:
        found = original(function, call)
        return [y * 1.01 for y in found] if call.label.startswith("second size") else found

    monkeypatch.setattr(proof, "outputs", wrong)
    with pytest.raises(CheckError) as error:
        fxprune.transform(masked(), example_inputs=(X,), trainable=True, progress=False)
    assert error.value.where.startswith("second size")


def test_really_timed_the_report_names_the_users_best_way_and_all_that_were_tried() -> None:
    model = masked()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fxprune.transform(model, example_inputs=(X,), options={"measure": True}, progress=False)
    timing = result.report.timing
    assert timing is not None and timing.way in timing.ways
    assert set(timing.ways) == {"eager", "torch.compile", "torch.compile, frozen"} and not timing.failed
    assert timing.ratio > 0 and timing.cold_ratio > 0 and f"at your best ({timing.way})" in str(result.report)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_close(result(X), model(X))


def test_a_way_in_which_the_users_model_does_not_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(ways, "compiled", failing)
    result = fxprune.transform(masked(), example_inputs=(X,), options={"measure": True}, progress=False)
    assert result.report.timing.way == "eager" and len(result.report.timing.failed) == 2
    assert "your model did not run in torch.compile: RuntimeError: no compiler" in result.report.notes


def test_a_model_that_does_not_run_in_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("float32 alone")

    monkeypatch.setattr(ways, "has_bfloat16_units", lambda _: True)
    monkeypatch.setattr(trial, "in_bfloat16", failing)
    result = fxprune.transform(masked(), example_inputs=(X,), options={"measure": True}, progress=False)
    assert result.report.timing.half is None
    assert "your model did not run in bfloat16: RuntimeError: float32 alone" in result.report.notes


def test_a_float32_result_says_what_the_dense_model_takes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        monkeypatch.setattr(ways, "has_bfloat16_units", lambda _, has=has: has)
        result = fxprune.transform(masked(), example_inputs=(X,), options={"measure": True}, progress=False)
        half = result.report.timing.half
        assert (half is not None) == has == ("in bfloat16 the dense model takes" in str(result.report))
        assert half is None or 0 < half.error < 0.1
