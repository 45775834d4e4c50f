"""Relation: how one ATen op relates the axes of its tensors. One record an op, with three answers.

tie     which axes are the same axis
zero    where the output is zero once the removed indices of every parameter are zero
resize  which literal arguments follow an axis that shrinks

Most ops are said in notation (`axes`) or by family (`pointwise`, `shape`); odd ones are short functions. Arguments
come by their schema names, with `Dims` in place of tensors and plain values (or fx nodes of sizes) for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fxprune.couple.axis import ONE, Axis, Size, atoms, divide, freeze, mix, tie
from fxprune.couple.indices import kept_indices, shrunk_size

Atoms = set[Axis]


@dataclass(eq=False)
class Dims:
    """The axes of one tensor value. `source` is the parameter that it is, as it stands or transposed.

    `zero` holds the atoms at whose removed indices the tensor is zero; couple fills it in when all ties are made.
    """

    axes: tuple[Axis, ...]
    source: str = ""
    zero: Atoms = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.axes)

    def __getitem__(self, dim: int) -> Axis:
        return self.axes[dim]

    def atoms(self) -> Atoms:
        """Every atom that some dimension is built of."""
        return {atom for axis in self.axes for atom in atoms(axis)}


Value = Dims | list[Dims]


class Here:
    """The node that a rule speaks of: ties and marks made through it remember the place."""

    def __init__(self, name: str, op: str, written: dict[str, list[Axis]]) -> None:
        self.name, self.op = name, op
        self._written = written
        self.produced: list[Axis] = []
        self.producer = ""
        self.measured: list[Axis] = []
        self.summed: list[Axis] = []

    def tie(self, a: Axis, b: Axis) -> None:
        """The two axes keep the same indices."""
        tie(a, b, self.name)

    def tie_rows(self, xs: Iterable[Axis], ys: Iterable[Axis], besides: Collection[int] = ()) -> None:
        """Two rows of axes are tied one by one, but for those at the places `besides`."""
        for place, (x, y) in enumerate(zip(xs, ys)):
            if place not in besides:
                self.tie(x, y)

    def tie_or_freeze(self, xs: Iterable[Axis], ys: Iterable[Axis], frozen: Collection[int], why: str) -> None:
        """Two rows of axes are tied one by one; at the places `frozen` both freeze instead, because `why`."""
        for place, (x, y) in enumerate(zip(xs, ys)):
            if place in frozen:
                self.freeze_each((x, y), why)
            else:
                self.tie(x, y)

    def freeze(self, axis: Axis, why: str) -> None:
        """The axis keeps all its indices, because `why`."""
        freeze(axis, f"{why} ({self.op} at {self.name})")

    def freeze_each(self, axes: Iterable[Axis], why: str) -> None:
        """Each of the axes keeps all its indices, because `why`."""
        for axis in axes:
            self.freeze(axis, why)

    def mix(self, axis: Axis, why: str) -> None:
        """The axis loses indices only on request, because `why`."""
        mix(axis, f"{why} ({self.op} at {self.name})")

    def sums(self, axis: Axis, zero: Atoms, why: str = "summed over where its removed indices are not zero") -> None:
        """A sum runs over `axis`, whose terms at removed indices are zero at the atoms in `zero`: the others freeze."""
        self.summed.append(axis)
        for atom in atoms(axis):
            if not atom.frozen and atom not in zero:
                self.freeze(atom, why)

    def freeze_all(self, values: Iterable[Value | None], why: str) -> None:
        """Freeze every axis of every tensor."""
        for value in values:
            for dims in value if isinstance(value, list) else [value] if value is not None else []:
                self.freeze_each(dims.axes, why)

    def writes(self, weight: Dims, axis: Axis, *, channelwise: bool = False) -> None:
        """`weight` makes the indices of `axis`: it is an output dimension of a product with this weight.

        `channelwise`: each index comes of the same one of the input, so that this is no further layer of its channels.
        """
        if not channelwise:
            self.produced.append(axis)
            # A layer that is called twice, or has several weights, is one.
            self.producer = self.producer or weight.source or self.name
        if weight.source:
            self._written.setdefault(weight.source, []).append(axis)

    def measures(self, axis: Axis) -> None:
        """A statistic runs over `axis`: exact without the removed indices, and yet a norm where others write to it."""
        self.measured.append(axis)


class Resize:
    """What `resize` may ask: sizes and kept indices of axes, given the indices that each atom keeps."""

    def __init__(self, keep: Mapping[Axis, torch.Tensor], scale: Callable[[Node, int, int], Node]) -> None:
        self.keep = keep
        self._scale = scale

    def number(self, axis: Axis) -> int:
        """The new size of an axis without symbols."""
        return shrunk_size(axis, self.keep).number

    def old(self, axis: Axis) -> int:
        """The size that an axis had, without its symbols."""
        return axis.root().size.number

    def changed(self, axis: Axis) -> bool:
        """Whether the axis loses indices."""
        return any(atom in self.keep for atom in atoms(axis))

    def literal(self, axis: Axis, value: Any) -> Any:
        """What stands for `value`, the old size of `axis`, as an argument: -1 infers, a symbolic size is scaled."""
        if not self.changed(axis) or (isinstance(value, int) and value == -1):
            return value
        return self.number(axis) if isinstance(value, int) else self._scale(value, self.number(axis), self.old(axis))

    def copies(self, out: Axis, x: Axis, value: Any) -> Any:
        """What stands for `value`, how many copies of `x` make `out`."""
        old, new = self.old(out) // self.old(x), self.number(out) // self.number(x)
        return value if old == new else new if isinstance(value, int) else self._scale(value, new, old)

    def indices(self, axis: Axis) -> torch.Tensor:
        """The indices of the axis that stay, ascending."""
        return kept_indices(axis, self.keep)


Tie = Callable[..., None]
Zero = Callable[..., Atoms]
Resizing = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Relation:
    """The rule of one op. `says` is the rule in words or notation; `resize` is None where no argument is a size."""

    tie: Tie
    zero: Zero
    resize: Resizing | None = None
    says: str = ""


# ATen packet name ("conv2d") -> its rule, for all overloads and in-place forms.
RULES: dict[str, Relation] = {}


def relation(*ops: str, zero: Zero | None = None, resize: Resizing | None = None) -> Callable[[Tie], Tie]:
    """Register a short function as the rule of these ops."""

    def register(function: Tie) -> Tie:
        says = (function.__doc__ or "").strip().splitlines()[0] if function.__doc__ else ""
        rule = Relation(function, zero or nowhere, resize, says)
        for op in ops:
            add(op, rule)
        return function

    return register


def add(op: str, rule: Relation) -> None:
    """One op, one rule."""
    if op in RULES:
        raise ValueError(f"two rules for {op}")
    RULES[op] = rule


def packet_name(target: Any) -> str:
    """`aten.add_.Tensor` -> "add": an in-place op relates axes as its pure form does."""
    name = target._schema.name
    namespace, _, packet = name.partition("::")
    packet = packet.removesuffix("_") if not packet.endswith("__") else packet
    return packet if namespace == "aten" else f"{namespace}::{packet}"


def tensors(arguments: Iterable[Any]) -> list[Dims]:
    """The tensors among arguments, those in lists too, in order."""
    found: list[Dims] = []
    for value in arguments:
        if isinstance(value, Dims):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Dims)]
    return found


def is_wide(axis: Axis) -> bool:
    """Whether the axis has more than one index, so that nothing is broadcast along it."""
    return axis.root().size != ONE


def dimension(dim: Any, dims: Dims | int) -> int:
    """A dimension argument as a number from 0 up."""
    count = dims if isinstance(dims, int) else len(dims)
    return int(dim) % count if count else 0


def dimension_list(dim: Any, dims: Dims) -> list[int]:
    """Dimension arguments as numbers from 0 up; none given means all."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(len(dims)))
    return [dimension(d, dims) for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def split_groups(axis: Axis, groups: int, where: str) -> tuple[Axis, Axis]:
    """A channel axis as (groups, channels in a group); either may have one index. Raises Conflict."""
    size = axis.root().size
    if groups == 1:
        return Axis(ONE), axis.root()
    if size == Size(groups):
        return axis.root(), Axis(ONE)
    major, minor = divide(axis, [Size(groups), Size(size.number // groups)], where)
    return major, minor


def nowhere(here: Here, out: Value, **_: Any) -> Atoms:
    """Removed parameters leave nothing zero in the output."""
    return set()


def carried(here: Here, out: Value, **arguments: Any) -> Atoms:
    """The output is zero where all the tensors that carry an atom are: moving values around makes no others."""
    found = tensors(arguments.values())
    zero, other = set(), set()
    for dims in found:
        zero |= dims.zero
        other |= dims.atoms() - dims.zero
    return zero - other


def of_self(here: Here, out: Dims, self: Dims, **_: Any) -> Atoms:
    """The output is zero where `self` is."""
    return self.zero & out.atoms()


def of_first(here: Here, out: Value, **arguments: Any) -> Atoms:
    """The output, or each output, is zero where the first tensor is, which broadcasts to it."""
    first = tensors(arguments.values())[:1]
    found = [by_dimension(dims, first, every=True) for dims in (out if isinstance(out, list) else [out])]
    return set.intersection(*found) if found else set()


def by_dimension(out: Dims, operands: Sequence[Dims], every: bool) -> Atoms:
    """Atoms zero in a broadcast combination: in every dimension of theirs, every operand is zero, or any is.

    Dimensions line up from the right. An operand that has the atom in another dimension is not zero along this one.
    """
    combine = all if every else any
    verdict: dict[Axis, bool] = {}
    for back, axis in enumerate(reversed(out.axes), 1):
        found = [set(atoms(x[-back])) & x.zero if back <= len(x) else set() for x in operands]
        for atom in atoms(axis):
            verdict[atom] = verdict.get(atom, True) and combine(atom in zero for zero in found)
    return {atom for atom, zero in verdict.items() if zero}


def tie_broadcast(here: Here, out: Dims, operands: Iterable[Dims]) -> None:
    """Tie operands to an output that they broadcast to: dimensions line up from the right."""
    for operand in operands:
        here.tie_rows(reversed(operand.axes), reversed(out.axes))
