"""deliver: the fastest program that computes what the pruned model computes, compiled, checked and timed.

The packed program is tried first; where it is not faster than the dense one the dense one is emitted, where
torch.compile fails the graph is emitted eager, and the report says so.
"""

from __future__ import annotations

import dataclasses
import gc
from statistics import median
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.export import ExportedProgram

from fxprune.capture.capture import Capture
from fxprune.capture.hooks import parametrized_names
from fxprune.check.calls import Call
from fxprune.check.compare import CheckRow, refuse
from fxprune.check.gradients import compare_gradients
from fxprune.check.proof import Expected
from fxprune.emit.trainable.modes import training_modes
from fxprune.emit.trainable.module import TrainableModule, emit_trainable, origin_of
from fxprune.graph.note import Note, some
from fxprune.graph.program import Program, copy_program
from fxprune.lower.fold import fold
from fxprune.lower.lower import Lowered
from fxprune.measure.benchmark import device_name, device_of
from fxprune.measure.timing import ModelTiming, interleave, undisturbed
from fxprune.select.selection import Selection

from .pruned import PrunedModule, emit, own_storage
from .settings import Settings

_GRAPHS = '; mode="reduce-overhead" runs it as a CUDA graph, without launches to wait for'


@dataclasses.dataclass(frozen=True)
class Delivered:
    """A result, and what became of it.

    lowered   what became of each weight in it
    compiled  how it runs, in words
    timing    the whole model against the dense one, where it was timed
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
    captured: Capture,
    program: Program,
    selection: Selection,
    *,
    packed: Program,
    lowered: list[Lowered],
    example: Call,
    expected: Expected | None,
    settings: Settings,
    is_smaller: bool,
    whole: tuple[Program, Selection] | None = None,
) -> Delivered:
    """The result and what became of each weight. Raises CheckError where no form of it is right.

    `program` is what is left of the captured one, and `selection` what is left to apply to it; `is_smaller` says that
    something left. `whole` is the program with its dead channels, and its masks: it is emitted where taking them out
    did not pay.
    """
    theirs = {t.data_ptr() for t in (*captured.program.parameters(), *captured.program.buffers())}
    any_packed = any(w.choice.layout != "dense" for w in lowered)
    forms = [*(["packed"] if any_packed else []), "dense", *(["whole"] if whole is not None else [])]
    notes: list[Note] = []
    for form in forms:
        if form == "whole":
            assert whole is not None
            final, is_smaller = fold(*whole), False
            lowered = _all_dense(lowered, "the model without its dead channels was slower")
        else:
            final = fold(program, selection) if form == "dense" and any_packed else packed
        own_storage(final, theirs)
        found = _compiled(final, captured, example, expected, settings)
        wrong = [row for row in found.checks if not row.ok]
        if wrong and form != "packed":
            around = "; options={'compile': False} avoids the compiler" if settings.compile else ""
            raise refuse(wrong[0], f"Please report it with FXPRUNE_TRACE=<dir>{around}.")
        if wrong:
            why = f"the packed result was wrong on the {wrong[0].call} ({wrong[0].error:.1e})"
            notes += [*found.notes, Note(f"{why} and was dropped", "warning")]
            lowered = _all_dense(lowered, "the packed model was wrong")
            continue
        notes += found.notes
        timing = None
        if (form == "packed" or is_smaller) and settings.measure and settings.layout is None:
            timing = _time(captured, found.result, example, settings)
            if timing.ratio < 1.0 and form == "packed":
                why = f"the whole model measured slower packed ({timing.ratio:.2f}x)"
                with_graphs = _GRAPHS if settings.mode in (None, "default") and _on_gpu(example) else ""
                notes.append(Note(f"{why}, so it was emitted dense{with_graphs}", "fallback"))
                lowered = _all_dense(lowered, why)
                del found
                continue
            if timing.ratio < 1.0:
                slower = f"the smaller model measured slower than the whole one ({timing.ratio:.2f}x)"
                notes.append(Note(slower + (", so its dead channels stay" if whole is not None else ""), "missed"))
                if whole is not None:
                    continue
        whole_stays = form == "whole"
        return dataclasses.replace(found, lowered=lowered, timing=timing, is_whole=whole_stays, notes=tuple(notes))
    raise AssertionError("unreachable: the dense program was returned or refused")


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
    rows = expected.result(result, result) if expected is not None else []
    for row in rows:
        if not row.ok:
            raise refuse(row, "Please report it with FXPRUNE_TRACE=<dir>.")
    if expected is not None:
        without = {name for name, mode in modes.items() if mode.no_grad}
        checks, more = compare_gradients(result, model, expected, without)
        rows, notes = [*rows, *checks], [*notes, *more]
    return result, notes, rows


def _compiled(
    program: Program, captured: Capture, example: Call, expected: Expected | None, settings: Settings
) -> Delivered:
    """The program emitted and held against the oracle; eager where torch.compile fails."""
    arguments = settings.compile_arguments()
    result, notes = emit(copy_program(program), captured.entry, arguments), []
    compiled = "eager graph (compile=False)"
    if arguments is not None:
        with_freezing = " with freezing" if settings.freezing else ""
        compiled = "torch.compile" + with_freezing + (f", mode {settings.mode}" if settings.mode else "")
        try:
            args, kwargs = example.copy()
            result(*args, **kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            notes.append(Note(f"torch.compile failed, so the graph is emitted eager: {reason}", "fallback"))
            compiled = "eager graph (torch.compile failed)"
            result = emit(copy_program(program), captured.entry, None)
    rows = expected.result(result, program) if expected is not None else []
    return Delivered(result, [], compiled, notes=tuple(notes), checks=tuple(rows))


def _time(captured: Capture, result: PrunedModule, example: Call, settings: Settings) -> ModelTiming:
    """The result against the dense program over the user's own weights (a dense kernel does not care for zeros)."""
    dense = emit(
        copy_program(captured.program),
        captured.entry,
        settings.compile_arguments() if result.meta["compile"] is not None else None,
    )
    args, kwargs = example.copy()
    calls = [lambda m=m: m(*args, **kwargs) for m in (dense, result)]
    device = device_of(example.args, example.kwargs)
    samples = interleave(calls, device, seconds=1.5, min_rounds=7)
    # As the chooser compares them: a GPU's times stray to both sides.
    typical = undisturbed if device is None else median
    timing = ModelTiming(
        typical(samples[0]),
        typical(samples[1]),
        torch.get_num_threads(),
        device_name(example.args, example.kwargs),
    )
    del dense, calls
    gc.collect()
    return timing


def _on_gpu(example: Call) -> bool:
    return device_of(example.args, example.kwargs) is not None


def _all_dense(lowered: list[Lowered], why: str) -> list[Lowered]:
    def dense(w: Lowered) -> Lowered:
        if w.choice.layout == "dense":
            return w
        refused: dict[str, Any] = {**w.choice.refused, w.choice.layout: why}
        choice = dataclasses.replace(w.choice, layout="dense", why=why, refused=refused)
        return dataclasses.replace(w, choice=choice, bytes=w.dense_bytes)

    return [dense(w) for w in lowered]
