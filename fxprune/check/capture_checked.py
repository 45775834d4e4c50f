"""capture_checked: a capture that computes what the user's model computes, on every call that a check uses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxprune.capture import admit
from fxprune.capture.capture import Capture, capture
from fxprune.capture.entry import TensorInput
from fxprune.capture.several import Differing, widest
from fxprune.errors import CaptureError, InputError
from fxprune.graph import compat
from fxprune.graph.environment import words_of
from fxprune.graph.note import Note
from fxprune.select.selection import Selection

from .calls import Call, dynamic_sizes, resized_call, restrided_call, second_call, turned_call, with_sizes
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
    model: nn.Module | ExportedProgram,
    example: Call,
    dynamic_shapes: Any,
    others: Sequence[Call] = (),
    *,
    check: bool,
    fold_masks: bool,
) -> Checked:
    """Captures the model and holds the captured program against it: on the example, a second input, with flags turned,
    at a second size, at size 1 of every dynamic dimension, and on `others`: more calls that it is to take.

    Where a capture with dynamic sizes is wrong, every size is fixed, and a note says so; where the user asked for those
    sizes, that is an error. Where it is wrong at size 1 alone, the entry check refuses 1.
    """
    # Also the model's own answers are compared leaf by leaf.
    compat.register_foreign_outputs()
    runnable, base = admit.runnable(model), (example.args, example.kwargs)
    if isinstance(dynamic_shapes, Differing):
        base = widest([base, *((other.args, other.kwargs) for other in others)], dynamic_shapes)
    fixable = dynamic_shapes is None and not isinstance(model, ExportedProgram)
    asked = not fixable and not isinstance(dynamic_shapes, Differing)
    with admit.untouched(runnable) as state:
        theirs = UsersModel(runnable, state)
        expected = theirs.answer(example)
        for other in others:
            theirs.answer(other)
        again = theirs.answer_next(example) if check else expected
        keeps = state.restore()

        def capture_as(*, static: bool) -> Capture:
            shapes = None if static else dynamic_shapes
            arguments = (model, *base, shapes)
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
            _hold_to_one(theirs, captured, example, asked=asked, only_refused=True)
            if not captured.entry.takes(example.args, example.kwargs):
                captured = capture_as(static=True)
            _take(captured, [example, *others] if others else [])
            notes = [*captured.notes, Note("nothing was checked: check=False", "warning")]
            return Checked(captured, None, notes, [])
        itself = compare("your model = itself, called twice", example, expected, again)
        if not itself.ok:
            question = "Does it draw random numbers, or keep state between calls?"
            raise refuse(itself, f"{question} Such a model cannot be transformed.")
        calls, notes = _calls_of_its_sizes(theirs, example)

        def fixed(why: str) -> tuple[Capture, list[CheckRow]]:
            captured = capture_as(static=True)
            captured.notes.append(Note(f"every size is fixed: {why}", "fallback"))
            return captured, _hold(theirs, captured, calls)

        checks = _hold(theirs, captured, calls)
        if fixable and (bad := _first_wrong(checks)):
            captured, checks = fixed(f"with dim 0 dynamic the capture was wrong ({bad.off})")
        (resized, refused), more = _resized(theirs, captured, example), []
        if resized is None and fixable and dynamic_sizes(captured, example):
            why = f"the model itself refuses the {refused.label}" if refused else "the graph is right for no others"
            captured, checks = fixed(why)
        elif resized is None and refused is not None:
            untried = f"the model itself refuses the {refused.label}, so no second size was checked"
            notes.append(Note(untried, "warning"))
        elif resized is not None:
            row = _hold(theirs, captured, [resized])[0]
            if row.ok:
                more.append(resized)
                checks.append(row)
            elif fixable:
                captured, checks = fixed(f"at the {resized.label} the capture was wrong ({row.off})")
            else:
                raise refuse(row, "Leave dynamic_shapes out: the sizes are then fixed where the model needs it.")
        if bad := _first_wrong(checks):
            if others:
                _take(captured, [example])
            raise _parted(bad)
        singles, rows = _hold_to_one(theirs, captured, example, asked=asked)
        if not captured.entry.takes(example.args, example.kwargs):
            captured, checks = fixed("the graph of other sizes is not right for the example")
            more, singles, rows = [], [], []
        _take(captured, others)
        rows += _hold(theirs, captured, [*others])
        if bad := _first_wrong(rows):
            raise _parted(bad)
        _hold_to_strides(theirs, captured, example)
        notes += theirs.notes
        proof = Proof(captured, tuple(calls), (*others, *more, *singles))
        return Checked(captured, proof, [*notes, *captured.notes], [*checks, *rows])


def _take(captured: Capture, others: Sequence[Call]) -> None:
    """Raises InputError where the graph does not take one of the user's example calls."""
    for other in others:
        try:
            captured.entry.check(other.args, other.kwargs)
        except InputError as error:
            raise InputError(
                "cannot make one graph for these example calls",
                where=other.label,
                why=f"{error.what}: {error.why}",
                do="Transform once for each of them, or take that size out of the list.",
            ) from error


