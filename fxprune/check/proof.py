"""proof: the capture held against the user's model, and everything made from it held against the oracle."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fxprune.capture import admit
from fxprune.capture.capture import Capture, capture
from fxprune.couple.removal import Removal
from fxprune.errors import CaptureError, InputError
from fxprune.graph.note import Note
from fxprune.graph.ops import HALF
from fxprune.graph.program import Program
from fxprune.select.selection import Selection

from .calls import Call, resized_call, restrided_call, second_call, turned_call
from .compare import CheckRow, compare, is_finite, outputs, refuse
from .oracle import Oracle


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the oracle answers to the calls of a proof, and comparisons with it.

    outputs  the flat outputs of each call, in the precision of the model
    oracle   what answered
    wide     the same in float32 where the model is in half precision and something shrinks: rounding hides nothing
    """

    proof: Proof
    outputs: list[list[Any]]
    wide: list[list[Any]]
    oracle: Oracle
    is_wide: bool = False

    def shrunk(self, program: Program, selection: Selection, what: str = "shrunk = zeroed") -> CheckRow:
        """A shrunk program with its masks, held against the oracle: the worst of all calls; half types in float32."""
        oracle = Oracle(program, selection, wide=self.is_wide)
        rows = [
            compare(what, call, expected, oracle.outputs(call))
            for call, expected in zip(self.proof.calls, self.wide, strict=True)
        ]
        # Each row has the tolerance of its own outputs: what is worst is the furthest beyond it.
        return max(rows, key=lambda row: (not row.ok, row.error / row.tolerance if row.tolerance else math.inf))

    def stage(self, name: str, program: Program, left: Selection) -> CheckRow:
        """The program after a stage on the example, with what of the selection is left to apply to it.

        Raises CheckError, which names the stage, where it departs.
        """
        got = Oracle(program, left).outputs(self.proof.example)
        row = compare(f"after {name} = pruned model", self.proof.example, self.outputs[0], got)
        if not row.ok:
            raise refuse(row, f"The stage {name} is at fault: please report it with FXPRUNE_TRACE=<dir>.")
        return row

    def result(self, result: Any, graph: Program) -> list[CheckRow]:
        """The result (compiled) on the calls of the example's sizes, its graph (not compiled) at the second size."""
        rows = []
        for call, expected in zip(self.proof.calls, self.outputs, strict=True):
            resized = call is self.proof.resized
            what = "result's graph = pruned model" if resized else "result = pruned model"
            rows.append(compare(what, call, expected, outputs(graph if resized else result, call)))
        return rows


@dataclasses.dataclass(frozen=True)
class Proof:
    """The calls that everything made from a capture is tried on: those of the example's sizes, and a second size."""

    captured: Capture
    same_size: tuple[Call, ...]
    resized: Call | None = None

    @property
    def example(self) -> Call:
        """The user's own call."""
        return self.same_size[0]

    @property
    def calls(self) -> list[Call]:
        """All calls, the second size last."""
        return [*self.same_size, *([self.resized] if self.resized is not None else [])]

    def expect(self, selection: Selection, program: Program | None = None, removal: Removal | None = None) -> Expected:
        """Runs the oracle, masking in-graph over the user's storage, and keeps its outputs.

        `program` is what the oracle runs where blocks were dropped: the captured one without them.
        """
        program = program or self.captured.program
        oracle = Oracle(program, selection, removal)
        found = [oracle.outputs(call) for call in self.calls]
        half = any(getattr(n.meta.get("val"), "dtype", None) in HALF for n in program.graph.nodes)
        if removal is None or not half:
            return Expected(self, found, found, oracle)
        wide = Oracle(program, selection, removal, wide=True)
        return Expected(self, found, [wide.outputs(call) for call in self.calls], oracle, True)


@dataclasses.dataclass(frozen=True)
class Checked:
    """A capture that computes what the model computes, and the calls to hold what is made from it to.

    `proof` is None where nothing is checked.
    """

    captured: Capture
    proof: Proof | None
    notes: list[Note]
    checks: list[CheckRow]


def capture_checked(
    model: nn.Module | ExportedProgram, example: Call, dynamic_shapes: Any, *, check: bool, fold_masks: bool
) -> Checked:
    """Captures the model and holds the captured program against it, on the example and at a second size.

    Where a capture with dynamic sizes is wrong at the second size, every size is fixed, and a note says so; where the
    user asked for those sizes, that is an error.
    """
    runnable = model.module() if isinstance(model, ExportedProgram) else model
    with admit.untouched(runnable):
        args, kwargs = example.args, example.kwargs
        admit.run_model(runnable, *example.copy())
        captured = capture(model, args, kwargs, dynamic_shapes, fold_masks=fold_masks)
        calls = [example, second_call(example)]
        if not check:
            notes = [*captured.notes, Note("nothing was checked: check=False", "warning")]
            return Checked(captured, None, notes, [])
        notes: list[Note] = []
        expected = outputs(runnable, example)
        first = compare("capture = your model", example, expected, outputs(captured.program, example))
        if not first.ok and dynamic_shapes is None and not isinstance(model, ExportedProgram):
            # A model that takes sizes for something else than numbers can only be captured with every size fixed.
            captured = capture(model, args, kwargs, static=True, fold_masks=fold_masks)
            why = f"with dim 0 dynamic the capture was wrong ({first.error:.1e})"
            captured.notes.append(Note(f"every size is fixed: {why}", "fallback"))
            first = compare("capture = your model", example, expected, outputs(captured.program, example))
        checks = [first]
        if not first.ok:
            raise refuse(
                first,
                "Does it draw random numbers, or keep state between calls? Such a model cannot be transformed.",
            )
        if not _runs(runnable, calls[1]):
            refused = "the model refuses a second input drawn at random, so only the example was checked"
            notes.append(Note(refused, "warning"))
            calls.pop()
        turned = turned_call(example)
        if turned is not None:
            if _runs(runnable, turned) and is_finite(outputs(runnable, turned)):
                calls.append(turned)
            else:
                untried = "flags that the example has constant were not tried at other values: the model fails there"
                notes.append(Note(untried, "warning"))
        resized = resized_call(captured, example)
        if resized is not None:
            row = _check_resized(runnable, captured, resized)
            if row is None:
                refused = f"the model itself refuses the {resized.label}, so no second size was checked"
                notes.append(Note(refused, "warning"))
                resized = None
            elif row.ok:
                checks.append(row)
            elif dynamic_shapes is not None or isinstance(model, ExportedProgram):
                raise refuse(row, "Leave dynamic_shapes out: the sizes are then fixed where the model needs it.")
            else:
                captured = capture(model, args, kwargs, static=True, fold_masks=fold_masks)
                why = f"at the {resized.label} the capture was wrong ({row.error:.1e})"
                captured.notes.append(Note(f"every size is fixed: {why}", "fallback"))
                resized = None
        _hold_to_strides(runnable, captured, example)
        return Checked(captured, Proof(captured, tuple(calls), resized), [*notes, *captured.notes], checks)


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
        held = "for inputs in other strides the model computes something else; calls are held to these"
        captured.notes.append(Note(held, "fallback"))


def _check_resized(runnable: Any, captured: Capture, call: Call) -> CheckRow | None:
    """The comparison at another size, or None where the user's model does not run there."""
    if not _runs(runnable, call):
        return None
    try:
        got = outputs(captured.program, call)
    except Exception as error:
        raise CaptureError("cannot run the captured graph at another size", where=call.label, why=str(error)) from error
    return compare("capture = your model", call, outputs(runnable, call), got)
