"""Coupling: the groups of axes that shrink together in one graph, what is frozen, and why."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tabulate import tabulate
from torch import Tensor
from torch.fx import Node

from fxprune.errors import PlanError

from .axis import Axis, atoms, explain
from .indices import kept_indices
from .rules import Dims, Relation, Value, tensors


class Member(NamedTuple):
    """One dimension of one parameter or buffer."""

    name: str
    dim: int

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]"


@dataclasses.dataclass(eq=False)
class Group:
    """An axis with every dimension that shrinks with it. `name` is its first member's, with the path to the part."""

    name: str
    axis: Axis
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """How many indices the axis has."""
        return self.axis.size.number

    @property
    def frozen(self) -> str:
        """Why the axis must not shrink; empty where it may."""
        return self.axis.frozen

    @property
    def mixed(self) -> str:
        """Why the axis shrinks only on request; empty where it may without."""
        return self.axis.mixed

    @property
    def free(self) -> bool:
        """Whether the axis may shrink without being asked for by unit="mixed"."""
        return not self.frozen and not self.mixed


@dataclasses.dataclass(frozen=True, eq=False)
class Ruled:
    """One node with its rule, its output's axes, and its arguments with axes in place of tensors.

    `summed` are the axes over which it sums.
    """

    rule: Relation
    out: Value
    arguments: dict[str, Any]
    summed: tuple[Axis, ...] = ()

    def carries(self, by_atom: Mapping[Axis, Any]) -> bool:
        """Whether one of these atoms is in its inputs or output."""
        out = self.out if isinstance(self.out, list) else [self.out]
        held = [*out, *tensors(self.arguments.values())]
        return any(atom in by_atom for dims in held for axis in dims.axes for atom in atoms(axis))


