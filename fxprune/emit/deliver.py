"""deliver: the fastest form of a program that computes what the pruned model computes, compiled, checked and timed.

The forms are the packed program, the dense one, and the one with its dead channels. Each is compiled and held against
the oracle; the one that runs fastest is raced against the model as its user may run it at best. Where that is faster,
more forms are tried: not frozen, and eager. The report says what was faster than what.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxprune.capture import admit
from fxprune.capture.capture import Capture
from fxprune.check.calls import Call
from fxprune.check.compare import CheckRow, largest_difference, refuse
from fxprune.check.proof import Expected
from fxprune.emit.trainable.modes import training_modes
from fxprune.emit.trainable.module import TrainableModule, emit_trainable, origin_of
from fxprune.errors import warn_once
from fxprune.graph.environment import words_of
from fxprune.graph.note import Note
from fxprune.graph.program import Program, copy_program
from fxprune.lower.fold import fold
from fxprune.lower.lower import Lowered
from fxprune.measure.device import device_of, has_bfloat16_units
from fxprune.measure.model_timing import Half, ModelTiming, time_against
from fxprune.measure.race import duel, fastest
from fxprune.measure.ways import in_bfloat16, ways_of
from fxprune.select.selection import Selection

from .pruned import PrunedModule, emit, own_storage
from .settings import Settings

_GRAPHS = '; mode="reduce-overhead" runs it as a CUDA graph, without launches to wait for'


@dataclasses.dataclass(frozen=True)
class Delivered:
    """A result, and what became of it.

    lowered   what became of each weight in it
    compiled  how it runs, in words
    timing    the result against the user's model, where it was timed
    is_whole  whether dead channels stayed in, since the model without them was slower
    """

    result: PrunedModule
    lowered: list[Lowered]
    compiled: str
    timing: ModelTiming | None = None
    is_whole: bool = False
    notes: tuple[Note, ...] = ()
    checks: tuple[CheckRow, ...] = ()


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to emit a program: the program, Inductor's options or None for eager, and what became of each weight."""

    name: str
    make: Callable[[], Program]
    options: dict[str, Any] | None
    lowered: list[Lowered]


def deliver(
    model: nn.Module | ExportedProgram,
    captured: Capture,
    program: Program,
    selection: Selection,
    *,
    packed: Program,
    lowered: list[Lowered],
    example: Call,
    expected: Expected | None,
    settings: Settings,
    whole: tuple[Program, Selection] | None = None,
) -> Delivered:
    """The result and what became of each weight. Raises CheckError where no form of it is right.

    `program` is what is left of the captured one, and `selection` what is left to apply to it. `whole` is the program
    with its dead channels, and its masks: it is emitted where taking them out did not pay.
    """
    any_packed = any(w.choice.layout != "dense" for w in lowered)
    options = settings.inductor_options()
    dense = Form("dense", lambda: fold(program, selection) if any_packed else packed, options, lowered)
    forms = [dense]
    if any_packed:
        dense = dataclasses.replace(dense, lowered=_all_dense(lowered, "the model is not faster packed"))
        forms = [Form("packed", lambda: packed, options, lowered), dense]
    more = []
    if whole is not None:
        undone = _all_dense(lowered, "the model without its dead channels was slower")
        more.append(Form("whole", lambda: fold(*whole), options, undone))
    trial = _Trial(captured, example, expected, settings)
    if not settings.measure or settings.layout is not None:
        return trial.ended(trial.first_right(forms))
    user = admit.runnable(model)
    with admit.untouched(user), torch.no_grad():
        return trial.ended(trial.fastest(forms, more, user))


