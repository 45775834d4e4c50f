"""A model that rounds badly is judged by its own rounding, which excuses no error."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.check.calls import Call
from fxprune.check.capture_checked import capture_checked
from fxprune.check.compare import ROUNDINGS, TOLERANCE, CheckRow, compare
from fxprune.check.oracle import Oracle
from fxprune.check.rounding import within_rounding
from fxprune.errors import CaptureError
from fxprune.select.selection import Selection
from tests.oracle import Apply, quick

CALL = Call("example", (), {})
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


class Chaotic(nn.Module):
    """Each layer makes the rounding of the one before some times larger."""

    def __init__(self, layers: int = 7, width: int = 32) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(16, width), nn.Linear(width, 8)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x)
        for layer in self.layers:
            y = torch.sin(8 * layer(y))
        return self.end(y)


def chaotic(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return Chaotic(**more).eval()


def rows_of(report: Any, what: str) -> list[CheckRow]:
    return [row for row in report.checks if row.what == what]


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        (Plan([Rule("*", Unstructured(0.5))]), "result = pruned model"),
        (Plan([Rule("layers.*", Channels(0.25))]), "shrunk = zeroed"),
    ],
    ids=["packed", "shrunk"],
)
def test_a_model_that_rounds_badly(plan: Plan, what: str) -> None:
    model = chaotic(layers=8)
    report = quick(model, X, plan=plan).report
    rows = rows_of(report, what)
    assert rows and all(row.ok for row in report.checks)
    worst = max(rows, key=lambda row: row.error)
    assert worst.error > TOLERANCE[torch.float32] and "own rounding" in worst.verdict
    with torch.no_grad():
        wide = chaotic(layers=8).double()(X.double()).float()
        own = compare("", CALL, [wide], [model(X)]).error
    # The pruned model is not the dense one, but is as chaotic.
    assert worst.tolerance < 100 * ROUNDINGS * own
    assert not any("keeps all its indices" in note or "dropped" in note for note in report.notes)


class Reordered(Chaotic):
    """Captured with the sums of its first layer in another order, or `off` by a little."""

    off = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            weight = self.start.weight.flip(-1)
            y = F.linear(x.flip(-1), weight, self.start.bias + self.off)
        else:
            y = self.start(x)
        for layer in self.layers:
            y = torch.sin(8 * layer(y))
        return self.end(y)


def test_a_capture_in_another_order() -> None:
    torch.manual_seed(0)
    model = Reordered().eval()
    found = capture_checked(model, Call("example", (X,), {}), None, check=True, fold_masks=True)
    assert all(row.ok for row in found.checks) and any("own rounding" in row.verdict for row in found.checks)
    assert model.start.weight.dtype == torch.float32


def test_a_capture_that_is_off_by_less_than_the_rounding() -> None:
    torch.manual_seed(0)
    model = Reordered().eval()
    model.off = 1e-7
    with pytest.raises(CaptureError, match="in float64 they differ"):
        capture_checked(model, Call("example", (X,), {}), None, check=True, fold_masks=True)


def judged(error: float, rounding: float, apart: float = 0.0) -> CheckRow:
    """A row of outputs with these errors against each other, float64, and in float64."""
    exact = torch.tensor([1.0, 0.5], dtype=torch.float64)
    expected = (exact + torch.tensor([rounding, 0.0])).float()
    got = expected + torch.tensor([error, 0.0])
    row = compare("a = b", CALL, [expected], [got])
    assert not row.ok
    return within_rounding(row, CALL, [expected], [got], lambda: [exact], lambda: [exact * (1 + apart)], unasked)


def unasked(seed: int) -> list[Any]:
    raise AssertionError("float64 tells more")


@pytest.mark.parametrize(
    ("error", "rounding", "apart", "ok"),
    [
        (3e-3, 1e-3, 0.0, True),
        (5e-3, 1e-3, 0.0, False),
        (3e-3, 1e-3, 1e-8, False),
        (3e-3, 1e-3, 1e-11, True),
        (2e-4, 1e-6, 0.0, False),
        (0.1, 0.05, 0.0, False),
    ],
)
def test_four_roundings_and_no_more(error: float, rounding: float, apart: float, ok: bool) -> None:
    row = judged(error, rounding, apart)
    assert row.ok is ok
    assert not ok or row.tolerance == pytest.approx(4 * rounding, rel=0.01)


def test_what_does_not_run_in_float64_is_not_excused() -> None:
    def fails() -> list[Any]:
        raise RuntimeError("no float64 here")

    row = dataclasses.replace(judged(5e-3, 1e-3), note="")
    found = within_rounding(row, CALL, [], [], fails, lambda: [], unasked)
    assert not found.ok and "no float64 here" in found.note


@pytest.mark.parametrize(("error", "roundings", "ok"), [(3e-3, (1e-3, 1e-5), True), (5e-3, (1e-3,), False)])
def test_a_model_in_float64_is_held_to_a_rounding_of_its_weights(
    error: float, roundings: tuple[float, ...], ok: bool
) -> None:
    expected = torch.tensor([1.0, 0.5], dtype=torch.float64)
    got = expected + torch.tensor([error, 0.0])
    row = compare("a = b", CALL, [expected], [got])

    def nudged(seed: int) -> list[Any]:
        return [expected + torch.tensor([roundings[seed % len(roundings)], 0.0])]

    found = within_rounding(row, CALL, [expected], [got], lambda: unasked(0), lambda: unasked(0), nudged)
    assert found.ok is ok and found.tolerance == pytest.approx(4e-3, rel=0.01)


def test_a_model_in_float64_that_rounds_badly() -> None:
    """One whose rounding leaves some digits is shrunk, one with none is told."""
    plan, x = Plan([Rule("layers.*", Channels(0.25))]), X.double()
    report = quick(chaotic(layers=17, width=64).double(), x, plan=plan).report
    rows = rows_of(report, "shrunk = zeroed")
    assert rows and all(row.ok for row in rows)
    worst = max(rows, key=lambda row: row.error)
    assert worst.error > TOLERANCE[torch.float64] and "own rounding" in worst.verdict
    report = quick(chaotic(layers=44, width=64).double(), x, plan=plan).report
    assert any("no digit to compare; it changes by one rounding of its weights" in note for note in report.notes)


def test_float64_models_have_no_wider_type() -> None:
    model = chaotic(layers=12).double()
    x = X.double()
    program = capture_checked(model, Call("example", (x,), {}), None, check=True, fold_masks=True).captured.program
    found = Oracle(program, Selection()).in_float64().outputs(Call("example", (x,), {}))
    torch.testing.assert_close(found, [model(x)])


def test_an_oracle_in_float64_is_in_float64_throughout() -> None:
    def forward(linear: nn.Linear, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1]) + torch.zeros(x.shape[1])
        return linear(x.to(torch.float32) + steps).half().float() @ torch.full((16, 3), 0.5)

    model = Apply(forward).eval()
    call = Call("example", (X,), {})
    program = capture_checked(model, call, None, check=True, fold_masks=True).captured.program
    (found,) = Oracle(program, Selection()).in_float64().outputs(call)
    weight, bias = model.linear.weight.double(), model.linear.bias.double()
    expected = (F.linear(X.double() + torch.arange(16), weight, bias)) @ torch.full((16, 3), 0.5, dtype=torch.float64)
    assert found.dtype == torch.float64 and (found - expected).abs().max() < 1e-12 * expected.abs().max()
