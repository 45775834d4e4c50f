"""dead: which indices of which groups may leave without changing what the model computes, and what stands in for them.

A channel that masks made zero or constant is dead, and so is one that nothing reads any more. An index leaves where
every sum over it either does not read it, or reads what is the same for every input, for which a constant then stands
in. What leaves reads nothing itself, so that more may follow: this goes on until nothing changes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxprune.couple.axis import Axis, atoms
from fxprune.couple.coupling import Coupling
from fxprune.couple.indices import is_twice, kept_indices, positions
from fxprune.couple.removal import Removal, removal
from fxprune.graph.note import Note
from fxprune.graph.program import Program, fetch, fetch_any, names_of_parameters, node_of
from fxprune.select.selection import Selection

from .propagate import Propagation
from .readers import Reader, constant, read_instead, readers
from .zero_slices import weights_of, zero_slices

# How a dead index leaves, from the least to the most that stands in for it.
ROUTES = ("read by nothing", "zero", "constant into a bias", "constant into another channel", "constant into a map")
# A channel that stays can stand in for others whose constants are up to so many times its own.
_REACH = 1e3


class ZeroSlices(NamedTuple):
    """The zero slices of a weight along one dimension: how many there were, how many left, why the rest stay."""

    name: str
    dim: int
    zero: int
    left: int
    why: str


@dataclasses.dataclass
class Dead:
    """What may leave.

    keep       group -> indices that stay (int64, ascending), for groups that lose some
    constants  node -> what is to be added to its output, broadcast over it
    instead    weight -> (dim, index, what stands there instead), for a channel that is read in place of others
    routes     route -> how many indices leave by it
    slices     what became of the zero slices of each weight
    notes      ops that could not be followed, and why
    """

    keep: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    constants: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    instead: dict[str, tuple[int, int, Tensor]] = dataclasses.field(default_factory=dict)
    routes: Counter[str] = dataclasses.field(default_factory=Counter)
    slices: list[ZeroSlices] = dataclasses.field(default_factory=list)
    notes: list[Note] = dataclasses.field(default_factory=list)

    @property
    def map_elements(self) -> int:
        """How many numbers the constants hold that are no biases."""
        return sum(c.numel() for c in self.constants.values() if _is_map(c))


@torch.no_grad()
def find_dead(
    program: Program,
    coupling: Coupling,
    selection: Selection,
    whole: Collection[str] = (),
    align: int = 1,
) -> Dead:
    """What leaves `program` without a trace once `selection` is applied; the groups named in `whole` lose nothing.

    Widths are left at multiples of `align`. All this is about evaluation: in training batch-norms have other constants.
    """
    leaving = removal(coupling, selection.keep)
    search = _Search(program, coupling, selection, leaving, whole)
    search.run()
    search.align(align)
    return search.dead()


class _Search:
    def __init__(
        self,
        program: Program,
        coupling: Coupling,
        selection: Selection,
        leaving: Removal,
        whole: Collection[str],
    ) -> None:
        self._program, self._coupling, self._selection, self._leaving = program, coupling, selection, leaving
        self._first_name = names_of_parameters(program)
        self._groups = {g.axis: g for g in coupling if g.free and g.size > 1 and g.name not in whole}
        self._gone: dict[Axis, Tensor] = {}
        for atom, kept in coupling.atoms_of(selection.keep).items():
            self._gone[atom] = torch.ones(atom.size.number, dtype=torch.bool).index_fill(0, kept, False)
        self._asked = {atom: gone.clone() for atom, gone in self._gone.items()}
        self._own = _read_once(program) - selection.values.keys()
        self._readers: list[Reader] = []
        self._of: dict[Axis, list[Reader]] = {}
        self._places: dict[tuple[int, Axis], Tensor] = {}
        self._lefts: dict[int, tuple[list[Tensor | None], Tensor]] = {}
        self._reads: dict[int, tuple[Tensor, Tensor]] = {}
        self._why: dict[Axis, list[str]] = {}
        self._failed: dict[str, str] = {}

    def run(self) -> None:
        """Collects the readers, then lets indices go until none is left that may."""
        propagation = self._propagate()
        propagation.run(self._collect)
        self._failed = propagation.failed
        for atom in [atom for atom in self._groups if any(is_twice(r.axis, atom) for r in self._of.get(atom, []))]:
            # What is summed then belongs to two indices, and dies with neither alone.
            del self._groups[atom]
            self._why[atom] = ["a sum runs over two factors that are one axis"] * atom.size.number
        # In the order of the groups, so that what stays is the same in every run.
        waiting = dict.fromkeys(self._groups)
        while waiting:
            atom = next(iter(waiting))
            del waiting[atom]
            gone = self._may_go(atom)
            if not torch.equal(gone, self._gone.get(atom, torch.zeros_like(gone))):
                self._gone[atom] = gone
                # Rows of a weight that left read nothing any more.
                made = [r for r in self._readers if r.out is not None and atom in atoms(r.out)]
                waiting |= dict.fromkeys(a for r in made for a in atoms(r.axis) if a in r.summed and a in self._groups)

    def align(self, align: int) -> None:
        """Lets dead indices stay up to a multiple of `align`, and one where no map could take the place of a constant.

        Nothing that stays reads them, or else they are known and what they read has a constant in its place.
        """
        for reader in self._readers:
            if reader.level is not None and not reader.is_fixed:
                self._let_one_stay(reader, reader.level)
        for atom, gone in self._gone.items():
            multiple = self._coupling.multiple(atom, align)
            fresh = gone & ~self._asked.get(atom, torch.zeros_like(gone))
            kept = int((~gone).sum())
            if atom in self._groups and atom.size.number >= multiple:
                wanted = min(atom.size.number, -(-kept // multiple) * multiple)
                stay = [*self._standing_in(atom, fresh), *fresh.nonzero().flatten().flip(0).tolist()]
                self._let_stay(atom, list(dict.fromkeys(stay))[: wanted - kept], f"widths are multiples of {align}")

    def _let_stay(self, atom: Axis, indices: Sequence[int], why: str) -> None:
        self._gone[atom] = self._gone[atom].index_fill(0, torch.tensor(indices, dtype=torch.long), False)
        for index in indices:
            self._why[atom][index] = why

    def _standing_in(self, atom: Axis, fresh: Tensor) -> list[int]:
        """For each padding convolution, the index of an atom that has the largest constant there."""
        found = []
        for reader in self._of.get(atom, []):
            if reader.level is not None:
                place = self._place(reader.axis, atom)
                leaving = self._reads_of_leaving(reader) & (place >= 0) & fresh[place.clamp(min=0)]
                found += _largest(reader.level, leaving, place)
        return found

    def _let_one_stay(self, reader: Reader, level: Tensor) -> None:
        leaving = self._reads_of_leaving(reader) & ~reader.zero & ~level.isnan()
        if not bool(leaving.any()) or self._instead(reader, level, leaving) is not None:
            return
        for atom in dict.fromkeys(atoms(reader.axis)):
            place = self._place(reader.axis, atom)
            found = _largest(level, leaving & (place >= 0), place) if atom in self._groups else []
            if found:
                self._let_stay(atom, found, "its constant is read for others")
                return

    def _instead(self, reader: Reader, level: Tensor, leaving: Tensor) -> int | None:
        """The index that stays and that can stand in for the constants that leave."""
        found = torch.where(self._left(reader.axis) | level.isnan(), 0.0, level.abs())
        at = int(found.argmax())
        enough = float(found[at]) * _REACH >= float(level[leaving].abs().max()) and float(found[at]) > 0
        return at if enough else None

    def _propagate(self) -> Propagation:
        return Propagation(self._program, self._read, self._leaving.statistics)

    def _read(self, target: str, tensor: Tensor) -> Tensor:
        tensor = self._leaving.apply(target, tensor)
        name = self._first_name.get(target)
        return tensor if name is None else self._selection.apply(name, tensor)

    def _collect(self, node: torch.fx.Node, get: object) -> None:
        call = self._coupling.ruled.get(node)
        for reader in readers(node, call, get, self._own) if call is not None and call.summed else []:  # pyright: ignore
            self._readers.append(reader)
            for atom in reader.summed:
                self._of.setdefault(atom, []).append(reader)

    def _may_go(self, atom: Axis) -> Tensor:
        """bool [size]: the indices of an atom that may leave, and have left."""
        size = atom.size.number
        gone = self._gone.get(atom, torch.zeros(size, dtype=torch.bool))
        free = torch.ones(size, dtype=torch.bool)
        self._why[atom] = [""] * size
        for reader in self._of.get(atom, []):
            place = self._place(reader.axis, atom)
            held = self._live_reads(reader) & ~reader.known & (place >= 0)
            for index in place[held].unique().tolist() if bool(held.any()) else []:
                free[index] = False
                self._why[atom][index] = self._why[atom][index] or reader.why
        free |= gone
        if bool(free.all()):
            # Something stays of every axis: a layer without channels is none.
            free[int((~gone).nonzero()[0])] = False
        return free

    def _live_reads(self, reader: Reader) -> Tensor:
        """bool [i]: which indices outputs that stay read, and have not left themselves."""
        return self._read_by_live(reader) & ~self._left(reader.axis)

    def _read_by_live(self, reader: Reader) -> Tensor:
        """bool [i]: which indices outputs that stay read."""
        if reader.out is None or reader.reads.shape[0] == 1:
            return reader.reads.any(0)
        left = self._left(reader.out)
        known = self._reads.get(id(reader))
        if known is None or known[0] is not left:
            known = self._reads[id(reader)] = (left, reader.reads[~left].any(0))
        return known[1]

    def _left(self, axis: Axis) -> Tensor:
        """bool [size]: the indices of an axis that have left, by any atom; the same object until one changes."""
        axis = axis.root()
        parts = list(dict.fromkeys(atoms(axis)))
        gone = [self._gone.get(atom) for atom in parts]
        known = self._lefts.get(id(axis))
        if known is None or any(a is not b for a, b in zip(known[0], gone)):
            keep = {a: (~flags).nonzero().flatten() for a, flags in zip(parts, gone) if flags is not None}
            result = torch.ones(axis.size.number, dtype=torch.bool).index_fill(0, kept_indices(axis, keep), False)
            known = self._lefts[id(axis)] = (gone, result)
        return known[1]

    def _place(self, axis: Axis, atom: Axis) -> Tensor:
        key = (id(axis.root()), atom)
        if key not in self._places:
            self._places[key] = positions(axis, atom)
        return self._places[key]

    def dead(self) -> Dead:
        """The indices that stay, the constants for those that do not, and what is told about them."""
        found = Dead()
        fresh: dict[Axis, Tensor] = {}
        for atom, group in self._groups.items():
            gone = self._gone.get(atom)
            if gone is None:
                continue
            fresh[atom] = gone & ~self._asked.get(atom, torch.zeros_like(gone))
            if bool(fresh[atom].any()):
                found.keep[group.name] = (~gone).nonzero().flatten()
        if found.keep:
            route = {atom: torch.zeros(atom.size.number, dtype=torch.long) for atom in fresh}
            self._stand_in(found, fresh, route)
            for atom, gone in fresh.items():
                found.routes.update(ROUTES[i] for i in route[atom][gone].tolist())
        found.slices = self._slices()
        found.notes = [
            Note(f"constants were not followed through {op}: {why}", "missed") for op, why in self._failed.items()
        ]
        return found

    def _stand_in(self, found: Dead, fresh: Mapping[Axis, Tensor], route: dict[Axis, Tensor]) -> None:
        """A second walk computes the constant of every product that reads what leaves."""
        wanted: dict[torch.fx.Node, list[Reader]] = {}
        for reader in self._readers:
            if any(atom in fresh and bool(fresh[atom].any()) for atom in reader.summed):
                wanted.setdefault(reader.node, []).append(reader)

        def visit(node: torch.fx.Node, get: object) -> None:
            for reader in wanted.get(node, []):
                read = self._reads_of_leaving(reader)
                constants = read & ~reader.zero
                even = self._read_instead(found, reader, constants)
                constants &= ~even
                added = constant(node, reader, constants, get) if bool(constants.any()) else None  # pyright: ignore
                if added is not None:
                    found.constants[node.name] = added
                is_map = added is not None and _is_map(added)
                for atom in reader.summed & route.keys():
                    place = self._place(reader.axis, atom)
                    _raise_to(route[atom], place[read & (place >= 0)], 1)
                    _raise_to(route[atom], place[constants & (place >= 0)], 4 if is_map else 2)
                    _raise_to(route[atom], place[even & (place >= 0)], 3)

        self._propagate().run(visit)

    def _read_instead(self, found: Dead, reader: Reader, constants: Tensor) -> Tensor:
        """bool [i]: the constants that another channel stands in for; the weight that reads it then is put down."""
        nowhere = torch.zeros_like(constants)
        even = nowhere if reader.level is None else constants & ~reader.level.isnan()
        if reader.level is None or not bool(even.any()):
            return nowhere
        at = self._instead(reader, reader.level, even)
        if at is None:
            return nowhere
        name = str(node_of(reader.node, "weight").target)
        dim, values = read_instead(reader, even, at, self._read(name, fetch(self._program, name)))
        found.instead[name] = (dim, at, values)
        return even

    def _reads_of_leaving(self, reader: Reader) -> Tensor:
        """bool [i]: the indices that leave and that outputs which stay still read."""
        return self._read_by_live(reader) & self._left(reader.axis)

    def _slices(self) -> list[ZeroSlices]:
        rows = []
        tables = weights_of(self._program, {"embedding"})
        for name, weight in self._program.named_parameters():
            dims = self._coupling.tensors.get(name)
            if dims is None or not weight.is_floating_point():
                continue
            for dim, zero in zero_slices(self._read(name, weight.detach())).items():
                if name in tables and dim == 0:
                    continue
                left = self._left(dims[dim])
                stays = (zero & ~left).nonzero().flatten().tolist()
                if bool(zero.any()):
                    reasons = Counter(self._reason(dims[dim], index) for index in stays).most_common(1)
                    why = reasons[0][0] if reasons else ""
                    rows.append(ZeroSlices(name, dim, int(zero.sum()), int((zero & left).sum()), why))
        return rows

    def _reason(self, axis: Axis, index: int) -> str:
        parts = dict.fromkeys(atoms(axis))
        for atom in parts:
            if why := atom.frozen or atom.mixed:
                return why
        for atom in reversed(parts):
            at = int(self._place(axis, atom)[index])
            if at >= 0 and atom in self._why and self._why[atom][at]:
                return self._why[atom][at]
        return "one index of each axis stays"


def _read_once(program: Program) -> set[str]:
    """The parameters that one op alone reads."""
    readers_of: Counter[int] = Counter()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            readers_of[id(fetch_any(program, str(node.target)))] += len(node.users)
    return {name for name, parameter in program.named_parameters() if readers_of[id(parameter)] == 1}


def _largest(level: Tensor, among: Tensor, place: Tensor) -> list[int]:
    """The place of the largest constant that is not zero, if there is one."""
    size = torch.where(among & ~level.isnan(), level.abs(), 0.0)
    return [int(place[size.argmax()])] if bool(size.any()) else []


def _is_map(constant: Tensor) -> bool:
    return sum(size > 1 for size in constant.shape) > 1


def _raise_to(route: Tensor, places: Tensor, value: int) -> None:
    route[places] = route[places].clamp(min=value)
