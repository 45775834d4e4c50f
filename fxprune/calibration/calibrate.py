"""calibrate: a plan and data -> a Selection whose masks and values keep what the model computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from tqdm import tqdm

from fxprune.calibration.solvers import METHODS
from fxprune.capture import admit
from fxprune.check.calls import Call
from fxprune.couple.couple import couple
from fxprune.couple.removal import removal
from fxprune.errors import InputError
from fxprune.graph.weights import uses
from fxprune.plan.patterns import Channels
from fxprune.plan.plan import Plan
from fxprune.select.mask import PackedMask
from fxprune.select.selection import Fit, Selection
from fxprune.shrink.drop.blocks import choose_blocks
from fxprune.shrink.drop.drop import without_blocks

from .arithmetic import plain
from .batches import capture_for, read_calls
from .fit import Outcome, fit_shared, fit_weight
from .padding import find_padding
from .progress import Saved, about
from .rebatch import cut
from .segments import Segment, plan_segments
from .stream import Fitted, stream
from .tasks import Asked, read_plan

# Bytes of activations that are held between two segments; the rest goes to files.
MEMORY = 4e9


def calibrate(
    model: nn.Module,
    plan: Plan | None,
    batches: Any,
    method: str = "refit",
    *,
    samples: int | None = None,
    dynamic_shapes: Any = None,
    checkpoint: str | Path | None = None,
    memory: float = MEMORY,
    progress: bool = True,
) -> Selection:
    """Prunes by `plan` and fits what stays to what the dense model computes on `batches`, which need no labels.

    `batches` is any iterable of inputs: tensors, tuples of arguments, dicts of keyword arguments. Positions that an
    `attention_mask` [b, s] among them leaves out do not count. `samples` takes just so many of them. Without a plan the
    masks that the model carries stay, and the weights are fitted.

    Layer by layer, each weight is fitted on what the layers before it, already pruned, let through, to what the dense
    model gave there; where its output goes into a residual sum, the sum is what is fitted. Biases are solved for as
    well. `method` is

    "magnitude"  masks by the plan's scores; biases and batch-norm statistics are set right
    "wanda"      masks by |weight| times the norm of its input
    "sparsegpt"  column by column, later ones make up for earlier ones
    "refit"      the masks of sparsegpt, then least squares on them
    "admm"       masks and weights found together: the most exact, and the wider the layers the longer it takes

    `memory` is how many bytes of activations are held between layers, the rest goes to files; with `checkpoint`, a
    file, an interrupted calibration goes on where it stopped. What could not be done as asked is in the selection's
    `fits` and `notes`, which the report of `transform` shows. The model is never changed. Raises PlanError, InputError,
    CaptureError or CheckError.
    """
    _refuse(plan, method, memory)
    admit.admit_model(model)
    if isinstance(model, ExportedProgram):
        raise InputError("cannot calibrate an ExportedProgram", do="Pass the model itself.")
    options = {"dynamic_shapes": dynamic_shapes, "checkpoint": checkpoint, "memory": memory, "progress": progress}
    return calibrate_calls(model, plan, read_calls(batches, samples), method, **options)


@plain()
def calibrate_calls(
    model: nn.Module,
    plan: Plan | None,
    calls: Sequence[Call],
    method: str = "refit",
    *,
    dynamic_shapes: Any = None,
    checkpoint: str | Path | None = None,
    memory: float = MEMORY,
    progress: bool = True,
) -> Selection:
    """`calibrate` on data that were read already, of arguments that are right."""
    captured = capture_for(model, calls, dynamic_shapes)
    data = cut(captured, calls)
    plan = plan if plan is not None else Plan([])
    dropped = choose_blocks(captured.program, plan, None)
    program = without_blocks(captured.program, dropped)
    coupling = couple(program) if any(isinstance(rule.sparsity, Channels) for rule in plan.rules) else None
    read = [use.x for places in uses(program).values() for use in places if use.kind in ("linear", "conv")]
    paddings = find_padding(program, data, read)
    asked = read_plan(captured, program, plan, coupling, method, data, paddings)
    if not asked.start.mask and not asked.start.keep:
        raise InputError(
            "cannot calibrate a model that is not pruned",
            where=type(model).__name__,
            why="the plan masks nothing and takes nothing out"
            if plan.rules
            else "there is no rule, and it has no mask",
            do='Give a plan such as Plan([Rule("encoder.*.weight", Unstructured(0.8))]).',
        )
    tensors = {n: t.detach() for n, t in (*program.named_parameters(), *program.named_buffers())}
    words = (method, program.code, *asked.words())
    digest = "" if checkpoint is None else about({**tensors, **asked.tensors()}, data, *words)
    saved = Saved(checkpoint, digest, tensors)
    for name, watched in asked.shared.items():
        if name not in saved.outcomes:
            saved.add({name: fit_shared(watched, asked.tasks[name], tensors, method)})

    def solve(entries: Sequence[Fitted]) -> dict[str, Tensor]:
        found = {e.layer.name: fit_weight(e, asked.tasks[e.layer.name], tensors, method) for e in entries}
        saved.add(found)
        return _values(found.values())

    def solved(segment: Segment) -> dict[str, Tensor] | None:
        names = [layer.name for layer in segment.layers]
        return _values(saved.outcomes[n] for n in names) if saved.outcomes.keys() >= set(names) else None

    segments = plan_segments(program, asked.layers.values())
    with tqdm(
        total=len(segments) * len(data), desc="calibrate", disable=None if progress else True, leave=False
    ) as bar:
        stream(
            program,
            segments,
            data,
            solve,
            values=_values(saved.outcomes[name] for name in asked.shared),
            removal=removal(coupling, asked.early) if coupling is not None else None,
            paddings=paddings,
            solved=solved,
            limit=memory,
            step=bar.update,
        )
    result = _selection(asked, saved.outcomes, tensors, dropped)
    result.notes = tuple(asked.notes)
    return result


def _refuse(plan: object, method: object, memory: float) -> None:
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(
            f"cannot use a {type(plan).__name__} as a plan",
            do='Write Plan([Rule("encoder.*.weight", Unstructured(0.8))]).',
        )
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}", do=f"Known: {', '.join(METHODS)}.")
    if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not memory >= 0:
        raise InputError(f"cannot use memory={memory!r}", why="it is a number of bytes, 0 or more")


def _values(outcomes: Iterable[Outcome]) -> dict[str, Tensor]:
    return {name: value for outcome in outcomes for name, value in outcome.values.items()}


def _selection(
    asked: Asked, outcomes: Mapping[str, Outcome], tensors: Mapping[str, Tensor], dropped: tuple[str, ...]
) -> Selection:
    """The outcomes, and what could not be fitted as the plan's own scores left it."""
    result = Selection(keep=dict(asked.start.keep), mask=dict(asked.start.mask), asked=dict(asked.start.asked))
    result.drop = dropped
    for name, outcome in outcomes.items():
        result.values.update(outcome.values)
        result.fits[name] = outcome.fit
        if outcome.keep is not None:
            result.mask[name] = PackedMask.pack(outcome.keep)
        task = asked.tasks[name]
        if outcome.units is not None and task.units is not None:
            result.keep[task.units.group] = outcome.units
        if outcome.staying is not None:
            # What leaves with a group is no zero of the weight's own.
            value, stays = tensors[name].clone(), outcome.staying.to(tensors[name].device)
            value.index_copy_(task.inputs, stays, outcome.values[name].index_select(task.inputs, stays))
            mask = result.mask.get(name)
            result.values[name] = value if mask is None else torch.where(mask.unpack().to(value.device), value, 0.0)
    for name, why in asked.without.items():
        result.fits[name] = Fit("magnitude", note=f"it was not fitted: {why}")
    return result
