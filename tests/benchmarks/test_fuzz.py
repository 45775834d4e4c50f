"""The fuzzer: its cases can be drawn again and run, its judgement sees what is planted, and a slice of it passes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from benchmarks import fuzz, fuzz_judge, fuzz_pool
from benchmarks.fuzz_case import Case, draw_case
from benchmarks.fuzz_judge import FAULTS, call, run_case
from benchmarks.fuzz_oracle import Told, distance, settle, zeroed
from benchmarks.fuzz_parts import Masked
from benchmarks.fuzz_pool import OWN, Worker, run_seeds
from benchmarks.fuzz_prune import KINDS, Edit, Pruning
from benchmarks.fuzz_sketch import SEQUENCE, VECTOR, Sketch, Step, Value
from benchmarks.fuzz_smaller import smaller
from fxprune.errors import CheckError, InputError
from fxprune.graph.note import Note

Row = dict[str, Any]

X = Value("x", VECTOR, (6,))
HIDDEN, OUT = Value("h2", VECTOR, (8,)), Value("h4", VECTOR, (5,))
STEPS = (
    Step("linear", ("self.m1 = nn.Linear(6, 8)",), ("h2 = self.m1(x)",), HIDDEN),
    Step("activation", (), ("h3 = torch.relu(h2)",), dataclasses.replace(HIDDEN, name="h3")),
    Step("linear", ("self.m2 = nn.Linear(8, 5)",), ("h4 = self.m2(h3)",), OUT),
)


def a_case(*rules: tuple[str, str], edits: tuple[Edit, ...] = (), way: str = "once", **more: Any) -> Case:
    """Two linears, pruned by the rules."""
    given: dict[str, Any] = {
        "seed": 0,
        "sketch": Sketch((X,), STEPS, ("h4",)),
        "pruning": Pruning("elements", edits, rules, (), way),
        "dtype": torch.float64,
        "batch": 3,
        "constants": {},
        "form": "args",
        "memory": "plain",
        "options": {"compile": False, "measure": False, "layout": "nonzeros"},
        "is_checked": True,
        "is_strict": True,
        "is_rounded": False,
    }
    return Case(**{**given, **more})


HALF = ("*", "Unstructured(0.5)")
NARROW = ("*", "Channels(0.5, align=1)")


def plant(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """What transform makes goes through `change(model, result)` before the fuzzer sees it."""
    transform = fuzz_judge.transform

    def planted(case: Case, model: nn.Module) -> Any:
        return change(model, transform(case, model))

    monkeypatch.setattr(fuzz_judge, "transform", planted)


class Wrapped:
    """A result that calls another function."""

    def __init__(self, result: Any, function: Any) -> None:
        self.result, self.function = result, function
        self.selection, self.report = result.selection, result.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.result, *args, **kwargs)


@pytest.mark.parametrize("seed", [0, 7, 4711])
def test_a_seed_draws_one_case(seed: int) -> None:
    first, second = draw_case(seed), draw_case(seed)
    assert first == second
    assert "class Model(nn.Module)" in first.describe()
    torch.manual_seed(123)
    a, b = first.model(), second.model()
    assert all(torch.equal(v, b.state_dict()[name]) for name, v in a.state_dict().items())


def test_seeds_reach_every_kind_of_step() -> None:
    cases = [draw_case(seed) for seed in range(250)]
    ops = {step.op for case in cases for step in case.sketch.steps}
    assert len(ops) > 50
    assert {"attention", "depthwise", "recurrent", "tied", "in place", "functional", "heads", "mask"} <= ops
    assert {case.pruning.kind for case in cases} == set(KINDS)
    assert {case.dtype for case in cases} == {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def test_models_run_and_stay_finite() -> None:
    runs = 0
    for seed in range(60):
        case = draw_case(seed)
        answer = call(case.model(), case, case.inputs(case.batch, 0), case.form)
        runs += all(bool(v.isfinite().all()) for v in fuzz_judge.floats(answer))
    assert runs >= 57


@pytest.mark.parametrize("rule", [HALF, NARROW])
def test_a_right_result_is_ok(rule: tuple[str, str]) -> None:
    row = run_case(a_case(rule))
    assert row["outcome"] == "ok", row
    assert row["pruned"] and row["far"]


@pytest.mark.parametrize("rule", [HALF, NARROW])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_scaled_output_is_wrong(rule: tuple[str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    by = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.3}[dtype]
    plant(monkeypatch, lambda model, result: Wrapped(result, lambda r, *args: r(*args) * (1 + by)))
    row = run_case(a_case(rule, dtype=dtype))
    assert row["outcome"] == "wrong" and "off by" in row["raw"], row


def test_a_mask_off_by_one_element_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(model: nn.Module, result: Any) -> Any:
        mask = result.selection.mask["m1.weight"]
        kept = mask.unpack().flatten().roll(1).reshape(mask.shape)
        result.meta["selection"].mask["m1.weight"] = type(mask).pack(kept)
        return result

    plant(monkeypatch, shifted)
    assert run_case(a_case(HALF))["outcome"] == "wrong"


def test_a_removed_channel_that_was_not_told_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(model: nn.Module, result: Any) -> Any:
        result.report.removed.clear()
        return result

    plant(monkeypatch, silent)
    assert run_case(a_case(NARROW))["outcome"] == "wrong"


def test_what_is_wrong_at_another_size_alone_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(result: Any, x: torch.Tensor) -> torch.Tensor:
        return result(x) * (3 / len(x))

    plant(monkeypatch, lambda model, result: Wrapped(result, constant))
    row = run_case(a_case(HALF))
    assert row["outcome"] == "wrong" and row["raw"].startswith("batch 1")


def test_a_group_that_was_turned_down_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a right result as well: a fault that fxprune's own checks hide is still one."""

    def note(model: nn.Module, result: Any) -> Any:
        result.report.notes.append(Note("m1.weight[0] keeps all its indices: it differs by 1.0", "missed"))
        return result

    plant(monkeypatch, note)
    assert run_case(a_case(HALF))["outcome"] == "caught"


