"""prove: the capture held against the user's model, and everything made from it held against the oracle."""

from __future__ import annotations

import math
import os
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fxprune.couple.removal import Removal
from fxprune.graph.program import Program

from . import admit
from .capture import Capture, capture
from .check import (
    HALF,
    Call,
    CheckRow,
    Oracle,
    compare,
    is_finite,
    outputs,
    refuse,
    resized_call,
    restrided_call,
    second_call,
    turned_call,
)
from .errors import CaptureError, InputError
from .report import Report
from .select import Selection


class Proof:
    """The calls that a result is tried on, and what the oracle answers to them."""

    def __init__(
        self, captured: Capture, calls: list[Call], resized: Call | None, report: Report, enabled: bool
    ) -> None:
        self.example = calls[0]
        self._captured, self._calls, self._resized = captured, calls, resized
        self._report, self._enabled = report, enabled
        self._expected: list[list[Any]] = []
        self._expected_resized: list[Any] = []
        self._wide = False
        self._expected_wide: list[list[Any]] = []

    @property
    def enabled(self) -> bool:
        """Whether anything is checked."""
        return self._enabled

    @property
    def wide(self) -> bool:
        """Whether half types run in float32 where a shrunk program is held against the oracle."""
        return self._wide

    def expect(self, selection: Selection, program: Program | None = None, removal: Removal | None = None) -> None:
        """Runs the oracle, masking in-graph over the user's storage, and keeps its outputs.

        `program` is what the oracle runs where blocks were dropped: the captured one without them.
        """
        if not self._enabled:
            return
        program = program or self._captured.program
        oracle = Oracle(program, selection, removal)
        self._expected = [oracle.outputs(call) for call in self._calls]
        if self._resized is not None:
            self._expected_resized = oracle.outputs(self._resized)
        if removal is not None:
            self._wide = any(getattr(n.meta.get("val"), "dtype", None) in HALF for n in program.graph.nodes)
            wide = Oracle(program, selection, removal, wide=True)
            if self._wide:
                self._expected_wide = [wide.outputs(call) for call in self._all_calls()]
            else:
                self._expected_wide = [*self._expected, *([self._expected_resized] if self._resized else [])]

    def _all_calls(self) -> list[Call]:
        return [*self._calls, *([self._resized] if self._resized is not None else [])]

    def try_shrunk(self, program: Program, selection: Selection, what: str = "shrunk = zeroed") -> CheckRow:
        """A shrunk program with its masks, held against the oracle: the worst of all calls; half types in float32."""
        oracle = Oracle(program, selection, wide=self._wide)
        rows = [
            compare(what, call, expected, oracle.outputs(call))
            for call, expected in zip(self._all_calls(), self._expected_wide, strict=True)
        ]
        # Each row has the tolerance of its own outputs: what is worst is the furthest beyond it.
        return max(rows, key=lambda row: (not row.ok, row.error / row.tolerance if row.tolerance else math.inf))

    def stage(self, name: str, program: Program) -> None:
        """With FXPRUNE_CHECK=2, holds the program after a stage against the oracle and names the one that departs."""
        if self._enabled and os.environ.get("FXPRUNE_CHECK") == "2":
            row = compare(
                f"after {name} = pruned model",
                self.example,
                self._expected[0],
                outputs(program, self.example),
            )
            self._report.checks.append(row)
            if not row.ok:
                raise refuse(row, f"The stage {name} is at fault: please report it with FXPRUNE_TRACE=<dir>.")

    def hold(self, result: Any, graph: Program) -> list[CheckRow]:
        """The result (compiled) on the example and the second input, its graph (not compiled) at the second size."""
        if not self._enabled:
            return []
        rows = [
            compare("result = pruned model", call, expected, outputs(result, call))
            for call, expected in zip(self._calls, self._expected, strict=True)
        ]
        if self._resized is not None:
            got = outputs(graph, self._resized)
            rows.append(compare("result's graph = pruned model", self._resized, self._expected_resized, got))
        return rows


