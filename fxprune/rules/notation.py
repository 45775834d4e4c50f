"""axes: an op's relation in einsum notation, `axes("* i, o i, +o? -> * o", "linear")`.

Operands stand in the order of the op's tensor arguments. One letter is one axis. A letter absent on the right is
contracted: the removed indices must be zero in some operand, else the axis freezes. `*` is any number of dimensions,
tied one by one from the right with broadcasting; `.` is a dimension whose positions matter to the op, which freezes,
and `.*` any number of those. `+` marks an operand that is added (a bias): the others are multiplied. `?` marks one that
may be absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..axis import Axis, atoms
from .relation import Atoms, Dims, Here, Relation, Resizing, add

Row = list[tuple[str, Axis]]


@dataclass(frozen=True)
class Operand:
    letters: tuple[str, ...]
    added: bool
    optional: bool


def axes(spec: str, *ops: str, weight: int | None = None, resize: Resizing | None = None) -> None:
    """Declare ops by notation. `weight` is the operand that makes new axes; by default any but the first may."""
    left, right = spec.split("->")
    operands = [operand(text) for text in left.split(",")]
    result = tuple(right.split())
    for op in ops:
        names = tensor_arguments(op)

        def tie(here: Here, out: Dims, names: list[str] = names, **arguments: Any) -> None:
            relate(here, operands, result, [arguments.get(name) for name in names[: len(operands)]], out, weight)

        def zero(here: Here, out: Dims, names: list[str] = names, **arguments: Any) -> Atoms:
            return zero_of(here, operands, result, [arguments.get(name) for name in names[: len(operands)]], out)

        add(op, Relation(tie, zero, resize, spec))


def relate(
    here: Here,
    operands: list[Operand],
    result: tuple[str, ...],
    given: list[Dims | None],
    out: Dims,
    weight: int | None = None,
) -> None:
    """Tie equal letters, freeze dots, and record which operand makes which axis of the output."""
    seen: dict[str, Axis] = {}
    for letter, axis in row_of(result, out):
        if letter == ".":
            here.freeze(axis, "positions along it matter")
        else:
            seen[letter] = axis
    rows = [row_of(operand.letters, dims) if dims is not None else [] for operand, dims in zip(operands, given)]
    for row in rows:
        for letter, axis in row:
            if letter == ".":
                here.freeze(axis, "positions along it matter")
            else:
                here.tie(seen.setdefault(letter, axis), axis)
    for index, (row, dims) in enumerate(zip(rows, given)):
        if (index == 0 if weight is None else index != weight) or dims is None or operands[index].added or len(dims) < 2:
            continue
        others = {
            letter
            for other, found in enumerate(rows)
            if other != index and not operands[other].added
            for letter, _ in found
        }
        for letter, axis in row:
            if letter in result and letter not in others and letter != ".":
                here.writes(dims, axis)


def zero_of(here: Here, operands: list[Operand], result: tuple[str, ...], given: list[Dims | None], out: Dims) -> Atoms:
    """Where the output is zero; freezes what is contracted over indices that are not zero when removed."""
    present = [(o, dims, row_of(o.letters, dims)) for o, dims in zip(operands, given) if dims is not None]
    kept = {letter for letter, _ in row_of(result, out)}
    for _, _, row in present:
        for letter, axis in row:
            if letter in kept or letter == ".":
                continue
            holders = [other for _, other, found in present if letter in {name for name, _ in found}]
            for atom in atoms(axis):
                if not atom.frozen and not any(atom in holder.zero for holder in holders):
                    here.freeze(atom, "summed over where its removed indices are not zero")
    verdict: dict[Axis, bool] = {}
    for letter, axis in row_of(result, out):
        for atom in atoms(axis):
            factors = [d for o, d, row in present if not o.added and letter in {name for name, _ in row}]
            zero = any(atom in dims.zero for dims in factors)
            zero = zero and all(atom in dims.zero for o, dims, _ in present if o.added)
            verdict[atom] = verdict.get(atom, True) and zero
    return {atom for atom, zero in verdict.items() if zero}


def tensor_arguments(op: str) -> list[str]:
    """Names of an ATen op's tensor arguments, in the order of its first overload's schema."""
    packet = getattr(torch.ops.aten, op)
    schema = getattr(packet, packet.overloads()[0])._schema
    return [a.name for a in schema.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")]


def operand(text: str) -> Operand:
    text = text.strip()
    added, optional = text.startswith("+"), text.endswith("?")
    return Operand(tuple(text.strip("+?").split()), added, optional)


def row_of(letters: tuple[str, ...], dims: Dims) -> Row:
    """Letters beside axes; dimensions under `*` are numbered from the right, those under `.*` are dots."""
    for star, name in (("*", "*"), (".*", ".")):
        if star in letters:
            at = letters.index(star)
            count = len(dims) - len(letters) + 1
            many = [f"*{count - i}" if name == "*" else "." for i in range(count)]
            letters = (*letters[:at], *many, *letters[at + 1 :])
    if len(letters) != len(dims):
        raise ValueError(f"{len(dims)} dimensions for {' '.join(letters)}")
    return list(zip(letters, dims.axes))