def test_wrong_gradients_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(model: nn.Module, result: nn.Module) -> nn.Module:
        result.get_parameter("m1.weight").register_hook(lambda gradient: gradient * 2)
        return result

    case = a_case(HALF, way="train")
    assert run_case(case)["outcome"] == "ok"
    plant(monkeypatch, detached)
    row = run_case(case)
    assert row["outcome"] == "wrong" and row["raw"].startswith("m1.weight: gradients"), row


def test_a_changed_model_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model: nn.Module, result: Any) -> Any:
        with torch.no_grad():
            model.get_parameter("m1.bias")[0] += 1e-9
        return result

    plant(monkeypatch, write)
    row = run_case(a_case(HALF))
    assert (row["outcome"], row["why"]) == ("changed", "m1.bias")
    monkeypatch.undo()
    plant(monkeypatch, lambda model, result: model.train() and result)
    assert run_case(a_case(HALF))["outcome"] == "changed"


REFUSED = [(InputError("no"), "refused"), (CheckError("no"), "caught")]


@pytest.mark.parametrize(("error", "outcome"), [*REFUSED, (KeyError("no"), "crash"), (AssertionError(), "crash")])
def test_errors_of_transform_have_outcomes(error: Exception, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module, result: Any) -> Any:
        raise error

    plant(monkeypatch, fail)
    assert run_case(a_case(HALF))["outcome"] == outcome


