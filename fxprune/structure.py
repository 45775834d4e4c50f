"""structure: the structured half of a transform. Blocks drop, groups shrink, and whatever is not proved stays whole."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from fxprune.couple.couple import couple
from fxprune.couple.coupling import Coupling
from fxprune.couple.removal import Cuts, removal
from fxprune.graph.program import Program
from fxprune.passes.blocks import find_blocks
from fxprune.passes.dead import Dead, find_dead
from fxprune.passes.drop import Bypassing, drop_blocks
from fxprune.passes.shrink import shrink, slice_tensor
from fxprune.passes.zero_slices import may_be_dead

from .check import Call, CheckRow, compare, outputs, refuse, run_flat
from .mask import PackedMask
from .prove import Proof
from .report import Report
from .select import Selection


def drop_proved(program: Program, paths: Sequence[str], example: Call, report: Report) -> Program:
    """The program without these residual blocks, held against the program whose blocks hand on their input."""
    if not paths:
        return program
    blocks = find_blocks(program, paths)
    result = drop_blocks(program, blocks)
    row = compare(
        "dropped = bypassed", example, run_flat(Bypassing(program, blocks), example), outputs(result, example)
    )
    report.checks.append(row)
    if not row.ok:
        raise refuse(row, "Please report it with FXPRUNE_TRACE=<dir>; leave the Drop out meanwhile.")
    report.dropped = {block.path: block.parameters for block in blocks}
    return result


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """A program whose groups lost indices, the selection that is left to apply to it, and the check that it passed."""

    program: Program
    selection: Selection
    row: CheckRow | None = None


def shrink_or_keep(
    program: Program,
    coupling: Coupling | None,
    selection: Selection,
    proof: Proof,
    report: Report,
    align: int | None,
    literals: Collection[str] = (),
) -> tuple[Shrunk, Selection]:
    """What is left of a program without what the selection takes out, and with `align` without what it left dead.

    `coupling` is None where no group was asked to shrink. Whatever does not come out equal stays, and is reported.
    """
    found, asked, has_dead = Shrunk(program, selection), coupling is not None, may_be_dead(program, selection)
    if has_dead and align is None:
        why = "a batch-norm in training changes what is dead"
        report.notes.append(f"dead channels stay in a result that trains: {why}")
    if coupling is not None:
        found, selection = shrink_proved(program, coupling, selection, proof, report)
    if has_dead and align is not None:
        coupling = coupling or couple(program)
        found, selection = remove_dead_proved(program, coupling, selection, found, proof, report, align)
    if coupling is not None and (asked or selection.dead):
        report.tell_groups(program, coupling, selection, literals)
    return found, selection


def shrink_proved(
    program: Program, coupling: Coupling, selection: Selection, proof: Proof, report: Report
) -> tuple[Shrunk, Selection]:
    """The shrunk program, and the selection without the groups that did not come out equal to the zeroed model.

    Such groups are found by halving, keep all their indices, and are named in the report.
    """

    def attempt(names: list[str]) -> Shrunk | str:
        chosen = dataclasses.replace(selection, keep={name: selection.keep[name] for name in names})
        leaving = removal(coupling, chosen.keep)
        proof.expect(chosen, program, leaving)
        # Whatever goes wrong in here is a group that stays whole: that is what a transaction is for.
        try:
            result = Shrunk(shrink(program, coupling, chosen.keep), _shrunk_selection(chosen, leaving.kept))
            if not proof.enabled:
                return result
            row = proof.try_shrunk(result.program, result.selection)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        if row.ok:
            return dataclasses.replace(result, row=row)
        return f"it differs from the zeroed model by {row.error:.1e}"

    names = list(selection.keep)
    found = attempt(names)
    if isinstance(found, str):
        names = _right(names, attempt, found, report)
        found = attempt(names)
        if isinstance(found, str):
            report.notes.append(f"nothing was shrunk: {found}")
            names = []
            found = Shrunk(program, dataclasses.replace(selection, keep={}))
            proof.expect(found.selection, program)
    report.checks += [found.row] if found.row is not None else []
    kept = dataclasses.replace(selection, keep={name: selection.keep[name] for name in names})
    return found, kept


def remove_dead_proved(
    program: Program,
    coupling: Coupling,
    selection: Selection,
    before: Shrunk,
    proof: Proof,
    report: Report,
    align: int,
) -> tuple[Shrunk, Selection]:
    """The program without what masks left without effect either, and the selection that says so.

    `before` is what is left of `program` without that: it stays where nothing is dead, or nothing dead comes out equal.
    """
    leaving = removal(coupling, selection.keep)
    last = Dead()

    def attempt(names: list[str]) -> Shrunk | str:
        nonlocal last
        try:
            whole = first.keep.keys() - set(names)
            last = find_dead(program, coupling, selection, whole, align) if whole else first
            chosen = dataclasses.replace(selection, dead=last.keep)
            stand_ins = (last.constants, last.instead)
            shrunk = shrink(program, coupling, chosen.staying, *stand_ins)
            left = _shrunk_selection(_with_slices(chosen, last.instead), coupling.kept(chosen.staying))
            masks = {name: mask for name, mask in left.mask.items() if mask.kept() < mask.numel()}
            result = Shrunk(shrunk, dataclasses.replace(left, mask=masks))
            if not proof.enabled:
                return result
            wide = shrink(program, coupling, chosen.staying, *stand_ins, wide=True) if proof.wide else shrunk
            row = proof.try_shrunk(wide, result.selection, "without what is dead = pruned model")
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return dataclasses.replace(result, row=row) if row.ok else f"it differs by {row.error:.1e}"

    try:
        first = find_dead(program, coupling, selection, align=align)
    except Exception as error:
        report.notes.append(f"dead channels were not looked for: {type(error).__name__}: {error}")
        return before, selection
    names = list(first.keep)
    report.dead = first
    report.notes += first.notes
    if not names:
        return before, selection
    proof.expect(selection, program, leaving)
    found = attempt(names)
    if isinstance(found, str):
        names = _right(names, attempt, found, report)
        found = attempt(names) if names else "no group came out right"
    if isinstance(found, str):
        report.notes.append(f"nothing dead left: {found}")
        report.dead = dataclasses.replace(first, keep={}, constants={}, instead={}, routes=Counter())
        return before, selection
    report.dead = last
    report.checks += [found.row] if found.row is not None else []
    return found, dataclasses.replace(selection, dead=last.keep)


def _with_slices(selection: Selection, instead: Mapping[str, tuple[int, int, Tensor]]) -> Selection:
    """The selection with masks that keep the slices which were put into weights."""
    masks = dict(selection.mask)
    for name, (dim, index, _) in instead.items():
        if name in masks:
            keep = masks[name].unpack()
            keep.select(dim, index).fill_(True)
            masks[name] = PackedMask.pack(keep)
    return dataclasses.replace(selection, mask=masks)


def _right(names: list[str], attempt: Callable[[list[str]], Shrunk | str], why: str, report: Report) -> list[str]:
    """The groups that come out right together, found by halving."""
    if len(names) <= 1:
        report.notes += [f"{name} keeps all its indices: {why}" for name in names]
        return []
    half = len(names) // 2
    parts = []
    for part in (names[:half], names[half:]):
        found = attempt(part)
        parts.append(_right(part, attempt, found, report) if isinstance(found, str) else part)
    both = [*parts[0], *parts[1]]
    together = attempt(both) if all(parts) else None
    if isinstance(together, str):
        report.notes += [f"{n} keeps all its indices: right alone, but not with others: {together}" for n in parts[1]]
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