class Coupling:
    """The groups of one program, in the order of its parameters.

    It is about one graph: a pass that edits the graph ends its life. `values` holds the axes of every node's value,
    `calls` every node that has a rule.
    """

    def __init__(
        self,
        groups: list[Group],
        tensors: Mapping[str, Dims],
        values: Mapping[Node, Any],
        calls: Mapping[Node, Ruled],
        written: Mapping[str, list[Axis]],
        missing: Mapping[str, int],
    ) -> None:
        self.groups = groups
        self.tensors = tensors
        self.values = values
        self.ruled = calls
        self.missing = missing
        self._written = written
        self._written_by_atom: dict[Axis, list[Axis]] = {}
        self._by_axis = {group.axis: group for group in groups}
        self._by_name = {group.name: group for group in groups}

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Group:
        """The group of this name. Raises KeyError."""
        return self._by_name[name]

    def of(self, atom: Axis) -> Group:
        """The group of an atom that a parameter carries."""
        return self._by_axis[atom]

    def outputs(self, name: str) -> list[Axis]:
        """The axes that a weight makes: the output channels of the products that read it."""
        found: dict[int, Axis] = {}
        for axis in self._written.get(name, []):
            found.setdefault(id(axis.root()), axis)
        return list(found.values())

    def axis(self, name: str, dim: int) -> Axis:
        """The axis of one dimension of a parameter. Raises PlanError where there is none."""
        dims = self.tensors.get(name) if isinstance(name, str) else None
        if dims is None:
            raise PlanError(
                "no such parameter in the graph",
                where=f'"{name}"',
                why=f"it reads {len(self.tensors)} parameters and buffers, and none has this name",
                do=f"For example: {', '.join(list(self.tensors)[:3])}.",
            )
        if isinstance(dim, bool) or not isinstance(dim, numbers.Integral):
            raise PlanError(
                f"cannot use dimension {dim!r}",
                where=f'"{name}"',
                why=f"it is a {type(dim).__name__}, not a whole number",
                do=f"Give one from {-len(dims)} to {len(dims) - 1}.",
            )
        if not -len(dims) <= dim < len(dims):
            raise PlanError(
                f"no dimension {dim}",
                where=f'"{name}"',
                why=f"it has {len(dims)} dimensions",
                do=f"Give one from {-len(dims)} to {len(dims) - 1}.",
            )
        return dims[dim]

    def written_with(self, atom: Axis) -> list[Axis]:
        """The axes that some weight makes and that are built of this atom."""
        if not self._written_by_atom:
            for axes in self._written.values():
                for axis in axes:
                    for part in dict.fromkeys(atoms(axis)):
                        self._written_by_atom.setdefault(part, []).append(axis)
        return self._written_by_atom.get(atom, [])

    def multiple(self, atom: Axis, align: int) -> int:
        """How many indices of an atom make a multiple of `align` in every axis that a product writes."""
        result = 1
        for axis in self.written_with(atom):
            result = math.lcm(result, align // math.gcd(align, _width(axis, atom)))
        return result

    def kept(self, keep: Mapping[str, Tensor]) -> dict[str, list[tuple[int, Tensor]]]:
        """Group -> indices that stay, to tensor -> [(dim, indices that stay)] for every tensor that shrinks."""
        by_atom = self.atoms_of(keep)
        result: dict[str, list[tuple[int, Tensor]]] = {}
        for name, dims in self.tensors.items():
            for dim, axis in enumerate(dims.axes):
                if any(atom in by_atom for atom in atoms(axis)):
                    result.setdefault(name, []).append((dim, kept_indices(axis, by_atom)))
        return result

    def atoms_of(self, keep: Mapping[str, Tensor]) -> dict[Axis, Tensor]:
        """The same by atom, without groups that keep everything."""
        groups = ((self._by_name[name], indices) for name, indices in keep.items())
        return {group.axis: indices for group, indices in groups if len(indices) < group.size}

    def why(self, name: str, dim: int) -> str:
        """The ties that lead from a dimension of a parameter to what froze or mixed it, in words."""
        axis = self.axis(name, dim)
        reasons = [a.frozen or a.mixed for a in atoms(axis)]
        if not any(reasons):
            parts = [self.of(a).name for a in dict.fromkeys(atoms(axis))]
            return f"{name}[{dim}] may shrink: it is {', '.join(parts) or 'one index'}"
        steps = explain(axis, self._label)
        return "\n".join(steps or [f"{name}[{dim}]: {next(r for r in reasons if r)}"])

    def _label(self, axis: Axis) -> str:
        if not hasattr(self, "_labels"):
            self._labels: dict[int, str] = {}
            for node, value in self.values.items():
                for dims in value if isinstance(value, list) else [value] if isinstance(value, Dims) else []:
                    for dim, found in enumerate(dims.axes):
                        self._labels.setdefault(id(found), f"{node.name}[{dim}]")
            for name, dims in self.tensors.items():
                for dim, found in enumerate(dims.axes):
                    self._labels[id(found)] = f"{name}[{dim}]"
        return self._labels.get(id(axis), f"a part of {axis.size}")

    def __str__(self) -> str:
        rows = []
        for group in self.groups:
            shown = ", ".join(str(m) for m in group.members[:3])
            more = f" and {len(group.members) - 3} more" if len(group.members) > 3 else ""
            state = (
                f"frozen: {group.frozen}" if group.frozen else f"on request: {group.mixed}" if group.mixed else "free"
            )
            rows.append((group.name, group.size, len(group.members), state, shown + more))
        free = sum(group.free for group in self.groups)
        head = f"{len(self.groups)} groups: {free} free, {len(self.groups) - free} frozen or on request"
        if self.missing:
            ops = ", ".join(f"{op} ({count})" for op, count in self.missing.items())
            head += f"\nops without a rule: {ops}"
        headers = ("group", "size", "members", "may shrink", "which")
        return head + "\n" + tabulate(rows, headers=headers, disable_numparse=True)


def _width(axis: Axis, atom: Axis) -> int:
    """How many indices of the innermost concatenated part around `atom` belong to one index of it."""
    axis = axis.root()
    if axis is atom:
        return 1
    for part in axis.parts:
        if atom in atoms(part):
            inner = _width(part, atom)
            return inner if axis.kind == "concat" else inner * (axis.size.number // part.root().size.number)
    return 1
