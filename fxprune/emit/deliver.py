"""deliver: the fastest form of a program that computes what the pruned model computes, and what the report says of it.

The forms are the packed program, the dense one, the one with its dead channels, and the one with nothing folded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxprune.capture import admit
from fxprune.capture.capture import Capture
from fxprune.capture.hooks import parametrized_names
from fxprune.check.calls import Call
from fxprune.check.compare import CheckRow, refuse
from fxprune.check.gradients import compare_gradients
from fxprune.check.proof import Expected
from fxprune.emit.trainable.modes import training_modes
from fxprune.emit.trainable.module import TrainableModule, emit_trainable, origin_of
from fxprune.graph.note import Note, some
from fxprune.graph.program import Program
from fxprune.lower.fold import fold, fold_masks
from fxprune.lower.lower import Lowered
from fxprune.measure.model_timing import ModelTiming
from fxprune.select.selection import Selection

from .pruned import PrunedModule
from .settings import Settings
from .trial import Form, Trial


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
    on_step: Callable[[str], None] = lambda _: None,
) -> Delivered:
    """The result and what became of each weight. Raises CheckError where no form of it is right.

    `program` is what is left of the captured one, and `selection` what is left to apply to it. `whole` is the program
    with its dead channels, and its masks: it is emitted where taking them out did not pay. `on_step` is told what is
    compiled and timed next.
    """
    any_packed = any(w.choice.layout != "dense" for w in lowered)
    options = settings.inductor_options()
    dense = Form("dense", lambda: fold(program, selection) if any_packed else packed, options, lowered)
    forms = [dense]
    if any_packed:
        dense = dataclasses.replace(dense, lowered=_all_dense(lowered, "the model is not faster packed"))
        forms = [Form("packed", lambda: packed, options, lowered), dense]
    # Op by op as the model: in a precision that leaves it no digit, everything else has other numbers.
    undone = _all_dense(lowered, "only the model's own ops in their own order have its numbers")
    as_it_is = Form("unfolded", lambda: fold_masks(program, selection), None, undone)
    fallbacks = [*dense.others(), as_it_is]
    more = []
    if whole is not None:
        undone = _all_dense(lowered, "the model without its dead channels was slower")
        more.append(Form("whole", lambda: fold(*whole), options, undone))
    trial = Trial(captured, example, expected, settings, on_step)
    timing = None
    if settings.measure and settings.layout is None:
        user = admit.runnable(model)
        with admit.untouched(user), torch.no_grad():
            best = trial.fastest_right(forms, fallbacks)
            unpacked = dense.others() if best.form.name == "packed" else []
            best, timing = trial.against(user, best, [*more, *best.form.others(), *unpacked])
            timing = dataclasses.replace(timing, half=trial.half(user, best))
    else:
        best = trial.first_right([*forms, *fallbacks])
    return Delivered(
        best.result,
        best.form.lowered,
        best.compiled,
        timing,
        is_whole=best.form.name == "whole",
        notes=(*trial.notes, *best.notes),
        checks=best.checks,
    )


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
    computed = parametrized_names(model) if isinstance(model, nn.Module) else []
    if computed:
        why = "these weights train as the plain values that their parametrizations computed, and are not computed anew"
        notes.append(Note(f"{why}: {some(computed)}", "warning"))
    origin = origin_of(model, captured)
    result = emit_trainable(
        program, captured.entry, modes, origin, selection.mask, masked_matmul=settings.masked_matmul
    )
    rows = [*expected.result(result), *expected.at_other_sizes(result)] if expected is not None else []
    for row in rows:
        if not row.ok:
            raise refuse(row, "Please report it with FXPRUNE_TRACE=<dir>.")
    if expected is not None:
        without = {name for name, mode in modes.items() if mode.no_grad}
        with admit.untouched(admit.runnable(model)):
            checks, more = compare_gradients(result, model, expected, without)
        rows, notes = [*rows, *checks], [*notes, *more]
    return result, notes, rows


def _all_dense(lowered: list[Lowered], why: str) -> list[Lowered]:
    def dense(w: Lowered) -> Lowered:
        if w.choice.layout == "dense":
            return w
        refused: dict[str, Any] = {**w.choice.refused, w.choice.layout: why}
        choice = dataclasses.replace(w.choice, layout="dense", why=why, refused=refused)
        return dataclasses.replace(w, choice=choice, bytes=w.dense_bytes)

    return [dense(w) for w in lowered]
