"""proved: the structured half of a transform. Blocks drop, groups shrink, and whatever is not proved stays whole."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fxprune.check.calls import Call
from fxprune.check.compare import CheckRow, compare, outputs, refuse
from fxprune.check.oracle import run_flat
from fxprune.check.proof import Expected, Proof
from fxprune.couple.couple import couple
from fxprune.couple.coupling import Coupling
from fxprune.couple.removal import Cuts, removal
from fxprune.graph.environment import hidden
from fxprune.graph.note import Note
from fxprune.graph.program import Program
from fxprune.select.mask import PackedMask
from fxprune.select.selection import Selection
from fxprune.shrink.dead.dead import Dead, find_dead
from fxprune.shrink.dead.zero_slices import may_be_dead
from fxprune.shrink.drop.blocks import find_blocks
from fxprune.shrink.drop.drop import Bypassing, drop_blocks

from .shrink import shrink, slice_tensor


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A program without residual blocks: path -> parameters that left with it, and the check that it passed."""

    program: Program
    parameters: dict[str, int] = dataclasses.field(default_factory=dict)
    checks: list[CheckRow] = dataclasses.field(default_factory=list)


def drop_proved(program: Program, paths: Sequence[str], example: Call) -> Dropped:
    """The program without these residual blocks, held against the program whose blocks hand on their input."""
    if not paths:
        return Dropped(program)
    blocks = find_blocks(program, paths)
    result = drop_blocks(program, blocks)
    row = compare(
        "dropped = bypassed", example, run_flat(Bypassing(program, blocks), example), outputs(result, example)
    )
    if not row.ok:
        raise refuse(row, "Please report it with FXPRUNE_TRACE=<dir>; leave the Drop out meanwhile.")
    return Dropped(result, {block.path: block.parameters for block in blocks}, [row])


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """What is left of a program, and what of the decision was carried out.

    left       the masks and values that are left to apply to `program`
    selection  the decision without the groups that did not come out equal; `dead` has what left besides
    expected   what the oracle of `selection` answers; None where nothing is checked
    coupling   the groups of the program before, where any was asked to shrink or lost what was dead
    dead       what masks left without effect; None where it was not looked for
    """

    program: Program
    left: Selection
    selection: Selection
    expected: Expected | None
    coupling: Coupling | None = None
    dead: Dead | None = None
    notes: tuple[Note, ...] = ()
    checks: tuple[CheckRow, ...] = ()


def shrink_proved(
    program: Program, coupling: Coupling | None, selection: Selection, proof: Proof | None, align: int | None
) -> Shrunk:
    """What is left of a program without what the selection takes out, and with `align` without what it left dead.

    `coupling` is None where no group was asked to shrink. Whatever does not come out equal stays, and is told.
    """
    has_dead, notes = may_be_dead(program, selection), []
    if has_dead and align is None:
        why = "a batch-norm in training changes what is dead"
        notes.append(Note(f"dead channels stay in a result that trains: {why}", "missed"))
    if coupling is None:
        found = Shrunk(program, selection, selection, proof and proof.expect(selection, program))
    else:
        found = _shrink_asked(program, coupling, selection, proof)
    found = dataclasses.replace(found, notes=(*notes, *found.notes))
    if has_dead and align is not None:
        found = _remove_dead(program, coupling or couple(program), found, proof, align)
    return found


@dataclasses.dataclass(frozen=True)
class _Tried:
    """A program whose groups lost indices, the selection that is left to apply to it, and the check that it passed."""

    program: Program
    left: Selection
    checks: tuple[CheckRow, ...] = ()


def _shrink_asked(program: Program, coupling: Coupling, selection: Selection, proof: Proof | None) -> Shrunk:
    """The shrunk program, and the selection without the groups that did not come out equal to the zeroed model.

    Such groups are found by halving, keep all their indices, and are named in notes.
    """
    expected: Expected | None = None

    def attempt(names: list[str]) -> _Tried | str:
        nonlocal expected
        chosen = _only(selection, names)
        leaving = removal(coupling, chosen.keep)
        expected = proof and proof.expect(chosen, program, leaving)
        # Whatever goes wrong in here is a group that stays whole: that is what a transaction is for.
        try:
            tried = _Tried(shrink(program, coupling, chosen.keep), _shrunk_selection(chosen, leaving.kept))
            if expected is None:
                return tried
            row = expected.shrunk(tried.program, tried.left)
        except Exception as error:
            return hidden(error)
        return dataclasses.replace(tried, checks=(row,)) if row.ok else f"it differs from the zeroed model by {row.off}"

    names, notes = list(selection.keep), []
    found = attempt(names)
    if isinstance(found, str):
        names = _right(names, attempt, found, notes)
        found = attempt(names)
    if isinstance(found, str):
        notes.append(Note(f"nothing was shrunk: {found}", "missed"))
        names, found = [], _Tried(program, _only(selection, []))
        expected = proof and proof.expect(found.left, program)
    kept = _only(selection, names)
    return Shrunk(found.program, found.left, kept, expected, coupling, None, tuple(notes), found.checks)