class _Trial:
    """Forms of one program on their way to be emitted: compiled, held against the oracle, and raced."""

    def __init__(self, captured: Capture, example: Call, expected: Expected | None, settings: Settings) -> None:
        self._captured, self._expected, self._settings = captured, expected, settings
        self._example = example.copy()
        self._device = device_of(example.args, example.kwargs)
        self._theirs = {t.data_ptr() for t in (*captured.program.parameters(), *captured.program.buffers())}
        self._notes: list[Note] = []

    def first_right(self, forms: list[Form]) -> tuple[Form, Delivered]:
        """The first form that is right at every size. Raises CheckError where none is."""
        for form in forms:
            found = self._right(form, is_last=form is forms[-1])
            if found is not None and self._right_at_second_size(form, found, is_last=form is forms[-1]):
                return form, found
        raise AssertionError("unreachable: the last form is right or raises")

    def fastest(self, forms: list[Form], more: list[Form], user: Any) -> tuple[Form, Delivered]:
        """The fastest form; `more` are tried where the user's model was faster than the best of `forms`."""
        best = self._best(forms)
        ways = ways_of(user, *self._example, self._device)
        if not self._settings.compile:
            ways = {name: make for name, make in ways.items() if name.startswith("eager")}
        champion = fastest(ways, self._device)
        timing = time_against(champion, self._call(best[1]), self._device)
        for form in [*more, *self._other_forms(best[0])]:
            if timing.ratio >= 1.0:
                break
            other = self._right(form, is_last=False)
            if other is not None and self._is_faster(other, best[1]) and self._right_at_second_size(form, other):
                if form.name == "whole":
                    slower = f"the smaller model measured slower than the whole one ({timing.ratio:.2f}x)"
                    self._notes.append(Note(f"{slower}, so its dead channels stay", "missed"))
                best = form, other
                timing = time_against(champion, self._call(other), self._device)
        if timing.ratio < 1.0:
            slower = f"the result is no faster than your model as it is ({timing.ratio:.2f}x of {timing.way})"
            self._notes.append(Note(slower, "missed"))
        del champion
        half = self._half(user, best[1])
        return best[0], dataclasses.replace(best[1], timing=dataclasses.replace(timing, half=half))

    def ended(self, best: tuple[Form, Delivered]) -> Delivered:
        """What is handed out, with all notes."""
        form, found = best
        notes = (*self._notes, *found.notes)
        return dataclasses.replace(found, lowered=form.lowered, is_whole=form.name == "whole", notes=notes)

    def _best(self, forms: list[Form]) -> tuple[Form, Delivered]:
        """The fastest of the forms that are right."""
        best: tuple[Form, Delivered] | None = None
        for form in forms:
            is_last = best is None and form is forms[-1]
            found = self._right(form, is_last=is_last)
            if found is None or (best is not None and not self._is_faster(found, best[1], told=best[0].name)):
                continue
            if self._right_at_second_size(form, found, is_last=is_last):
                best = form, found
        assert best is not None
        return best

    def _right(self, form: Form, *, is_last: bool) -> Delivered | None:
        """A form compiled, if it is right at the example's sizes. Raises CheckError for the last that there is."""
        program = form.make()
        own_storage(program, self._theirs)
        found = self._compiled(program, form.options)
        wrong = next((row for row in found.checks if not row.ok), None)
        return found if wrong is None else self._dropped(form, wrong, is_last)

    def _right_at_second_size(self, form: Form, found: Delivered, *, is_last: bool = False) -> bool:
        """Holds the compiled code, not only the graph, at the second size."""
        row = self._expected.second_size(found.result) if self._expected is not None else None
        if row is not None and row.ok:
            object.__setattr__(found, "checks", (*found.checks, row))
        return row is None or row.ok or self._dropped(form, row, is_last) is not None

    def _dropped(self, form: Form, wrong: CheckRow, is_last: bool) -> None:
        if is_last:
            around = "; options={'compile': False} avoids the compiler" if self._settings.compile else ""
            raise refuse(wrong, f"Please report it with FXPRUNE_TRACE=<dir>{around}.")
        why = f"the {form.name} result was wrong on the {wrong.call} ({wrong.error:.1e})"
        self._notes.append(Note(f"{why} and was dropped", "warning"))

    def _is_faster(self, new: Delivered, old: Delivered, *, told: str = "") -> bool:
        """Whether a form beats another; `told` names the other where the user is to know that it was slower."""
        before, after = duel(self._call(old), self._call(new), self._device)
        if after.typical >= before.typical:
            return False
        if told == "packed":
            why = f"the whole model measured slower packed ({after.typical / before.typical:.2f}x)"
            launches = self._device is not None and self._settings.mode in (None, "default")
            self._notes.append(Note(f"{why}, so it was emitted dense{_GRAPHS if launches else ''}", "fallback"))
        return True

    def _call(self, found: Delivered) -> Callable[[], Any]:
        args, kwargs = self._example
        return functools.partial(found.result, *args, **kwargs)

    def _other_forms(self, form: Form) -> list[Form]:
        """The same program not frozen, and not compiled."""
        without = {k: v for k, v in (form.options or {}).items() if k != "freezing"}
        others = [without, None] if form.options and "freezing" in form.options else [None]
        return [dataclasses.replace(form, options=each) for each in others if form.options is not None]

    def _compiled(self, program: Program, options: dict[str, Any] | None) -> Delivered:
        """The program emitted and held against the oracle; eager where it does not compile."""
        result, notes = emit(copy_program(program), self._captured.entry, options), []
        compiled = self._settings.words(options)
        if options is not None:
            try:
                result(*self._example[0], **self._example[1])
            # Whatever a compiler raises; the graph has been run eager before.
            except Exception as error:
                text = f"torch.compile failed, so the graph is emitted eager: {words_of(error)}"
                warn_once(text)
                notes.append(Note(text, "fallback"))
                compiled = "eager graph (torch.compile failed)"
                result = emit(copy_program(program), self._captured.entry, None)
        rows = self._expected.result(result) if self._expected is not None else []
        return Delivered(result, [], compiled, notes=tuple(notes), checks=tuple(rows))

    def _half(self, user: Any, found: Delivered) -> Half | None:
        """The user's model in bfloat16, where that may be faster than any float32."""
        floats = {p.dtype for p in user.parameters() if p.is_floating_point()}
        if floats != {torch.float32} or not has_bfloat16_units(self._device) or not self._settings.compile:
            return None
        args, kwargs = self._example
        try:
            function = in_bfloat16(user)
            got = pytree.tree_leaves(function(*args, **kwargs))
        # Whatever a model raises that does not take another precision.
        except Exception:
            return None
        want = pytree.tree_leaves(found.result(*args, **kwargs))
        samples, _ = duel(lambda: function(*args, **kwargs), self._call(found), self._device)
        return Half(samples.typical, largest_difference(got, want))