def capture_checked(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    report: Report,
    *,
    check: bool,
    fold_masks: bool = True,
) -> tuple[Capture, Proof]:
    """Captures the model and holds the captured program against it, on the example and at a second size.

    Where a capture with dynamic sizes is wrong at the second size, every size is fixed, and the report says so; where
    the user asked for those sizes, that is an error.
    """
    example = Call("example", args, kwargs)
    runnable = model.module() if isinstance(model, ExportedProgram) else model
    with admit.untouched(runnable):
        return _capture_checked(model, runnable, example, dynamic_shapes, report, check=check, fold_masks=fold_masks)


def _capture_checked(
    model: nn.Module | ExportedProgram,
    runnable: nn.Module,
    example: Call,
    dynamic_shapes: Any,
    report: Report,
    *,
    check: bool,
    fold_masks: bool,
) -> tuple[Capture, Proof]:
    args, kwargs = example.args, example.kwargs
    admit.run_model(runnable, *example.copy())
    captured = capture(model, args, kwargs, dynamic_shapes, fold_masks=fold_masks)
    calls = [example, second_call(example)]
    if not check:
        report.notes += [*captured.notes, "nothing was checked: check=False"]
        return captured, Proof(captured, calls[:1], None, report, False)
    expected = outputs(runnable, example)
    first = compare("capture = your model", example, expected, outputs(captured.program, example))
    if not first.ok and dynamic_shapes is None and not isinstance(model, ExportedProgram):
        # A model that takes sizes for something else than numbers can only be captured with every size fixed.
        captured = capture(model, args, kwargs, static=True, fold_masks=fold_masks)
        captured.notes.append(f"every size is fixed: with dim 0 dynamic the capture was wrong ({first.error:.1e})")
        first = compare("capture = your model", example, expected, outputs(captured.program, example))
    report.checks.append(first)
    if not first.ok:
        raise refuse(
            first,
            "Does it draw random numbers, or keep state between calls? Such a model cannot be transformed.",
        )
    if not _runs(runnable, calls[1]):
        report.notes.append("the model refuses a second input drawn at random, so only the example was checked")
        calls.pop()
    turned = turned_call(example)
    if turned is not None:
        if _runs(runnable, turned) and is_finite(outputs(runnable, turned)):
            calls.append(turned)
        else:
            report.notes.append(
                "flags that the example has constant were not tried at other values: the model fails there"
            )
    resized = resized_call(captured, example)
    if resized is not None:
        row = _check_resized(runnable, captured, resized)
        if row is None:
            report.notes.append(f"the model itself refuses the {resized.label}, so no second size was checked")
            resized = None
        elif row.ok:
            report.checks.append(row)
        elif dynamic_shapes is not None or isinstance(model, ExportedProgram):
            raise refuse(row, "Leave dynamic_shapes out: the sizes are then fixed where the model needs it.")
        else:
            captured = capture(model, args, kwargs, static=True, fold_masks=fold_masks)
            captured.notes.append(
                f"every size is fixed: at the {resized.label} the capture was wrong ({row.error:.1e})"
            )
            resized = None
    _hold_to_strides(runnable, captured, example)
    report.notes += captured.notes
    return captured, Proof(captured, calls, resized, report, True)


def _runs(function: Any, call: Call) -> bool:
    try:
        admit.run_model(function, *call.copy())
    except InputError:
        return False
    return True


def _hold_to_strides(runnable: Any, captured: Capture, example: Call) -> None:
    """Where the model and its capture part for inputs in other strides, the entry check demands the example's.

    Export gives no guard for what a model reads off strides; few models read anything.
    """
    restrided = restrided_call(example)
    if not _runs(runnable, restrided):
        return
    wanted = outputs(runnable, restrided)
    try:
        alike = compare("other strides", restrided, wanted, outputs(captured.program, restrided)).ok
    except RuntimeError:
        # A view that the captured strides allow and these do not.
        alike = False
    if not alike:
        captured.entry = captured.entry.strided_as(example.args, example.kwargs)
        captured.notes.append("for inputs in other strides the model computes something else; calls are held to these")


def _check_resized(runnable: Any, captured: Capture, call: Call) -> CheckRow | None:
    """The comparison at another size, or None where the user's model does not run there."""
    if not _runs(runnable, call):
        return None
    try:
        got = outputs(captured.program, call)
    except Exception as error:
        raise CaptureError("cannot run the captured graph at another size", where=call.label, why=str(error)) from error
    return compare("capture = your model", call, outputs(runnable, call), got)
