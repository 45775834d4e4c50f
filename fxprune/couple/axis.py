"""Axis: one set of indices that tensor dimensions run over. Knows no graph.

An axis is an atom, a *product* (what a view splits: 768 = 12 heads x 64) or a *concatenation* (what a cat joins: qkv =
q + k + v). `tie` makes two axes one: their structures are refined until they line up, and where they cannot, both
freeze. Atoms are the units of pruning: an atom that is not frozen can lose indices, and everything built of it follows.

Union-find (Tarjan 1975) over axes; every tie remembers the place that made it, so that `explain` can walk from an axis
to what froze it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from math import prod
from typing import Literal, NamedTuple


class Size(NamedTuple):
    """A number of indices: `number` times the symbols of a dynamic shape."""

    number: int
    symbols: tuple[str, ...] = ()

    def times(self, other: Size) -> Size:
        """The product of two sizes."""
        return Size(self.number * other.number, tuple(sorted((*self.symbols, *other.symbols))))

    def over(self, other: Size) -> Size | None:
        """The exact quotient, or None where `other` does not divide this."""
        left = list(self.symbols)
        for symbol in other.symbols:
            if symbol not in left:
                return None
            left.remove(symbol)
        if other.number == 0 or self.number % other.number:
            return None
        return Size(self.number // other.number, tuple(left))

    def __str__(self) -> str:
        return "*".join([*([str(self.number)] if self.number != 1 or not self.symbols else []), *self.symbols])


ONE = Size(1)


def whole_size(sizes: Iterable[Size]) -> Size:
    """The product of sizes."""
    return reduce(Size.times, sizes, ONE)


PART_OF = "part of"
SYMBOLIC = "symbolic size"
Kind = Literal["product", "concat"]


class Conflict(Exception):
    """Two structures of one axis that do not line up."""


class Axis:
    """Indices 0 .. size - 1. `parts` are major to minor for a product, first to last for a concatenation.

    `held` and `mixed` say why an atom was forbidden to shrink, or may only on request. `cause` is the reason given to
    this very axis, `links` the axes tied to it and where: both are for `explain`.
    """

    __slots__ = ("_parent", "cause", "held", "kind", "links", "mixed", "parts", "size")

    def __init__(self, size: Size | int, kind: Kind | None = None, parts: Sequence[Axis] = ()) -> None:
        self.size = Size(size) if isinstance(size, int) else size
        self.kind, self.parts = kind, tuple(parts)
        self._parent: Axis | None = None
        self.held = ""
        self.mixed = ""
        self.cause = ""
        self.links: list[tuple[Axis, str]] = []
        for part in self.parts:
            part.links.append((self, PART_OF))

    @property
    def frozen(self) -> str:
        """Why an atom must not shrink: it was held, or its size is symbolic; empty where it may."""
        return self.held or (SYMBOLIC if self.size.symbols else "")

    def root(self) -> Axis:
        """The axis that this one was tied into, with the path to it shortened."""
        axis = self
        while axis._parent is not None:
            if axis._parent._parent is not None:
                axis._parent = axis._parent._parent
            axis = axis._parent
        return axis

    def __repr__(self) -> str:
        axis = self.root()
        if axis.kind is None:
            return str(axis.size)
        return "(" + ("x" if axis.kind == "product" else "+").join(map(repr, axis.parts)) + ")"


def product(parts: Sequence[Axis]) -> Axis:
    """The axis whose index runs over those of `parts`, the last one fastest."""
    wide = [part for part in parts if part.root().size != ONE]
    if len(wide) == 1:
        return wide[0].root()
    size = whole_size(part.root().size for part in wide)
    return Axis(size, "product", wide) if wide and size.number else Axis(size)


def concat(parts: Sequence[Axis]) -> Axis:
    """The axis whose indices are those of `parts` one after the other."""
    filled = [leaf for part in parts for leaf in _flat(part, "concat") if leaf.size.number] or parts[:1]
    if len(filled) == 1:
        return filled[0].root()
    return Axis(sum(part.root().size.number for part in filled), "concat", filled)


def atoms(axis: Axis) -> list[Axis]:
    """The atoms larger than one index that an axis is built of, in order, with repetitions."""
    axis = axis.root()
    if axis.kind is None:
        return [axis] if axis.size != ONE else []
    return [atom for part in axis.parts for atom in atoms(part)]


def freeze(axis: Axis, why: str) -> None:
    """No atom of the axis may shrink, because `why`; the first reason stays."""
    axis.cause = axis.cause or why
    _mark(axis.root(), "held", why)


def mix(axis: Axis, why: str) -> None:
    """The atoms of the axis may shrink only on request, because `why`; the first reason stays."""
    axis.cause = axis.cause or why
    _mark(axis.root(), "mixed", why)


def _mark(axis: Axis, mark: str, why: str) -> None:
    axis = axis.root()
    if not getattr(axis, mark):
        setattr(axis, mark, why)
    for part in axis.parts:
        _mark(part, mark, why)


def tie(a: Axis, b: Axis, where: str = "") -> None:
    """Make two axes one: from now on they keep the same indices. An axis of one index broadcasts and is left alone."""
    first, second = a.root(), b.root()
    if first is second:
        return
    if first.size != second.size:
        if ONE in (first.size, second.size):
            return
        why = f"sizes {first.size} and {second.size} do not agree at {where}"
        freeze(a, why)
        freeze(b, why)
        return
    a.links.append((b, where))
    b.links.append((a, where))
    if first.kind is not None and second.kind is not None:
        try:
            _tie_structures(first, second, where)
        except Conflict as conflict:
            why = f"{conflict} at {where}"
            freeze(a, why)
            freeze(b, why)
    first, second = first.root(), second.root()
    if first is second:
        return
    if first.kind is None and second.kind is not None:
        first, second = second, first
    second._parent = first
    for mark in ("held", "mixed"):
        if why := getattr(second, mark):
            _mark(first, mark, why)
        elif (why := getattr(first, mark)) and second.kind is not None:
            for part in second.parts:
                _mark(part, mark, why)


def _tie_structures(first: Axis, second: Axis, where: str) -> None:
    if first.kind == second.kind == "product":
        pair_products([first], [second], where)
        return
    if first.kind == second.kind:
        pieces = cut(first, [part.size.number for part in _flat(second, "concat")])
        for piece, part in zip(pieces, _flat(second, "concat")):
            tie(piece, part, where)
        return
    view, cat = (first, second) if first.kind == "product" else (second, first)
    factors = _flat(view, "product")
    try:
        for part, factor in zip(divide(cat, [f.size for f in factors], where), factors):
            tie(part, factor, where)
    except Conflict:
        parts = _flat(cat, "concat")
        for piece, part in zip(cut(view, [p.size.number for p in parts]), parts):
            tie(piece, part, where)


def _flat(axis: Axis, kind: Kind) -> list[Axis]:
    """The parts of one kind, nested ones flattened."""
    axis = axis.root()
    if axis.kind != kind:
        return [axis]
    return [leaf for part in axis.parts for leaf in _flat(part, kind)]


def pair_products(xs: Iterable[Axis], ys: Iterable[Axis], where: str = "") -> None:
    """Tie two rows of axes whose products are one index space: what a view does. Raises Conflict."""
    rest, why = line_up(xs, ys, where)
    if rest:
        raise Conflict(why)


def line_up(xs: Iterable[Axis], ys: Iterable[Axis], where: str = "") -> tuple[list[Axis], str]:
    """Tie what two rows of axes over one index space have in common: from the right, and where that ends from the left.

    Returns the axes in between, which do not line up, and why; none where all of them do.
    """
    left = [leaf for x in xs for leaf in _flat(x, "product") if leaf.size != ONE]
    right = [leaf for y in ys for leaf in _flat(y, "product") if leaf.size != ONE]
    if any(leaf.size.number == 0 for leaf in left) and any(leaf.size.number == 0 for leaf in right):
        return [], ""
    why = _line_up_right(left, right, where)
    while len(left) > 1 and len(right) > 1 and left[0].root().size == right[0].root().size:
        tie(left.pop(0), right.pop(0), where)
    return [*left, *right], why or "the sizes of a view do not multiply to the same"


def _line_up_right(left: list[Axis], right: list[Axis], where: str) -> str:
    """Take from both rows what ties from the right; returns why it ended where both have more."""
    while left and right:
        x, y = left.pop().root(), right.pop().root()
        try:
            if x.kind == "product" or y.kind == "product":
                # a tie further to the right has split it meanwhile
                left += _flat(x, "product")
                right += _flat(y, "product")
            elif x.size == y.size:
                tie(x, y, where)
            elif (rest := y.size.over(x.size)) is not None:
                major, minor = divide(y, [rest, x.size], where)
                right.append(major)
                tie(x, minor, where)
            elif (rest := x.size.over(y.size)) is not None:
                major, minor = divide(x, [rest, y.size], where)
                left.append(major)
                tie(minor, y, where)
            else:
                raise Conflict(f"a view of {y.size} over {x.size} does not line up")
        except Conflict as conflict:
            left.append(x)
            right.append(y)
            return str(conflict)
    return ""


def divide(axis: Axis, sizes: Sequence[Size], where: str = "") -> list[Axis]:
    """The axis as a product of parts of these sizes, major to minor. Raises Conflict where its structure forbids."""
    axis = axis.root()
    wide = [size for size in sizes if size != ONE]
    if len(wide) < len(sizes):
        # No part is as large as the whole: an axis tied to a part of itself would never end.
        parts = iter(divide(axis, wide, where) if wide else [])
        return [Axis(ONE) if size == ONE else next(parts) for size in sizes]
    if len(sizes) == 1:
        return [axis]
    if axis.size.number == 0:
        return [Axis(size) for size in sizes]
    if axis.kind is None:
        return list(_split(axis, "product", [Axis(size) for size in sizes]))
    if axis.kind == "product":
        fresh = [Axis(size) for size in sizes]
        pair_products([axis], fresh, where)
        return [part.root() for part in fresh]
    major, minor = _divide_concat(axis, whole_size(sizes[1:]), where)
    return [major, *divide(minor, sizes[1:], where)]


def _divide_concat(axis: Axis, inner: Size, where: str) -> tuple[Axis, Axis]:
    parts = _flat(axis, "concat")
    if all(part.size.over(inner) is not None for part in parts):
        majors, minors = [], []
        for part in parts:
            over = part.size.over(inner)
            major, minor = (Axis(ONE), part) if over in (None, ONE) else divide(part, [over, inner], where)
            majors.append(major)
            minors.append(minor)
    else:
        # several whole parts to one step of the outer index
        majors, minors, run = [], [], []
        for part in parts:
            run.append(part)
            have = sum(p.size.number for p in run)
            if have > inner.number or inner.symbols:
                raise Conflict(f"a view into steps of {inner} cuts through a concatenation")
            if have == inner.number:
                majors.append(Axis(ONE))
                minors.append(concat(run))
                run = []
    for minor in minors[1:]:
        tie(minors[0], minor, where)
    return concat(majors), minors[0].root()


def cut(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """The axis as consecutive pieces of these sizes. Raises Conflict where its structure forbids."""
    axis = axis.root()
    filled = [size for size in sizes if size]
    if len(filled) < len(sizes):
        parts = iter(cut(axis, filled) if filled else [])
        return [next(parts) if size else Axis(0) for size in sizes]
    if len(sizes) == 1:
        return [axis]
    if axis.size.symbols:
        raise Conflict("a cut through a symbolic size")
    if axis.kind is None:
        return list(_split(axis, "concat", [Axis(size) for size in sizes]))
    if axis.kind == "product":
        head, *tail = _flat(axis, "product")
        inner = prod(part.size.number for part in tail)
        if any(size % inner for size in sizes):
            raise Conflict(f"a cut of {axis!r} into {'+'.join(map(str, sizes))} goes through a view")
        return [product([piece, *tail]) for piece in cut(head, [size // inner for size in sizes])]
    waiting = deque(_flat(axis, "concat"))
    pieces = []
    for size in sizes:
        run: list[Axis] = []
        missing = size
        while missing:
            part = waiting.popleft().root()
            if part.size.number > missing:
                part, rest = cut(part, [missing, part.size.number - missing])
                waiting.appendleft(rest)
            run.append(part)
            missing -= part.root().size.number
        pieces.append(concat(run))
    return pieces


def _split(atom: Axis, kind: Kind, parts: list[Axis]) -> tuple[Axis, ...]:
    atom.kind, atom.parts = kind, tuple(parts)
    for part in parts:
        part.links.append((atom, PART_OF))
        part.held, part.mixed = atom.held, atom.mixed
    return atom.parts


def explain(axis: Axis, label: Callable[[Axis], str]) -> list[str]:
    """The shortest walk over ties from an axis to what froze or mixed it, a line a step; empty where nothing did."""
    seen = {id(axis)}
    waiting: deque[tuple[Axis, list[str]]] = deque([(axis, [])])
    parts = atoms(axis) if axis.root().kind is not None else []
    below = [(part, [f"{label(axis)} has a part of {part.size}"]) for part in parts]
    waiting.extend(below)
    seen.update(id(part) for part, _ in below)
    while waiting:
        here, path = waiting.popleft()
        whole = here.root()
        if cause := here.cause or (SYMBOLIC if whole.kind is None and whole.size.symbols else ""):
            return [*path, f"{label(here)}: {cause}"]
        for other, where in here.links:
            if id(other) not in seen:
                seen.add(id(other))
                how = "is part of" if where == PART_OF else f"is tied by {where} to"
                waiting.append((other, [*path, f"{label(here)} {how} {label(other)}"]))
    return []