def _remove_dead(program: Program, coupling: Coupling, before: Shrunk, proof: Proof | None, align: int) -> Shrunk:
    """The program without what masks left without effect either, and the selection that says so.

    `before` is what is left of `program` without that: it stays where nothing is dead, or nothing dead comes out equal.
    """
    selection, notes = before.selection, list(before.notes)
    leaving = removal(coupling, selection.keep)
    try:
        first = last = find_dead(program, coupling, selection, align=align)
    except Exception as error:
        notes.append(Note(f"dead channels were not looked for: {hidden(error)}", "missed"))
        return dataclasses.replace(before, notes=tuple(notes))
    names = list(first.keep)
    notes += first.notes
    if not names:
        return dataclasses.replace(before, dead=first, notes=tuple(notes))
    expected = proof and proof.expect(selection, program, leaving)

    def attempt(names: list[str]) -> _Tried | str:
        nonlocal last
        try:
            whole = first.keep.keys() - set(names)
            last = find_dead(program, coupling, selection, whole, align) if whole else first
            chosen = dataclasses.replace(selection, dead=last.keep)
            stand_ins = (last.constants, last.instead)
            shrunk = shrink(program, coupling, chosen.staying, *stand_ins)
            left = _shrunk_selection(_with_slices(chosen, last.instead), coupling.kept(chosen.staying))
            masks = {name: mask for name, mask in left.mask.items() if mask.kept() < mask.numel()}
            tried = _Tried(shrunk, dataclasses.replace(left, mask=masks))
            if expected is None:
                return tried
            wide = shrink(program, coupling, chosen.staying, *stand_ins, wide=True) if expected.is_wide else shrunk
            row = expected.shrunk(wide, tried.left, "without what is dead = pruned model")
        except Exception as error:
            return hidden(error)
        return dataclasses.replace(tried, checks=(row,)) if row.ok else f"it differs by {row.off}"

    found = attempt(names)
    if isinstance(found, str):
        names = _right(names, attempt, found, notes)
        found = attempt(names) if names else "no group came out right"
    if isinstance(found, str):
        notes.append(Note(f"nothing dead left: {found}", "missed"))
        nothing = dataclasses.replace(first, keep={}, constants={}, instead={}, routes=Counter())
        return dataclasses.replace(before, dead=nothing, notes=tuple(notes))
    checks = (*before.checks, *found.checks)
    without = dataclasses.replace(selection, dead=last.keep)
    return Shrunk(found.program, found.left, without, expected, coupling, last, tuple(notes), checks)


def _only(selection: Selection, names: Sequence[str]) -> Selection:
    return dataclasses.replace(selection, keep={name: selection.keep[name] for name in names})


def _with_slices(selection: Selection, instead: Mapping[str, tuple[int, int, Tensor]]) -> Selection:
    """The selection with masks that keep the slices which were put into weights."""
    masks = dict(selection.mask)
    for name, (dim, index, _) in instead.items():
        if name in masks:
            keep = masks[name].unpack()
            keep.select(dim, index).fill_(True)
            masks[name] = PackedMask.pack(keep)
    return dataclasses.replace(selection, mask=masks)


def _right(names: list[str], attempt: Callable[[list[str]], _Tried | str], why: str, notes: list[Note]) -> list[str]:
    """The groups that come out right together, found by halving; the others are added to the notes."""
    if len(names) <= 1:
        notes += [Note(f"{name} keeps all its indices: {why}", "missed") for name in names]
        return []
    half = len(names) // 2
    parts = []
    for part in (names[:half], names[half:]):
        found = attempt(part)
        parts.append(_right(part, attempt, found, notes) if isinstance(found, str) else part)
    both = [*parts[0], *parts[1]]
    together = attempt(both) if all(parts) else None
    if isinstance(together, str):
        why = f"right alone, but not with others: {together}"
        notes += [Note(f"{name} keeps all its indices: {why}", "missed") for name in parts[1]]
        return parts[0]
    return both


def _shrunk_selection(selection: Selection, kept: Mapping[str, Cuts]) -> Selection:
    """The masks and values of what is left."""

    def cut(name: str, tensor: Tensor) -> Tensor:
        return slice_tensor(tensor, kept.get(name, []))

    masks = {
        name: PackedMask.pack(cut(name, mask.unpack())) if name in kept else mask
        for name, mask in selection.mask.items()
    }
    values = {name: cut(name, value) for name, value in selection.values.items()}
    return dataclasses.replace(selection, keep={}, dead={}, mask=masks, values=values)