def deliver_trainable(
    model: nn.Module | ExportedProgram,
    captured: Capture,
    program: Program,
    selection: Selection,
    example: Call,
    dynamic_shapes: Any,
    expected: Expected | None,
    settings: Settings,
) -> tuple[TrainableModule, list[Note], list[CheckRow]]:
    """What is left of the model as an ordinary module, in eval mode, with notes on its train mode and its checks.

    Raises CheckError where it is not right.
    """
    modes, notes = training_modes(model, captured, example.args, example.kwargs, dynamic_shapes)
    origin = origin_of(model, captured)
    result = emit_trainable(
        program, captured.entry, modes, origin, selection.mask, masked_matmul=settings.masked_matmul
    )
    rows = [*expected.result(result), *filter(None, [expected.second_size(result)])] if expected is not None else []
    for row in rows:
        if not row.ok:
            raise refuse(row, "Please report it with FXPRUNE_TRACE=<dir>.")
    return result, notes, rows


def _all_dense(lowered: list[Lowered], why: str) -> list[Lowered]:
    def dense(w: Lowered) -> Lowered:
        if w.choice.layout == "dense":
            return w
        refused: dict[str, Any] = {**w.choice.refused, w.choice.layout: why}
        choice = dataclasses.replace(w.choice, layout="dense", why=why, refused=refused)
        return dataclasses.replace(w, choice=choice, bytes=w.dense_bytes)

    return [dense(w) for w in lowered]
