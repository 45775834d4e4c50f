"""Results of structured pruning: with masks, replayed, copied, compiled, and with groups that come out wrong."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils import prune as torch_prune

from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.backend import fxprune as backend
from fxprune.couple.rules import RULES
from tests.oracle import assert_close, snapshot
from tests.shrink.test_structured import OTHER, Heads, Residual, X, branches
from tests.structured_oracle import (
    EAGER,
    assert_shrunk,
    channels,
    kept,
    mlp,
    randomised,
    relative,
    removed,
    right,
    shrunk,
    sizes,
    zeroed,
)


@pytest.fixture(autouse=True)
def compiled_code_does_not_pile_up() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# --- with masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "nonzeros"])
def test_channels_beside_masks(layout: str) -> None:
    """Masks on a weight of its own, and on one that a group cuts through: zeros count towards the whole weight."""
    model = mlp(10, 32, 24, 16, 6)
    rules = [Rule("0.weight", Channels(0.5, align=1)), Rule("[246].weight", Unstructured(0.6))]
    result = right(model, X, plan=Plan(rules), other=OTHER, options={**EAGER, "layout": layout})
    assert kept(result) == {"0.weight[0]": 16}
    assert tuple(result.selection.mask["2.weight"].shape) == (24, 32)
    for name in ("4.weight", "6.weight"):
        assert result.report[name].reached == pytest.approx(0.6, abs=0.01)
        assert result.report[name].layout == layout
    stays = [i for i in range(32) if i not in removed(result, "2.weight", 1)]
    zeros = ~result.selection.mask["2.weight"].unpack()
    assert int(zeros.sum()) == round(0.6 * zeros.numel())
    assert result.report["2.weight"].reached == pytest.approx(float(zeros[:, stays].float().mean()))
    if layout == "dense":
        assert sizes(result)["2.weight"] == (24, 16) and int((result.get_parameter("4.weight") == 0).sum()) == 230


def test_channels_of_a_model_that_was_pruned_before() -> None:
    model = mlp(10, 32, 24, 6)
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    torch_prune.ln_structured(model[2], "weight", 0.25, n=2, dim=0)
    before = snapshot(model)
    result = shrunk(model, X, plan=channels(0.5))
    assert snapshot(model) == before
    for module in (model[0], model[2]):
        torch_prune.remove(module, "weight")
    assert_shrunk(result, model, X, OTHER)
    assert sizes(result)["2.weight"] == (12, 16)


# --- the result --------------------------------------------------------------------------------------------------


def test_a_selection_replays() -> None:
    model = branches(32, 24)
    first = shrunk(
        model, X, plan=Plan([*channels(0.5, "up.*", scope="global").rules, Rule("down.*", Unstructured(0.5))])
    )
    for selection in (first.selection, pickle.loads(pickle.dumps(first.selection))):
        again = shrunk(model, X, plan=None, selection=selection)
        assert kept(again) == kept(first) and again.report.parameters == first.report.parameters
        assert torch.equal(again(OTHER), first(OTHER))
        assert_shrunk(again, model, X, OTHER)


def test_copies_and_pickles_of_the_result() -> None:
    model = randomised(Residual(32, nn.LayerNorm))
    result = right(model, X, other=OTHER)
    for again in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert torch.equal(again(OTHER), result(OTHER))
        assert kept(again) == kept(result) and sizes(again) == sizes(result)
        assert str(again.report) == str(result.report)
        assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in result.parameters()}
    theirs = {t.data_ptr() for t in model.parameters()}
    assert not theirs & {t.data_ptr() for t in result.parameters()}


def test_compiled() -> None:
    result = right(mlp(10, 32, 24, 6), X, other=OTHER, options={"measure": False})
    assert result.report.compiled.startswith("torch.compile") and sizes(result)["2.weight"] == (12, 16)


def test_the_backend_still_packs_masks(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(10, 64, 64, 6)
    right(model, X, other=OTHER)
    torch_prune.l1_unstructured(model[2], "weight", 0.9)
    compiled = torch.compile(model, backend=backend, options={"compile": False, "layout": "nonzeros"})
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="fxprune"):
        assert_close(compiled(X), model(X))
    assert "2.weight -> nonzeros" in caplog.text


def test_without_checks() -> None:
    model = mlp(10, 32, 6)
    result = shrunk(model, X, check=False)
    assert_shrunk(result, model, X, OTHER)
    assert result.report.checks == []


def test_a_dynamic_sequence_survives() -> None:
    model = randomised(Heads())
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    result = shrunk(model, torch.randn(2, 7, 10), dynamic_shapes=shapes)
    assert_shrunk(result, model, *(torch.randn(b, t, 10) for b, t in ((2, 7), (1, 3), (5, 64))))


def test_exported_programs_and_graph_modules() -> None:
    model = mlp(10, 32, 6)
    exported: Any = torch.export.export(model, (X,), dynamic_shapes=({0: Dim.DYNAMIC},))
    for graph in (exported, exported.module(), torch.fx.symbolic_trace(model)):
        assert_shrunk(shrunk(graph, X), model, X, OTHER)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.bfloat16, 5e-2)])
def test_other_types(dtype: torch.dtype, rtol: float) -> None:
    model, x = mlp(10, 32, 24, 6).to(dtype), X.to(dtype)
    result = shrunk(model, x)
    expected = zeroed(model, result)(x)
    assert result(x).dtype == dtype and relative(result(x), expected) < rtol < relative(model(x), expected) / 5
    assert sizes(result)["2.weight"] == (12, 16)


def test_the_report_tells_groups_and_counts() -> None:
    model = mlp(10, 32, 24, 6)
    report = right(model, X, plan=channels(0.5, "0.weight"), other=OTHER).report
    text = str(report)
    before, after = report.parameters
    assert before == 352 + 792 + 150 and after == 176 + 408 + 150
    assert f"{before:,} before, {after:,} after" in text and "0.weight[0]" in text
    assert [g.name for g in report.groups] == ["0.weight[0]", "0.weight[1]", "2.weight[0]", "4.weight[0]"]
    reasons = [g.reason for g in report.groups]
    assert reasons[0] == reasons[2] == "" and "graph input" in reasons[1] and "graph output" in reasons[3]
    assert any(row.what == "shrunk = zeroed" and row.ok for row in report.checks)


# --- groups that come out wrong ----------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Two groups: the mean over the first divides by its old width, the second is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 24), nn.Linear(10, 32), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(x).relu()) + self.a(x).mean(-1, keepdim=True) * 30


def raises(*_: Any, **__: Any) -> dict[str, Any]:
    raise RuntimeError("this rule has a mistake")


@pytest.mark.parametrize(
    ("resize", "words"),
    [(lambda *_, **__: {}, "it differs from the zeroed model by"), (raises, "RuntimeError: this rule has a mistake")],
)
def test_a_group_that_comes_out_wrong_stays_whole(resize: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(Pooled())
    assert kept(right(model, X, other=OTHER)) == {"a.weight[0]": 12, "b.weight[0]": 16}
    monkeypatch.delenv("FXPRUNE_CHECK", raising=False)  # what a mistake becomes for users is tested here
    monkeypatch.setitem(RULES, "mean", dataclasses.replace(RULES["mean"], resize=resize))
    before = snapshot(model)
    result = shrunk(model, X)
    assert snapshot(model) == before
    assert kept(result) == {"b.weight[0]": 16} and list(result.selection.keep) == ["b.weight[0]"]
    assert sizes(result)["a.weight"] == (24, 10) and sizes(result)["b.weight"] == (16, 10)
    (note,) = [n for n in result.report.notes if "keeps all its indices" in n]
    assert note.startswith("a.weight[0]") and words in note
    # Attempts on the way are not told as checks of the result.
    assert sum(row.what == "shrunk = zeroed" for row in result.report.checks) == 1
    for call in (X, OTHER):
        assert_close(result(call), zeroed(model, result)(call).detach())
    # What is left of the selection replays without it.
    assert kept(shrunk(model, X, plan=None, selection=result.selection)) == {"b.weight[0]": 16}


class Casting(nn.Module):
    """A half-precision layer between float32 ones, and a literal of the half type."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 24), nn.Linear(24, 32).bfloat16(), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu().to(torch.bfloat16)).relu()
        return self.c((y * torch.full((), 0.5, dtype=torch.bfloat16)).float())


