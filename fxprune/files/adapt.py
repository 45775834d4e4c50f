"""adapt: a loaded result on a machine other than the one that it was made on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from fxprune.emit.pruned import PrunedModule, emit
from fxprune.emit.report import Report, WeightReport
from fxprune.errors import FxPruneError
from fxprune.graph.note import Note, some
from fxprune.graph.program import fetch, names_of_parameters
from fxprune.kernels import native
from fxprune.kernels.native import tiles
from fxprune.kernels.triton import cannot_run_on
from fxprune.lower.unpack import unpack
from fxprune.transform import transform

from .export_call import made_call

_OF_TILES = ("fxprune::tiles_linear", "fxprune::tiles_linear_split")


def adapted(result: PrunedModule, *, retune: bool, progress: bool) -> PrunedModule:
    """The result with layouts that this machine has kernels for; with `retune` all are chosen, and timed, anew.

    What is changed is told in its report.
    """
    lacking: dict[Node, str] = {node: why for node in result.graph.nodes if (why := lacks_kernel(result, node))}
    if not lacking and not retune:
        return result
    names = {node.name for node in lacking}
    why = ", ".join(dict.fromkeys(lacking.values()))
    told = f"it was saved with layouts that have no kernel here ({why})" if lacking else ""
    try:
        return _chosen_anew(result, told, progress)
    except FxPruneError as error:
        if not lacking:
            raise
        reason = str(error)
    program = unpack(result, lambda node: node.name in names)
    back = set(names_of_parameters(program)) - set(names_of_parameters(result))
    dense = emit(program, result.meta["entry"], result.meta["compile"])
    note = Note(f"{told}, and none could be chosen ({reason}), so that {some(sorted(back))} are dense", "fallback")
    report = dataclasses.replace(result.report, notes=[*result.report.notes, note])
    report.weights = [_dense(weight, why) if weight.name in back else weight for weight in report.weights]
    dense.meta = {**result.meta, "report": report}
    return dense


def lacks_kernel(result: PrunedModule, node: Node) -> str:
    """Why a packed op of a graph has no kernel on this machine; nothing if it has one, or is none."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "fxprune":
        return ""
    name = node.target._schema.name
    if name == "fxprune::packed_linear":
        first = node.args[1][0]  # pyright: ignore
        return cannot_run_on(fetch(result, str(first.target)).device)  # pyright: ignore
    state = native.status()
    if not state.available:
        return state.detail
    return "this CPU has no AMX, and no AVX-512 VBMI2 either" if name in _OF_TILES and not tiles.isa() else ""


def _chosen_anew(result: PrunedModule, told: str, progress: bool) -> PrunedModule:
    """What transform makes of the result's weights, zeros and all, here."""
    settings, entry = result.meta["settings"], result.meta["entry"]
    plain = unpack(result)
    model = emit(plain, entry, None)
    call = made_call(entry, result.meta["sizes"])
    options = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name not in ("mode", "layout") and getattr(settings, field.name) != getattr(type(settings), field.name)
    }
    made: Any = transform(model, None, call.args, call.kwargs, mode=settings.mode, options=options, progress=progress)
    old, new = result.report, made.report
    note = Note(f"layouts were chosen anew when it was loaded on this machine{f': {told}' if told else ''}", "info")
    kept = Report(**{field.name: getattr(old, field.name) for field in dataclasses.fields(old)})
    kept.weights, kept.timing, kept.kernels, kept.compiled = new.weights, new.timing, new.kernels, new.compiled
    kept.notes = [*old.notes, note, *new.notes]
    kept.checks = [*old.checks, *new.checks]
    made.meta |= {key: result.meta[key] for key in ("selection", "plan", "settings")}
    made.meta |= {"report": kept}
    return made


def _dense(weight: WeightReport, why: str) -> WeightReport:
    choice = weight.lowered.choice
    dense = dataclasses.replace(choice, layout="dense", why=why, refused={**choice.refused, choice.layout: why})
    return dataclasses.replace(weight, lowered=dataclasses.replace(weight.lowered, choice=dense))
