"""axes: an op's relation in einsum notation, `axes("* i, o i, +o? -> * o", "linear")`.

Operands stand in the order of the op's tensor arguments. One letter is one axis. A letter absent on the right is
contracted: the removed indices must be zero in some operand, else the axis freezes. `*` is any number of dimensions,
tied one by one from the right with broadcasting; `.` is a dimension whose positions matter to the op, which freezes,
and `.*` any number of those. `+` marks an operand that is added (a bias): the others are multiplied. `?` marks one that
may be absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxprune.couple.axis import Axis, Conflict, atoms

from .relation import Atoms, Dims, Here, Relation, add

Row = list[tuple[str, Axis]]


@dataclass(frozen=True)
class Operand:
    letters: tuple[str, ...]
    added: bool
    optional: bool


def axes(spec: str, *ops: str, weight: int | None = None, names: Sequence[str] = ()) -> None:
    """Declare ops by notation. `weight` is the operand that makes new axes; by default any but the first may.

    `names` are those of the tensor arguments, for an op that torch itself does not have.
    """
    left, right = spec.split("->")
    operands = [operand(text) for text in left.split(",")]
    result = tuple(right.split())
    for op in ops:
        of_op = list(names) or tensor_arguments(op)

        def tie(here: Here, out: Dims, of_op: list[str] = of_op, **arguments: Any) -> None:
            relate(here, operands, result, [arguments.get(name) for name in of_op[: len(operands)]], out, weight)

        def zero(here: Here, out: Dims, of_op: list[str] = of_op, **arguments: Any) -> Atoms:
            return zero_of(here, operands, result, [arguments.get(name) for name in of_op[: len(operands)]], out)

        add(op, Relation(tie, zero, None, spec))


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
    # The first operand is an activation, unless it is the one that is a parameter.
    alone = [dims for dims in given if dims is not None and dims.source] == given[:1]
    for index, (row, dims) in enumerate(zip(rows, given)):
        if dims is None or operands[index].added or len(dims) < 2:
            continue
        if index == 0 and not alone if weight is None else index != weight:
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
    """Where the output is zero; freezes what is contracted over indices that are not zero when removed.

    Raises Conflict, as `relate` does, for a tensor with another number of dimensions than its letters.
    """
    present = [(o, dims) for o, dims in zip(operands, given) if dims is not None]
    # For each operand, the atoms at which it is zero along each of its letters.
    zeros = [(o.added, {k: dims.zero & set(atoms(axis)) for k, axis in row_of(o.letters, dims)}) for o, dims in present]
    kept = {letter for letter, _ in row_of(result, out)}
    for o, dims in present:
        for letter, axis in row_of(o.letters, dims):
            if letter in kept or letter == ".":
                continue
            here.sums(axis, set().union(*(zero.get(letter, ()) for _, zero in zeros)))
    verdict: dict[Axis, bool] = {}
    for letter, axis in row_of(result, out):
        for atom in atoms(axis):
            product = any(atom in zero.get(letter, ()) for added, zero in zeros if not added)
            verdict[atom] = (
                verdict.get(atom, True)
                and product
                and all(atom in zero.get(letter, ()) for added, zero in zeros if added)
            )
    return {atom for atom, zero in verdict.items() if zero}


def tensor_arguments(op: str) -> list[str]:
    """Names of an ATen op's tensor arguments, in its first overload's order; none where this torch lacks the op."""
    packet = getattr(torch.ops.aten, op, None)
    if packet is None:
        return []
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
        raise Conflict(f"{len(dims)} dimensions where {len(letters)} were expected")
    return list(zip(letters, dims.axes))
