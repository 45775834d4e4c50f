"""capture_checked: a capture that computes what the user's model computes, on every call that a check uses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxprune.capture import admit
from fxprune.capture.capture import Capture, capture
from fxprune.capture.entry import EntryCheck, TensorInput
from fxprune.errors import CaptureError
from fxprune.graph.environment import words_of
from fxprune.graph.note import Note
from fxprune.select.selection import Selection

from .calls import Call, dynamic_sizes, resized_call, restrided_call, second_call, sized_call, turned_call
from .compare import TOLERANCE, CheckRow, compare, is_finite, outputs, refuse
from .oracle import Oracle
from .proof import Proof
from .rounding import within_rounding
from .users_model import UsersModel

_WHAT = "capture = your model"


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
    """Captures the model and holds the captured program against it: on the example, a second input, with flags turned,
    at a second size, and at size 1 of every dynamic dimension.

    Where a capture with dynamic sizes is wrong, every size is fixed, and a note says so; where the user asked for those
    sizes, that is an error. Where it is wrong at size 1 alone, the entry check refuses 1.
    """
    runnable = admit.runnable(model)
    fixable = dynamic_shapes is None and not isinstance(model, ExportedProgram)
    with admit.untouched(runnable) as state:
        theirs = UsersModel(runnable, state)
        expected = theirs.answer(example)
        again = theirs.answer_next(example) if check else expected
        keeps = state.restore()

        def capture_as(*, static: bool) -> Capture:
            shapes = None if static else dynamic_shapes
            arguments = (model, example.args, example.kwargs, shapes)
            state.restore()
            try:
                return capture(*arguments, static=static, fold_masks=fold_masks)
            except CaptureError:
                if not keeps:
                    raise
            # What a model makes of itself at its first call, export may not be able to make.
            state.restore()
            theirs.answer_next(example)
            return capture(*arguments, static=static, fold_masks=fold_masks)

        captured = capture_as(static=False)
        if not check:
            notes = [*captured.notes, Note("nothing was checked: check=False", "warning")]
            return Checked(captured, None, notes, [])
        itself = compare("your model = itself, called twice", example, expected, again)
        if not itself.ok:
            asked = "Does it draw random numbers, or keep state between calls?"
            raise refuse(itself, f"{asked} Such a model cannot be transformed.")
        calls, notes = _calls_of_its_sizes(theirs, example)

        def fixed(why: str) -> tuple[Capture, list[CheckRow]]:
            captured = capture_as(static=True)
            captured.notes.append(Note(f"every size is fixed: {why}", "fallback"))
            return captured, _hold(theirs, captured, calls)

        checks = _hold(theirs, captured, calls)
        if fixable and (bad := _first_wrong(checks)):
            captured, checks = fixed(f"with dim 0 dynamic the capture was wrong ({bad.off})")
        resized, others = resized_call(captured, example), []
        if resized is not None and not theirs.takes(resized):
            untried = f"the model itself refuses the {resized.label}, so no second size was checked"
            notes.append(Note(untried, "warning"))
        elif resized is not None:
            row = _hold(theirs, captured, [resized])[0]
            if row.ok:
                others.append(resized)
                checks.append(row)
            elif fixable:
                captured, checks = fixed(f"at the {resized.label} the capture was wrong ({row.off})")
            else:
                raise refuse(row, "Leave dynamic_shapes out: the sizes are then fixed where the model needs it.")
        if bad := _first_wrong(checks):
            raise _parted(bad)
        singles, rows = _hold_to_one(theirs, captured, example)
        _hold_to_strides(theirs, captured, example)
        notes += theirs.notes
        proof = Proof(captured, tuple(calls), (*others, *singles))
        return Checked(captured, proof, [*notes, *captured.notes], [*checks, *rows])


def _calls_of_its_sizes(theirs: UsersModel, example: Call) -> tuple[list[Call], list[Note]]:
    """The example, and calls of its sizes that the model takes: a second input, and with flags turned."""
    calls, notes = [example], []
    second, turned = second_call(example), turned_call(example)
    if theirs.takes(second):
        calls.append(second)
        if theirs.keeps_something(example, second):
            kept = "the model keeps something of one call for the next; the result answers every call as the first one"
            notes.append(Note(kept, "warning"))
    else:
        refused = "the model refuses a second input drawn at random, so only the example was checked"
        notes.append(Note(refused, "warning"))
    if turned is not None:
        if theirs.takes(turned) and is_finite(theirs.answer(turned)):
            calls.append(turned)
        else:
            untried = "flags that the example has constant were not tried at other values: the model fails there"
            notes.append(Note(untried, "warning"))
    return calls, notes


def _hold(theirs: UsersModel, captured: Capture, calls: list[Call]) -> list[CheckRow]:
    """The captured program against the model on these calls."""
    return [_held(theirs, captured, call) for call in calls]


def _held(theirs: UsersModel, captured: Capture, call: Call) -> CheckRow:
    expected = theirs.answer(call)
    try:
        got = outputs(captured.program, call)
    except Exception as error:
        # What a graph raises where the model does not is one more way to be wrong.
        return CheckRow(_WHAT, call.label, math.inf, TOLERANCE[torch.float32], note=f"it raises {words_of(error)}")
    row = compare(_WHAT, call, expected, got)
    if not row.ok and torch.backends.mha.get_fastpath_enabled():
        row = compare(_WHAT, call, theirs.answer_slowly(call), got)
        if row.ok:
            theirs.note_slow()
    if row.ok:
        return row
    program = Oracle(captured.program, Selection())
    right, ours = lambda: theirs.answer_in_float64(call), lambda: program.in_float64().outputs(call)
    return within_rounding(row, call, expected, got, right, ours, lambda seed: program.nudged(seed).outputs(call))


def _first_wrong(rows: list[CheckRow]) -> CheckRow | None:
    return next((row for row in rows if not row.ok), None)


def _parted(row: CheckRow) -> CaptureError:
    """The error for a capture that is not the model."""
    differ = f"the outputs differ by {row.error:.2e} relative, {row.tolerance:.0e} is allowed"
    return CaptureError(
        "the captured graph does not compute what the model computes",
        where=row.call,
        why=f"{differ}{f' ({row.note})' if row.note else ''}. torch.export fixes what is no tensor op: a value read "
        "off a tensor (.item(), .tolist(), numpy), a branch on torch.compiler.is_exporting() or is_compiling(), what "
        "an earlier call left in the model or in a global",
        do="Take that out of forward, or compute it with tensor ops such as torch.where.",
    )


def _hold_to_one(theirs: UsersModel, captured: Capture, example: Call) -> tuple[list[Call], list[CheckRow]]:
    """Calls with size 1 in one dynamic dimension, and their checks. Where the capture is wrong there, 1 is refused."""
    calls, rows = [], []
    for symbol, size in dynamic_sizes(captured, example).items():
        single = sized_call(captured, example, {symbol: 1}, "size 1") if size != 1 else None
        if single is None:
            continue
        if not theirs.takes(single):
            captured.notes.append(Note(f"the model itself refuses {single.label}, so it was not checked", "warning"))
            continue
        row = _held(theirs, captured, single)
        if row.ok:
            calls.append(single)
            rows.append(row)
            continue
        captured.entry = _refusing_one(captured.entry, symbol)
        wrong = f"at {single.label} the capture was wrong ({row.off}), so calls of that size are refused"
        captured.notes.append(Note(wrong, "fallback"))
    return calls, rows


def _refusing_one(entry: EntryCheck, symbol: str) -> EntryCheck:
    """The entry check that also demands more than 1 of a dynamic size."""
    index, dim = next(
        (index, dim)
        for index, want in enumerate(entry.inputs)
        if isinstance(want, TensorInput)
        for dim, size in enumerate(want.sizes)
        if size == symbol
    )
    guard = (f"a[{index}].size()[{dim}] > 1", f"{entry.paths[index]}.size()[{dim}] > 1")
    return dataclasses.replace(entry, guards=(*entry.guards, guard))


def _hold_to_strides(theirs: UsersModel, captured: Capture, example: Call) -> None:
    """Where the model and its capture part for inputs in other strides, the entry check demands the example's.

    Export gives no guard for what a model reads off strides; few models read anything.
    """
    restrided = restrided_call(example)
    if theirs.takes(restrided) and not _held(theirs, captured, restrided).ok:
        captured.entry = captured.entry.strided_as(example.args, example.kwargs)
        held = "for inputs in other strides the model computes something else; calls are held to these"
        captured.notes.append(Note(held, "fallback"))