@pytest.mark.parametrize("kind", [lambda: mlp(10, 24, 32, 6).bfloat16(), lambda: mlp(10, 24, 32, 6).half(), Casting])
def test_half_precision_is_held_in_float32(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of 0.5% is below the rounding of a half type over a few layers, and far above that of float32."""

    def slightly(sizes: Any, out: Any, input: Any, **_: Any) -> dict[str, Any]:
        return {"output_scale": 1.005} if sizes.changed(out[-1]) else {}

    torch.manual_seed(0)
    model = randomised(kind())
    x = X.to(next(model.parameters()).dtype)
    result = shrunk(model, x)
    assert sorted(kept(result).values()) == [12, 16]
    (row,) = [row for row in result.report.checks if row.what == "shrunk = zeroed"]
    assert row.ok and row.error < 1e-5 and row.tolerance == 1e-4
    monkeypatch.setitem(RULES, "linear", dataclasses.replace(RULES["linear"], resize=slightly))
    assert kept(shrunk(model, x)) == {}


def test_groups_that_are_wrong_together_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(sizes: Any, out: Any, input: Any, **_: Any) -> dict[str, Any]:
        return {"output_scale": 2.0} if sizes.changed(out[-1]) and sizes.changed(input[-1]) else {}

    model = mlp(10, 32, 24, 6)
    monkeypatch.setitem(RULES, "linear", dataclasses.replace(RULES["linear"], resize=both))
    result = shrunk(model, X)
    assert kept(result) == {"0.weight[0]": 16}
    (note,) = [n for n in result.report.notes if "keeps all its indices" in n]
    assert note.startswith("2.weight[0]") and "not with others" in note
    assert_close(result(OTHER), zeroed(model, result)(OTHER).detach())


def test_a_model_of_which_every_group_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(10, 32, 24, 6)
    monkeypatch.delenv("FXPRUNE_CHECK", raising=False)
    monkeypatch.setitem(RULES, "linear", dataclasses.replace(RULES["linear"], resize=raises))
    result = shrunk(model, X)
    assert kept(result) == {} and result.report.parameters[0] == result.report.parameters[1]
    assert sum("keeps all its indices" in note for note in result.report.notes) == 2
    assert_close(result(OTHER), model(OTHER).detach())