@pytest.mark.parametrize(("error", "outcome"), [(InputError("no"), "needless"), (RuntimeError("no"), "crash")])
def test_errors_of_a_call_have_outcomes(error: Exception, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(result: Any, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 2:
            raise error
        return result(x)

    plant(monkeypatch, lambda model, result: Wrapped(result, fail))
    row = run_case(a_case(HALF))
    assert row["outcome"] == outcome and "batch 2" in row["raw"]


def test_distance_takes_the_models_own_rounding_for_its_measure() -> None:
    exact = torch.tensor([1.0, 1e-3], dtype=torch.float64)

    def judged(got: Any, plain: Any = None) -> Any:
        plain = exact.float() if plain is None else plain
        return distance(got, plain, exact, lambda: plain)

    assert not judged(exact.float() + 5e-5).is_wrong
    assert judged(exact.float() + 5e-4).is_wrong
    rough = exact.float() + 1e-3
    assert not judged(exact.float() + 5e-3, rough).is_wrong
    assert judged(exact.double(), exact.float()).why.startswith("torch.float64")
    assert judged((exact.float(),)).why.startswith("structure")
    assert judged(exact.float() * float("nan")).why == "not finite"
    assert judged(exact.float(), exact.float() * float("inf")) is None


def test_settling_leaves_tied_weights_alone() -> None:
    for edit in (
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: parametrize.register_parametrization(m, "weight", Masked(torch.eye(4))),
    ):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        weight = model[0].weight.detach().clone()
        edit(model[0])
        x = torch.randn(2, 4)
        expected = model(x)
        settle(model)
        assert torch.equal(model(x), expected)
        assert torch.equal(model[1].weight, weight) and not torch.equal(model[0].weight, weight)


def test_the_oracle_bypasses_dropped_blocks_and_zeroes_slices() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    weight = model[0].weight.detach().clone()
    oracle = zeroed(model, Told(removed={"0.weight": [(0, torch.tensor([1]))]}, dropped=("1",)))
    x = torch.randn(2, 4)
    assert torch.equal(oracle(x), nn.functional.linear(x, weight.index_fill(0, torch.tensor([1]), 0.0), model[0].bias))


def test_smaller_keeps_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in map(draw_case, range(300)) if c.pruning.way == "once" and len(c.sketch.steps) > 5)
    case = dataclasses.replace(case, pruning=Pruning("zeros"), dtype=torch.float64)
    case.options["compile"] = False
    plant(monkeypatch, lambda model, result: Wrapped(result, _scaled))
    row = run_case(case)
    assert row["outcome"] == "wrong"
    found, told = smaller(case, row)
    assert len(found.sketch.steps) <= 2 and told["outcome"] == "wrong"


def _scaled(result: Any, *args: Any, **kwargs: Any) -> Any:
    answer = result(*args, **kwargs)
    return torch.utils._pytree.tree_map(lambda v: v * 2 if isinstance(v, torch.Tensor) else v, answer)


def test_a_sketch_loses_what_no_output_needs() -> None:
    spare = Step("linear", ("self.m9 = nn.Linear(6, 6)",), ("h9 = self.m9(x)",), Value("h9", VECTOR, (6,)))
    again = Step("shared", (), ("h10 = self.m1(h9)",), Value("h10", VECTOR, (8,)))
    y = Value("y", SEQUENCE, (2, 4))
    sketch = Sketch((X, y), (*STEPS, spare, again), ("h4",))
    assert sketch.needed() == Sketch((X,), STEPS, ("h4",))
    shared = dataclasses.replace(sketch, outputs=("h10",)).needed()
    assert [step.makes.name for step in shared.steps] == ["h2", "h9", "h10"]


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("os.abort()", "died"),
        ("say(at='transform'); os.abort()", "died"),
        (f"say(at={OWN!r}); os.abort()", "not a case"),
        ("time.sleep(60)", "time limit"),
        ("say(row={'seed': 5, 'outcome': 'ok'})", "ok"),
    ],
)
def test_a_process_that_ends_or_hangs_is_a_row(script: str, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = "import json, os, sys, time\ndef say(**told): print(json.dumps(told), flush=True)\nsay(at='start')\n"
    monkeypatch.setattr(fuzz_pool, "COMMAND", [sys.executable, "-c", f"{start}sys.stdin.readline()\n{script}"])
    worker = Worker()
    row = worker.run(5, seconds=2.0)
    worker.stop()
    assert (row["seed"], row["outcome"]) == (5, outcome)


def given(work: Path, *more: str) -> argparse.Namespace:
    """Parsed arguments with folders of the test."""
    return fuzz.parse(["--work", str(work), "--results", str(work), "--no-progress", "--jobs", "1", *more])


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def run_seeds(seeds: Any, jobs: int, seconds: float) -> Any:
        for seed in seeds:
            ran.append(seed)
            yield {"seed": seed, "outcome": "ok"}

    monkeypatch.setattr(fuzz, "run_seeds", run_seeds)
    fuzz.run_all(range(3), given(tmp_path))
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"seed": 3, "outco')
    rows = fuzz.run_all(range(5), given(tmp_path))
    assert ran == [0, 1, 2, 3, 4] and [row["seed"] for row in rows] == [0, 1, 2, 3, 4]
    fuzz.run_all(range(2), given(tmp_path, "--again"))
    assert ran[5:] == [0, 1]
    monkeypatch.setattr(fuzz, "fingerprint", lambda: "other")
    fuzz.run_all(range(1), given(tmp_path))
    assert ran[7:] == [0]


def test_after_a_fault_was_mended_only_what_had_a_fault_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def run_seeds(seeds: Any, jobs: int, seconds: float) -> Any:
        for seed in seeds:
            ran.append(seed)
            yield {"seed": seed, "outcome": "died" if seed == 1 else "ok", "why": ""}

    monkeypatch.setattr(fuzz, "run_seeds", run_seeds)
    fuzz.run_all(range(3), given(tmp_path))
    fuzz.run_all(range(3), given(tmp_path, "--mended"))
    assert ran == [0, 1, 2]
    code = fuzz.fingerprint()
    monkeypatch.setattr(fuzz, "fingerprint", lambda: "other")
    rows = fuzz.run_all(range(4), given(tmp_path, "--mended"))
    assert ran[3:] == [1, 3]
    assert fuzz.summarise(rows)["codes"] == {code: 2, "other": 2}


def test_the_summary_counts_and_names_seeds() -> None:
    rows: list[Row] = [
        {"seed": 0, "outcome": "ok", "kind": "hooks", "ops": ["linear"], "pruned": True, "far": True},
        {"seed": 1, "outcome": "needless", "kind": "hooks", "why": "a size", "ops": ["linear"]},
        {"seed": 2, "outcome": "refused", "kind": "zeros", "why": "nothing"},
        {"seed": 3, "outcome": "wrong", "kind": "zeros", "why": "off"},
        {"seed": 4, "outcome": "died", "why": "at transform: ended with -11"},
    ]
    found = fuzz.summarise(rows)
    assert found["outcomes"]["ok"] == 1 and found["seeds"] == {"wrong": [3], "died": [4]}
    assert found["needless_rate"] == pytest.approx(1 / 3)
    assert found["by_kind"]["hooks"] == {"ok": 1, "needless": 1}
    assert found["refused"] == [{"why": "nothing", "times": 1, "seeds": [2]}]
    text = fuzz.format_summary(found)
    assert "wrong: off" in text and "33.3% refuse" in text


def test_one_run_in_processes_writes_its_result(tmp_path: Path) -> None:
    arguments = ["--cases", "2", "--work", str(tmp_path), "--results", str(tmp_path), "--no-progress", "--jobs", "1"]
    assert fuzz.main(arguments) == 0
    found = json.loads((tmp_path / "fuzz.json").read_text(encoding="utf-8"))
    assert found["cases"] == 2 and found["machine"]["torch"] == torch.__version__


def test_one_case_prints_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--seed", "2", "--verbose"]) == 0
    told = capsys.readouterr().out
    assert "class Model(nn.Module)" in told and '"outcome"' in told


def test_the_first_cases_have_no_fault() -> None:
    rows = [run_case(draw_case(seed)) for seed in range(6)]
    assert [row for row in rows if row["outcome"] in FAULTS] == []


@pytest.mark.slow
def test_a_slice_has_no_fault() -> None:
    rows = list(run_seeds(range(1000, 1150), jobs=1, seconds=fuzz.SECONDS))
    assert [row for row in rows if row["outcome"] in fuzz.COMPLAINTS] == []
    judged = [row for row in rows if row["outcome"] in ("ok", "needless")]
    assert len(judged) > 100 and sum(row["far"] for row in judged) > 90


def test_edits_are_done_where_their_module_is() -> None:
    edits = (Edit("m1", 'prune.l1_unstructured(model.m1, "weight", 0.5)'), Edit("gone", "model.gone.weight[0] = 0"))
    case = a_case(edits=edits)
    assert prune.is_pruned(case.model().get_submodule("m1"))
    assert run_case(case)["outcome"] == "ok"
