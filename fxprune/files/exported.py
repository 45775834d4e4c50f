"""exported: a result -> an ExportedProgram, and how what is made of it is held against the result."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, ShapesCollection

from fxprune.capture.capture import Capture, apart, export_program
from fxprune.capture.entry import EntryCheck, TensorInput
from fxprune.capture.hooks import mask_hooks
from fxprune.check.calls import Call, dynamic_sizes, resized_call, sized_call
from fxprune.check.compare import CheckRow, compare, outputs
from fxprune.emit.pruned import Result
from fxprune.emit.trainable.parts import Part
from fxprune.errors import CaptureError
from fxprune.graph import compat
from fxprune.graph.environment import words_of
from fxprune.graph.program import Program, copy_program

from .export_call import structured


def exported(result: Result, call: Call) -> ExportedProgram:
    """What torch.export makes of a result at a call: what is dynamic in the result stays so, and its conditions too.

    Raises CaptureError, with torch's own error as its cause.
    """
    entry: EntryCheck = result.meta["entry"]
    call = _without_ones(result, call)
    args, kwargs = apart(*entry.bound(call.args, call.kwargs))
    shapes = ShapesCollection()
    for want, value in zip(entry.inputs, entry.flatten(args, kwargs), strict=True):
        if isinstance(want, TensorInput):
            dynamic = {dim: Dim.DYNAMIC for dim, size in enumerate(want.sizes) if isinstance(size, str)}
            if dynamic:
                shapes[value] = dynamic
    # What torch.export raises may be anything.
    try:
        program = export_program(_demanding(result, entry), args, kwargs, shapes)
    except Exception as error:
        raise CaptureError(
            "cannot export the result",
            why=f"torch.export says {words_of(error)}",
            do="Pass example_inputs= of other sizes; where that does not help, please report it.",
        ) from error
    compat.drop_guards(program, _loosened(entry))
    return program


def _without_ones(result: Result, call: Call) -> Call:
    """The call with two where a dynamic size is one, if the result takes that.

    Of a size that is one while it traces, torch.export makes ones of what some ops answer.
    """
    captured = _as_captured(result)
    ones = {symbol: 2 for symbol, size in dynamic_sizes(captured, call).items() if size == 1}
    larger = sized_call(captured, call, ones, "call") if ones else None
    return call if larger is None else larger


def _as_captured(result: Result) -> Capture:
    return Capture(copy_program(result), result.meta["entry"], {}, [])


def _loosened(entry: EntryCheck) -> set[str]:
    """Conditions of torch.export that the result was found right without, such as a batch that is not 1."""
    found = {code.partition(") or ")[0].removeprefix("(") for code, _ in entry.guards if ") or " in code}
    for index, path in enumerate(entry.paths):
        found = {code.replace(f"a[{index}]", f"L['{path}']") for code in found}
    return found


def _demanding(result: Result, entry: EntryCheck) -> Program:
    """The graph of a result in its mode, with its entry check at the beginning: export calls no module, but its graph.

    What the check asks of symbolic sizes becomes a condition of what is exported, and nothing else is left of it. Of
    conditions one of which must hold, tracing would take the one that does for all: they are left out.
    """
    entry = dataclasses.replace(entry, guards=tuple(guard for guard in entry.guards if " or " not in guard[0]))
    for part in result.modules():
        for hook in mask_hooks(part).values() if isinstance(part, Part) else ():
            hook(part, ())
    program = copy_program(result)
    program.train(result.training)

    def demand(*flat: Any) -> None:
        if not entry.takes(*structured(entry, flat)):
            raise AssertionError("unreachable: the call that is traced was accepted")

    inputs = program.graph.find_nodes(op="placeholder")
    with program.graph.inserting_after(inputs[-1] if inputs else None):
        program.graph.call_function(demand, tuple(inputs))
    return program


def calls_to_hold(result: Result, call: Call) -> list[Call]:
    """The call, and one of other sizes where the result takes any."""
    resized = resized_call(_as_captured(result), call)
    return [call] if resized is None else [call, resized]


def held(what: str, result: Result, calls: list[Call], run: Callable[..., Any]) -> Iterator[CheckRow]:
    """Comparisons of `run` with the result's own graph, not compiled, on calls."""
    entry: EntryCheck = result.meta["entry"]
    graph = copy_program(result)
    if result.training:
        # Batch-norms write to their statistics.
        graph = copy.deepcopy(graph).train()
    for call in calls:
        args, kwargs = entry.bound(call.args, call.kwargs)
        bound = Call(call.label, args, kwargs)
        with torch.no_grad():
            yield compare(what, call, outputs(graph, bound), outputs(run, bound))