def _resized(theirs: UsersModel, captured: Capture, example: Call) -> tuple[Call | None, Call | None]:
    """A call with other sizes in all dynamic dimensions, or in one, that the model takes; and one that it refuses."""
    sizes, refused = dynamic_sizes(captured, example), None
    for symbol in (None, *sizes) if len(sizes) > 1 else (None,):
        call = resized_call(captured, example, symbol)
        if call is not None and theirs.takes(call):
            return call, refused
        refused = refused or call
    return None, refused


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


def _hold_to_one(
    theirs: UsersModel, captured: Capture, example: Call, *, asked: bool, only_refused: bool = False
) -> tuple[list[Call], list[CheckRow]]:
    """Calls with size 1 in one dynamic dimension, and their checks; with `only_refused` those that export refuses.

    These the entry check takes from now on where the capture is right; where it is wrong, 1 is refused. What the user
    `asked` for stays: the least value that a Dim has.
    """
    calls, rows = [], []
    for symbols, together in _ones(captured, example):
        single = with_sizes(captured, example, dict.fromkeys(symbols, 1), "size 1")
        taken = captured.entry.takes(single.args, single.kwargs)
        if only_refused if taken else asked and any(map(captured.entry.has_least, symbols)):
            continue
        row = _held(theirs, captured, single) if theirs.takes(single) else None
        if row is not None and row.ok:
            if not taken:
                captured.entry = captured.entry.allowing(symbols, 1, single.args, single.kwargs)
            calls.append(single)
            rows.append(row)
        elif row is None and not together:
            if taken:
                refused = f"the model itself refuses {single.label}, so it was not checked"
                captured.notes.append(Note(refused, "warning"))
        else:
            if taken:
                captured.entry = captured.entry.above(symbols[0], 1, together)
            if row is not None:
                wrong = f"at {single.label} the capture was wrong ({row.off}), so calls of that size are refused"
                captured.notes.append(Note(wrong, "fallback"))
    return calls, rows


def _ones(captured: Capture, example: Call) -> list[tuple[list[str], list[str]]]:
    """Which dynamic sizes to set to 1 in a call, and for one that is set alone, those that it belongs with.

    Inputs whose dim 0 has one size have their samples there: they are set together, and each alone, where it would be
    broadcast.
    """
    sizes, first = dynamic_sizes(captured, example), {}
    for want in captured.entry.inputs:
        for dim, size in enumerate(want.sizes if isinstance(want, TensorInput) else ()):
            if isinstance(size, str):
                first.setdefault(size, dim)
    batches: dict[int, list[str]] = {}
    for symbol, size in sizes.items():
        if first[symbol] == 0:
            batches.setdefault(size, []).append(symbol)
    found: list[tuple[list[str], list[str]]] = []
    for batch in batches.values():
        found.append((batch, []))
        found += [([symbol], batch) for symbol in batch if len(batch) > 1]
    return [*found, *(([symbol], []) for symbol in sizes if first[symbol])]


def _hold_to_strides(theirs: UsersModel, captured: Capture, example: Call) -> None:
    """Where the model and its capture part for inputs in other strides, the entry check demands the example's.

    Export gives no guard for what a model reads off strides; few models read anything.
    """
    restrided = restrided_call(example)
    if theirs.takes(restrided) and not _held(theirs, captured, restrided).ok:
        captured.entry = captured.entry.strided_as(example.args, example.kwargs)
        held = "for inputs in other strides the model computes something else; calls are held to these"
        captured.notes.append(Note(held, "fallback"))
