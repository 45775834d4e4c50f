"""target: what a smaller model of the user's own class must hold and compute: the shrunk program and its oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fxprune.capture.capture import Capture
from fxprune.check.calls import Call
from fxprune.check.capture_checked import capture_checked
from fxprune.check.proof import Expected, Proof
from fxprune.couple.couple import couple
from fxprune.couple.removal import Cuts, removal
from fxprune.graph.note import Note
from fxprune.graph.program import Program, names_of_parameters, put_values
from fxprune.select.decide import check_values, choose_selection, couple_if_needed, existing_masks
from fxprune.select.selection import Selection
from fxprune.shrink.drop.blocks import find_branches, idle_modules
from fxprune.shrink.proved import Shrunk, drop_proved, shrink_proved

from .sizes import tensors_read

# Widths that masks left dead channels at, as in a result for inference.
_ALIGN = 8


@dataclasses.dataclass(frozen=True)
class Target:
    """The program before anything shrank and after, and what the smaller model must answer.

    tensors   name -> the tensor that takes its place, masked; parameters, buffers and tensors that are attributes
    changed   those of them that are new, or of another shape than before
    cuts      name -> [(dim, indices that stay)], for what shrinks
    expected  what the oracle answers to every call of the proof
    branches  the dropped modules that are branches of a sum, and no residual blocks
    idle      other modules with parameters whose ops all left with those
    """

    captured: Capture
    before: Program
    after: Program
    tensors: dict[str, Tensor]
    changed: list[str]
    cuts: Mapping[str, Cuts]
    expected: Expected
    notes: list[Note]
    branches: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


def find_targets(
    model: nn.Module, selection: Selection, example: Call, others: Sequence[Call], dynamic_shapes: Any
) -> list[Target]:
    """What the selection makes of the model, the smallest first: without dead channels, then with them.

    Nothing is computed once that the model's own code computes from its parameters, for that code runs again. Raises
    InputError, PlanError, CaptureError or CheckError, as `transform` does.
    """
    checked = capture_checked(model, example, dynamic_shapes, others, check=True, fold_masks=False)
    captured, proof = checked.captured, checked.proof
    assert proof is not None
    dropped = drop_proved(captured.program, selection.drop, example)
    branches = find_branches(captured.program, selection.drop)
    idle = idle_modules(captured.program, dropped.program, selection.drop) if branches else ()
    idle = tuple(path for path in idle if any(True for _ in model.get_submodule(path).parameters()))
    check_values(dropped.program, selection.values)
    before = put_values(dropped.program, selection.values)
    coupling = couple_if_needed(before, None, selection)
    chosen = choose_selection(captured, before, None, selection, coupling).selection
    # The program has the new values already, and what was zero stays so.
    chosen = dataclasses.replace(chosen, values={}, mask={**existing_masks(captured, before), **chosen.mask})
    found = []
    for align in (_ALIGN, None) if selection.dead else (None,):
        shrunk = shrink_proved(before, coupling, chosen, proof, align)
        # That dead channels stay is told by the result; here they leave with `selection.dead`, or with nothing.
        told = [note for note in shrunk.notes if note.level != "info" and not note.startswith("dead channels")]
        target = _target(captured, before, shrunk, proof, told)
        found.append(dataclasses.replace(target, branches=branches, idle=idle))
    return found


def _target(captured: Capture, before: Program, shrunk: Shrunk, proof: Proof, notes: list[Note]) -> Target:
    after, expected = shrunk.program, shrunk.expected
    canonical = names_of_parameters(after)
    reads, old = tensors_read(after), tensors_read(before)
    tensors = {name: shrunk.left.apply(canonical.get(name, name), tensor) for name, tensor in reads.items()}
    changed = [name for name, t in tensors.items() if name not in old or old[name].shape != t.shape]
    staying = shrunk.selection.staying
    kept: Mapping[str, Cuts] = {}
    if staying:
        kept = removal(shrunk.coupling or couple(before), staying).kept
    cuts = dict(kept)
    # What held the mask of a weight in the model's code is no longer in the graph, and shrinks with the weight.
    for weight, held in captured.holders.items():
        if held.dtype is not None and weight in cuts:
            cuts[held.name] = cuts[weight]
    expected = expected if expected is not None else proof.expect(shrunk.left, before)
    expected = dataclasses.replace(expected, unpacked=(after, shrunk.left))
    return Target(captured, before, after, tensors, changed, cuts, expected, notes)
