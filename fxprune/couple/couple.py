"""couple: Program -> Coupling. Which dimensions of which parameters keep the same indices, what is frozen, and why.

The rule of every node ties the axes of its tensors, in graph order; a second walk follows zeros, so that an axis is
kept whole where taking it away would not be the same as writing zeros. Both are linear in the size of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from fxprune.graph.memory import MAY_COPY, Memory, written
from fxprune.graph.program import Program, arguments, fetch_any, in_caches, names_of_parameters

from .axis import Axis, Conflict, Size, atoms, freeze
from .coupling import Coupling, Group, Member, Ruled
from .rules import RULES, Dims, Here, Value, packet_name, tensors


def couple(program: Program) -> Coupling:
    """The groups of axes of a program that shrink together. The program is only read."""
    walk = _Walk(program)
    for node in program.graph.nodes:
        walk.visit(node)
    walk.follow_zeros()
    return walk.coupling()


class _Walk:
    """One pass over the graph, and what it knows so far."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[Node, Any] = {}
        self.tensors: dict[int, Dims] = {}
        self.names: dict[str, Dims] = {}
        self.written: dict[str, list[Axis]] = {}
        self.ruled: list[tuple[Node, Here, Any, Value, dict[str, Any]]] = []
        self.missing: dict[str, int] = {}
        self._first_name = names_of_parameters(program)
        self._memory = Memory(program.graph)

    def visit(self, node: Node) -> None:
        """Give the node's value its axes and tie them."""
        if node.op == "get_attr":
            self._fetch(node)
        elif node.op == "placeholder":
            self.values[node] = _dims(node.meta.get("val"))
            _freeze_all([self.values[node]], f'graph input "{node.name}"')
        elif node.op == "output":
            cached = in_caches(self.program)
            for read in node.all_input_nodes:
                which = f"in a {cached[read]}, which use_cache=False leaves out" if read in cached else f'"{read.name}"'
                _freeze_all([self.values.get(read)], f"graph output {which}")
        elif node.target is operator.getitem and isinstance(self.values.get(_node(node.args[0])), list):
            self.values[node] = self.values[_node(node.args[0])][int(str(node.args[1]))]
        else:
            self._call(node)

    def _fetch(self, node: Node) -> None:
        value = fetch_any(self.program, str(node.target))
        if not isinstance(value, Tensor):
            return
        dims = self.tensors.get(id(value))
        if dims is None:
            dims = Dims(tuple(Axis(int(size)) for size in value.shape))
            dims.source = self._first_name.get(str(node.target), "")
            self.tensors[id(value)] = dims
        # A tied parameter goes by its first name, also where the graph reads it by another.
        self.names[dims.source or str(node.target)] = dims
        self.names[str(node.target)] = dims
        self.values[node] = dims

    def _read(self, value: Any) -> Any:
        """An argument with axes in place of tensors."""
        if isinstance(value, Node):
            known = self.values.get(value)
            return value if known is None else known
        return [self._read(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _call(self, node: Node) -> None:
        out = _dims(node.meta.get("val"))
        self.values[node] = out
        given = {name: self._read(value) for name, value in arguments(node).items()}
        held = tensors(given.values())
        if out is None and not held:
            return
        rule = RULES.get(packet_name(node.target)) if isinstance(node.target, torch._ops.OpOverload) else None
        if rule is None or out is None or "out" in given:
            if out is not None or written(node):
                name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.name
                self.missing[name] = self.missing.get(name, 0) + 1
                _freeze_all([out, *held], f"no rule for {name} ({node.name})")
            return
        here = Here(node.name, packet_name(node.target), self.written)
        try:
            rule.tie(here, out, **given)
        except Conflict as conflict:
            here.freeze_all([out, *held], str(conflict))
        if held and all(dims.source for dims in held) and not here.produced:
            # A piece of a weight makes channels for it, too.
            for dims in _flat([out]):
                dims.source = dims.source or held[0].source
        self.ruled.append((node, here, rule, out, given))

    def follow_zeros(self) -> None:
        """Where each value is zero when its removed indices are zero in every parameter; freezes what leaks."""
        for name, dims in self.names.items():
            if fetch_any(self.program, name).is_floating_point():
                dims.zero = dims.atoms()
        for node, here, rule, out, given in self.ruled:
            try:
                zero = rule.zero(here, out, **given)
            except Conflict as conflict:
                here.freeze_all([out, *tensors(given.values())], str(conflict))
                zero = set()
            for dims in out if isinstance(out, list) else [out]:
                dims.zero = zero & dims.atoms()
            for target in written(node):
                self._spoil(node, target, out)

    def _spoil(self, node: Node, target: Node, out: Value) -> None:
        """After a write in place, every earlier value over that memory is zero only where the result is."""
        results = list(_flat([out]))
        zero, seen = set().union(*(d.zero for d in results)), set().union(*(d.atoms() for d in results))
        place = self._memory.place[node]
        sharing = self._memory.sharing_before(target, place)
        held = list(_flat(self.values.get(n) for n in sharing))
        for dims in held:
            dims.zero = {atom for atom in dims.zero if atom in zero or atom not in seen}
        for dims in _flat([self.values.get(target)]):
            dims.zero |= zero & dims.atoms()
        if any(n.target in MAY_COPY for n in sharing) and any(self._memory.last_read[n] > place for n in sharing):
            _freeze_all([*held, *results], f"written in place through what may be a copy ({node.name})")

    def coupling(self) -> Coupling:
        """What was found, by groups in the order of the program's parameters."""
        self._mark_shared_norms()
        members: dict[Axis, list[Member]] = {}
        seen: set[int] = set()
        for name, dims in self.names.items():
            if id(dims) in seen:
                continue
            seen.add(id(dims))
            for dim, axis in enumerate(dims.axes):
                for atom in dict.fromkeys(atoms(axis)):
                    members.setdefault(atom, []).append(Member(name, dim))
        groups = [Group(_group_name(atom, found, self.names), atom, tuple(found)) for atom, found in members.items()]
        calls = {node: Ruled(rule, out, given, tuple(here.summed)) for node, here, rule, out, given in self.ruled}
        return Coupling(groups, self.names, self.values, calls, self.written, dict(self.missing))

    def _producers(self) -> dict[Axis, set[str]]:
        """The layers whose products write to each atom."""
        found: dict[Axis, set[str]] = {}
        for _, here, *_rest in self.ruled:
            for atom in {atom for axis in here.produced for atom in atoms(axis)}:
                found.setdefault(atom, set()).add(here.producer)
        return found

    def _mark_shared_norms(self) -> None:
        """A norm over what several layers write to is a residual width: it leaves only on request."""
        producers = self._producers()
        for _, here, *_rest in self.ruled:
            for axis in here.measured:
                for atom in set(atoms(axis)):
                    if (count := len(producers.get(atom, ()))) > 1:
                        here.mix(atom, f"a statistic runs over what {count} layers write to")


def _group_name(atom: Axis, members: list[Member], names: Mapping[str, Dims]) -> str:
    """`fc1.weight[0]`, and the path to the atom where it is a part: `qkv.weight[0].1`."""
    first = min(members, key=lambda m: names[m.name][m.dim].root() is not atom)
    return f"{first.name}[{first.dim}]{_path(names[first.name][first.dim], atom)}"


def _path(axis: Axis, atom: Axis) -> str:
    axis = axis.root()
    if axis is atom:
        return ""
    for index, part in enumerate(axis.parts):
        if atom in atoms(part):
            return f".{index}{_path(part, atom)}"
    return ""


def _dims(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Dims(tuple(Axis(_size(size)) for size in value.shape))
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return [_dims(item) if isinstance(item, Tensor) else Dims(()) for item in value]
    return None


def _size(size: int | torch.SymInt) -> Size:
    """A size as a number times opaque symbols."""
    if isinstance(size, int):
        return Size(size)
    number, rest = sympy.sympify(size.node.expr).as_coeff_Mul()
    if not number.is_Integer:
        return Size(1, (str(size.node.expr),))
    symbols: list[str] = []
    for factor in sympy.Mul.make_args(rest):
        base, power = factor.as_base_exp()
        whole = power.is_Integer and int(power) > 0
        if base != 1:
            symbols += [str(base)] * int(power) if whole else [str(factor)]
    return Size(int(number), tuple(sorted(symbols)))


def _freeze_all(values: Iterable[Any], why: str) -> None:
    for dims in _flat(values):
        for axis in dims.axes:
            freeze(axis, why)


def _flat(values: Iterable[Any]) -> Iterator[Dims]:
    for value in values:
        if isinstance(value, Dims):
            yield value
        elif isinstance(value, list):
            yield from _flat(value)


def _node(value: Any) -> Any:
    return value if isinstance(value, Node) else None
