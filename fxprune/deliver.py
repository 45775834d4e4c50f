"""deliver: the fastest program that computes what the pruned model computes, compiled, checked and timed.

The packed program is tried first; where it is not faster than the dense one the dense one is emitted, where
torch.compile fails the graph is emitted eager, and the report says so.
"""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxprune.graph.program import Program, copy_program
from fxprune.measure.benchmark import device_name, device_of
from fxprune.measure.timing import interleave, median, undisturbed
from fxprune.passes.fold import fold
from fxprune.passes.lower import Lowered

from .capture import Capture
from .check import Call, CheckRow, refuse
from .emit import PrunedModule, emit, own_storage
from .kernels import native
from .modes import training_modes
from .prove import Proof
from .report import ModelTiming, Report
from .select import Selection
from .settings import Settings
from .trainable import TrainableModule, emit_trainable, origin_of

_GRAPHS = '; mode="reduce-overhead" runs it as a CUDA graph, without launches to wait for'


def deliver(
    captured: Capture,
    program: Program,
    selection: Selection,
    packed: Program,
    lowered: list[Lowered],
    proof: Proof,
    settings: Settings,
    report: Report,
    whole: tuple[Program, Selection] | None = None,
) -> tuple[PrunedModule, list[Lowered]]:
    """The result and what became of each weight. Raises CheckError where no form of it is right.

    `program` is what is left of the captured one, and `selection` what is left to apply to it. `whole` is the program
    with its dead channels, and its masks: it is emitted where taking them out did not pay.
    """
    report.kernels = native.status().detail
    theirs = {
        t.data_ptr()
        for t in pytree.tree_leaves((dict(captured.program.named_parameters()), dict(captured.program.named_buffers())))
    }
    any_packed = any(w.choice.layout != "dense" for w in lowered)
    forms = ["packed", "dense"] if any_packed else ["packed"]
    for form in [*forms, "whole"] if whole is not None else forms:
        is_packed = form == "packed" and any_packed
        if form == "whole":
            assert whole is not None
            final, lowered = fold(*whole), _all_dense(lowered, "the model without its dead channels was slower")
            report.keep_dead()
        else:
            final = fold(program, selection) if form == "dense" else packed
        own_storage(final, theirs)
        result, rows = _compiled(final, captured, proof, settings, report)
        wrong = [row for row in rows if not row.ok]
        if wrong and not is_packed:
            around = "; options={'compile': False} avoids the compiler" if settings.compile else ""
            raise refuse(wrong[0], f"Please report it with FXPRUNE_TRACE=<dir>{around}.")
        if wrong:
            report.notes.append(
                f"the packed result was wrong on the {wrong[0].call} ({wrong[0].error:.1e}) and was dropped"
            )
            lowered = _all_dense(lowered, "the packed model was wrong")
            continue
        is_smaller = bool(report.groups or report.dropped)
        if (is_packed or is_smaller) and settings.measure and settings.layout is None:
            report.timing = _time(captured, result, proof.example, settings)
            if report.timing.ratio < 1.0 and not is_packed:
                slower = f"the smaller model measured slower than the whole one ({report.timing.ratio:.2f}x)"
                report.notes.append(slower + (", so its dead channels stay" if whole is not None else ""))
                if whole is not None:
                    report.timing = None
                    continue
            elif report.timing.ratio < 1.0:
                why = f"the whole model measured slower packed ({report.timing.ratio:.2f}x)"
                with_graphs = _GRAPHS if settings.mode in (None, "default") and _on_gpu(proof.example) else ""
                report.notes.append(f"{why}, so it was emitted dense{with_graphs}")
                report.timing = None
                lowered = _all_dense(lowered, why)
                del result
                continue
        report.checks += rows
        return result, lowered
    raise AssertionError("unreachable: the dense program was returned or refused")


def deliver_trainable(
    model: nn.Module | ExportedProgram,
    captured: Capture,
    program: Program,
    selection: Selection,
    call: Call,
    dynamic_shapes: Any,
    proof: Proof,
    settings: Settings,
    report: Report,
) -> TrainableModule:
    """What is left of the model as an ordinary module, in eval mode. Raises CheckError where it is not right."""
    modes, notes = training_modes(model, captured, call.args, call.kwargs, dynamic_shapes)
    report.notes += notes
    report.compiled = "eager graph that trains; torch.compile it as any module"
    origin = origin_of(model, captured)
    result = emit_trainable(
        program, captured.entry, modes, origin, selection.mask, masked_matmul=settings.masked_matmul
    )
    rows = proof.hold(result, result)
    for row in rows:
        if not row.ok:
            raise refuse(row, "Please report it with FXPRUNE_TRACE=<dir>.")
    report.checks += rows
    return result


def _compiled(
    program: Program, captured: Capture, proof: Proof, settings: Settings, report: Report
) -> tuple[PrunedModule, list[CheckRow]]:
    arguments = settings.compile_arguments()
    result = emit(copy_program(program), captured.entry, arguments)
    report.compiled = (
        "eager graph (compile=False)"
        if arguments is None
        else "torch.compile"
        + (" with freezing" if settings.freezing else "")
        + (f", mode {settings.mode}" if settings.mode else "")
    )
    if arguments is not None:
        try:
            args, kwargs = proof.example.copy()
            result(*args, **kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            report.notes.append(f"torch.compile failed, so the graph is emitted eager: {reason}")
            report.compiled = "eager graph (torch.compile failed)"
            result = emit(copy_program(program), captured.entry, None)
    return result, proof.hold(result, program)


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
