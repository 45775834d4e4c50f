"""decide: from a captured program and a plan (or the pruning that is already there) to a Selection."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxprune.capture.capture import Capture
from fxprune.couple.couple import couple
from fxprune.couple.coupling import Coupling
from fxprune.errors import InputError
from fxprune.graph.note import Note, some
from fxprune.graph.program import Program, names_of_parameters
from fxprune.plan.binding import Binding
from fxprune.plan.patterns import Channels, Unstructured
from fxprune.plan.plan import Plan

from .candidates import candidates
from .elements import select
from .mask import PackedMask, chunks
from .selection import Selection
from .units import keep_channels

# A weight with fewer zeros than this, and no mask, was not pruned: an embedding's padding row is no pruning.
PRUNED_FROM = 0.01


def couple_if_needed(program: Program, plan: Plan | None, replay: Selection | None) -> Coupling | None:
    """The coupling of a program, where channels are asked for or replayed."""
    asked = plan is not None and any(isinstance(rule.sparsity, Channels) for rule in plan.rules)
    return couple(program) if asked or (replay is not None and replay.keep) else None


def names_asked_for(plan: Plan | None, replay: Selection | None) -> set[str]:
    """The parameters that a plan, or a selection, names in full for elements of them to go."""
    ruled = {rule.pattern for rule in plan.rules if rule.names_one} if plan is not None else set()
    return ruled | set(replay.mask if replay is not None else ())


@dataclasses.dataclass(frozen=True)
class Decision:
    """A selection, and what was met on the way to it."""

    selection: Selection
    notes: list[Note] = dataclasses.field(default_factory=list)


def choose_selection(
    capture: Capture,
    program: Program,
    plan: Plan | None = None,
    replay: Selection | None = None,
    coupling: Coupling | None = None,
) -> Decision:
    """The selection for a program: replayed (a copy), or by plan, or the masks and zeros that the model came with.

    `program` is the captured one, without the blocks that were dropped.
    """
    if replay is not None:
        _check_replay(program, replay, coupling)
        copied = {field: dict(getattr(replay, field)) for field in ("keep", "mask", "values", "asked", "fits")}
        return Decision(dataclasses.replace(replay, dead={}, **copied))
    names = names_of_parameters(program)
    known = candidates(program, coupling)
    weights = {name: program.get_parameter(name).detach() for name, c in known.items() if c.prunable}
    existing = _existing(capture, names, weights)
    aliases = {other: first for other, first in names.items() if other != first}
    plan = plan if plan is not None else Plan([])
    binding = plan.bind(known, aliases)
    notes = _passed_over(binding.skipped)
    notes += [Note(f"{name}: rule {later} replaces rule {earlier}") for name, earlier, later in binding.overridden]
    notes += [Note(f"{name}: excluded from rule {r} by {by!r}") for r, name, by in binding.excluded]
    notes += _counted(plan, binding, weights)
    selection = select(weights, existing, plan, binding, {name: c.inputs for name, c in known.items()})
    if coupling is not None:
        kept = keep_channels(coupling, {n: t.detach() for n, t in program.named_parameters()}, plan, binding)
        selection.keep = kept.keep
        selection.asked.update(kept.asked)
        notes += kept.notes
    return Decision(selection, notes)


def _passed_over(skipped: Iterable[tuple[int, str, str]]) -> list[Note]:
    """One note for each rule and reason, naming the parameters that a wildcard matched and could not use."""
    groups: dict[tuple[int, str], list[str]] = {}
    for rule, name, why in skipped:
        groups.setdefault((rule, why), []).append(name)
    return [
        Note(f"rule {rule} passed over {len(names)} parameters ({why}): {some(names)}")
        for (rule, why), names in groups.items()
    ]


def _counted(plan: Plan, binding: Binding, weights: Mapping[str, Tensor]) -> list[Note]:
    """Warnings of counts that may have been meant as percentages: an int is a number of elements."""
    notes = []
    for index, rule in enumerate(plan.rules):
        amount = getattr(rule.sparsity, "amount", None)
        if not isinstance(rule.sparsity, Unstructured) or not isinstance(amount, int) or not 0 < amount <= 100:
            continue
        pool = [weights[name].numel() for name in binding.names(index) if name in weights]
        size = sum(pool) if rule.scope == "global" else max(pool, default=0)
        if amount < 0.01 * size:
            said = f"rule {index} prunes {amount} elements of {size:,}, for an int counts elements"
            notes.append(Note(f"{said}: {amount}% is written {amount / 100:g}", "warning"))
    return notes


def _existing(capture: Capture, names: dict[str, str], weights: dict[str, Tensor]) -> dict[str, PackedMask | Tensor]:
    masks: dict[str, PackedMask | Tensor] = {}
    for name, mask in capture.existing.items():
        if names.get(name) in weights:
            masks[names[name]] = mask
    for name, weight in weights.items():
        if name not in masks and weight.numel():
            kept = int(torch.count_nonzero(weight))
            if kept <= (1 - PRUNED_FROM) * weight.numel():
                pieces = (piece != 0 for piece in chunks(weight))
                masks[name] = PackedMask.from_chunks(weight.shape, weight.device, pieces)
    return masks


def existing_masks(capture: Capture, program: Program) -> dict[str, PackedMask]:
    """The masks that a program came with, of parameters that no rule can bind too, such as biases."""
    names = names_of_parameters(program)
    return {names[name]: PackedMask.pack(mask) for name, mask in capture.existing.items() if name in names}


def check_values(program: Program, values: Mapping[str, Tensor]) -> None:
    """Raises InputError unless every value fits the parameter or buffer of its name, of any name of a tied one."""
    tensors = dict(program.named_parameters(remove_duplicate=False)) | dict(program.named_buffers())
    for name, value in values.items():
        _check_one(name, value, tensors.get(name), Tensor, "new value")
        where = f'"{name}" {list(value.shape)}'
        if value.dtype != tensors[name].dtype:
            raise _no_replay(where, f"its new value is {value.dtype}, and not {tensors[name].dtype}")
        if not bool(value.isfinite().all()):
            raise _no_replay(where, "its new value holds NaN or infinity")


def _check_one(name: str, found: Any, tensor: Tensor | None, kind: type, noun: str) -> None:
    if tensor is None:
        raise _no_replay(f'"{name}"', "the model has no parameter of this name")
    where = f'"{name}" {list(tensor.shape)}'
    if not isinstance(found, kind):
        raise _no_replay(where, f"its {noun} is a {type(found).__name__}, and not a {kind.__name__}")
    if tuple(found.shape) != tuple(tensor.shape):
        raise _no_replay(where, f"its {noun} has shape {list(found.shape)}")


def _check_replay(program: Program, replay: Selection, coupling: Coupling | None) -> None:
    parameters = {name: program.get_parameter(name) for name in names_of_parameters(program).values()}
    for name, mask in replay.mask.items():
        _check_one(name, mask, parameters.get(name), PackedMask, "mask")
    groups = {group.name: group for group in coupling or ()}
    for name, indices in replay.keep.items():
        if name not in groups:
            raise _no_replay(f'group "{name}"', "the selection was made for another graph: it has no such group")
        group = groups[name]
        if group.frozen:
            raise _no_replay(f'group "{name}"', f"it must not shrink: {group.frozen}")
        if wrong := _not_indices(indices, group.size):
            raise _no_replay(f'group "{name}" of size {group.size}', f"the indices that stay {wrong}")


def _not_indices(indices: object, size: int) -> str:
    """What is wrong with the indices that stay of an axis; empty for ascending int64 of at least one and below size."""
    if not isinstance(indices, Tensor):
        return f"are a {type(indices).__name__}, and not a tensor"
    if indices.dtype != torch.int64 or indices.dim() != 1:
        return f"are {indices.dtype} of shape {list(indices.shape)}, and not int64 in one dimension"
    if len(indices) == 0:
        return "are none"
    if bool((indices[1:] <= indices[:-1]).any()):
        return "do not ascend"
    low, high = int(indices[0]), int(indices[-1])
    return "" if low >= 0 and high < size else f"run from {low} to {high}"


def _no_replay(where: str, why: str) -> InputError:
    return InputError(
        "cannot replay the selection",
        where=where,
        why=why,
        do="Use it with the model and the example inputs that it was made for.",
    )
