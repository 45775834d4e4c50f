"""Axes: whatever views, joins and ties come in whatever order, slicing an axis is slicing the tensor behind it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from fxprune.couple.axis import (
    ONE,
    SYMBOLIC,
    Axis,
    Conflict,
    Size,
    atoms,
    concat,
    cut,
    divide,
    explain,
    freeze,
    mix,
    pair_products,
    product,
    tie,
)
from fxprune.couple.indices import is_twice, kept_indices, positions, shrunk_size

SIZES = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 24])


@st.composite
def factors(draw: st.DrawFn, size: int) -> list[int]:
    """A number as a product of one to four factors."""
    found = []
    while size > 1 and len(found) < 3:
        found.append(draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])))
        size //= found[-1]
    return [*found, size]


@st.composite
def terms(draw: st.DrawFn, size: int) -> list[int]:
    """A number as a sum of one to four terms."""
    found = []
    while len(found) < 3 and draw(st.booleans()):
        found.append(draw(st.integers(0, size)))
        size -= found[-1]
    return [*found, size]


def edit(draw: st.DrawFn, pool: list[Axis]) -> None:
    """One thing that a rule may do to the axes of a graph. A conflict freezes what it is about, as in every rule."""
    kind = draw(st.sampled_from(["divide", "cut", "view", "join", "multiply", "tie", "freeze", "mix"]))
    axis = draw(st.sampled_from(pool))
    size = axis.root().size.number
    held = [axis]
    try:
        if kind == "divide":
            pool += divide(axis, [Size(n) for n in draw(factors(size))])
        elif kind == "cut":
            pool += cut(axis, draw(terms(size)))
        elif kind == "view":
            held += [Axis(n) for n in draw(factors(size))]
            pool += held[1:]
            pair_products(held[:1], held[1:])
        elif kind in ("join", "multiply"):
            others = [draw(st.sampled_from(pool)) for _ in range(draw(st.integers(1, 2)))]
            whole = (concat if kind == "join" else product)([axis, *others])
            if whole.size.number <= 100:
                pool.append(whole)
        elif kind == "tie":
            tie(axis, draw(st.sampled_from(pool)), "a tie")
        else:
            (freeze if kind == "freeze" else mix)(axis, f"a reason to {kind}")
    except Conflict as conflict:
        for other in held:
            freeze(other, str(conflict))


@st.composite
def pools(draw: st.DrawFn) -> list[Axis]:
    """The axes that a few tensors and a dozen ops leave behind."""
    pool = [Axis(draw(SIZES)) for _ in range(draw(st.integers(1, 5)))]
    for _ in range(draw(st.integers(0, 12))):
        edit(draw, pool)
    return pool


@st.composite
def choices(draw: st.DrawFn, axes: Sequence[Axis]) -> dict[Axis, Tensor]:
    """For some atoms that may shrink, the indices that stay."""
    keep = {}
    for atom in dict.fromkeys(a for axis in axes for a in atoms(axis)):
        if not atom.frozen and atom.size.number and draw(st.booleans()):
            stay = draw(st.sets(st.integers(0, atom.size.number - 1), min_size=1))
            keep[atom] = torch.tensor(sorted(stay))
    return keep


@given(st.data())
def test_structures_add_up(data: st.DataObject) -> None:
    waiting = list(data.draw(pools()))
    while waiting:
        axis = waiting.pop().root()
        sizes = [part.root().size.number for part in axis.parts]
        assert axis.kind is None or axis.size.number == (prod(sizes) if axis.kind == "product" else sum(sizes))
        waiting += axis.parts


@given(st.data())
def test_kept_indices_are_those_whose_atoms_stay(data: st.DataObject) -> None:
    pool = data.draw(pools())
    keep = data.draw(choices(pool))
    for axis in pool:
        got, size = kept_indices(axis, keep), axis.root().size.number
        assert got.dtype == torch.int64 and len(got) == shrunk_size(axis, keep).number <= size
        assert (got[1:] > got[:-1]).all()
        stays = torch.ones(size, dtype=torch.bool)
        for atom, kept in keep.items():
            place = positions(axis, atom)
            assert place.shape == (size,) and (place >= -1).all() and (place < atom.size.number).all()
            stays &= (place < 0) | torch.isin(place, kept)
        # With an atom twice in a product, an index leaves with either, of which there is but one position.
        if not any(is_twice(axis, atom) for atom in atoms(axis)):
            assert torch.equal(got, stays.nonzero().flatten())


@given(st.data())
def test_marks_are_never_lost(data: st.DataObject) -> None:
    pool = data.draw(pools())
    marked = [(axis, (freeze, mix)[data.draw(st.integers(0, 1))]) for axis in pool if data.draw(st.booleans())]
    for axis, mark in marked:
        mark(axis, "marked")
    for _ in range(8):
        edit(data.draw, pool)
    for axis, mark in marked:
        assert all(atom.frozen if mark is freeze else atom.mixed for atom in atoms(axis))


@given(st.data())
def test_every_mark_is_explained(data: st.DataObject) -> None:
    for axis in data.draw(pools()):
        steps = explain(axis, repr)
        marked = any(atom.frozen or atom.mixed for atom in atoms(axis))
        if marked:
            assert steps and ": " in steps[-1]


@given(st.data())
def test_a_tie_makes_two_axes_keep_the_same(data: st.DataObject) -> None:
    pool = data.draw(pools())
    a, b = (data.draw(st.sampled_from(pool)) for _ in range(2))
    tie(a, b, "the tie")
    keep = data.draw(choices(pool))
    if a.root().size == b.root().size:
        assert torch.equal(kept_indices(a, keep), kept_indices(b, keep))
    elif ONE not in (a.root().size, b.root().size):
        assert all(atom.frozen for axis in (a, b) for atom in atoms(axis))


# --- against tensors ---------------------------------------------------------------------------------------------


def sliced(tensor: Tensor, axes: Sequence[Axis], keep: dict[Axis, Tensor]) -> Tensor:
    for dim, axis in enumerate(axes):
        tensor = tensor.index_select(dim, kept_indices(axis, keep))
    return tensor


@given(st.data())
def test_a_view_of_a_slice_is_a_slice_of_the_view(data: st.DataObject) -> None:
    """Through a chain of views, whatever the sizes."""
    shapes = [data.draw(factors(24)) for _ in range(data.draw(st.integers(2, 4)))]
    values = [[Axis(size) for size in shape] for shape in shapes]
    for xs, ys in itertools.pairwise(values):
        try:
            pair_products(xs, ys, "a view")
        except Conflict as conflict:
            for axis in (*xs, *ys):
                freeze(axis, str(conflict))
    keep = data.draw(choices([axis for axes in values for axis in axes]))
    tensor = torch.arange(24)
    for axes, shape in zip(values, shapes):
        want = sliced(tensor.view(shapes[0]), values[0], keep).flatten()
        assert torch.equal(sliced(tensor.view(shape), axes, keep).flatten(), want)


@given(st.data())
def test_a_join_of_slices_is_a_slice_of_the_join(data: st.DataObject) -> None:
    """Pieces of one axis, cut, joined again in another order, and cut at other places."""
    size = data.draw(SIZES)
    axis = Axis(size)
    pieces = cut(axis, data.draw(terms(size)))
    order = data.draw(st.permutations(range(len(pieces))))
    whole = concat([pieces[i] for i in order])
    again = cut(whole, data.draw(terms(size)))
    keep = data.draw(choices([axis, whole, *again]))
    tensors = torch.arange(size).split([piece.root().size.number for piece in pieces])
    joined = torch.cat([tensors[i] for i in order])
    assert torch.equal(torch.cat([sliced(tensors[i], [pieces[i]], keep) for i in order]), sliced(joined, [whole], keep))
    parts = joined.split([piece.root().size.number for piece in again])
    got = torch.cat([sliced(part, [piece], keep) for part, piece in zip(parts, again)])
    assert torch.equal(got, sliced(joined, [whole], keep))


# --- the order of ties -------------------------------------------------------------------------------------------


def partition(axes: Sequence[Axis]) -> list[Any]:
    """What the indices of axes are, with atoms numbered as they come: equal for equal structures."""
    numbers: dict[Axis, int] = {}
    return [
        [
            (
                numbers.setdefault(atom, len(numbers)),
                bool(atom.frozen),
                bool(atom.mixed),
                positions(axis, atom).tolist(),
            )
            for atom in atoms(axis)
        ]
        for axis in axes
    ]


@given(st.data())
def test_the_order_of_ties_does_not_matter(data: st.DataObject) -> None:
    """Nor their direction: views of one index space, tied in any order, come to the same atoms."""
    shapes = [data.draw(factors(24)) for _ in range(4)]
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=6))
    marks = [(i, data.draw(st.sampled_from([freeze, mix]))) for i in range(4) if data.draw(st.booleans())]

    def run(order: Sequence[tuple[int, int]], marked_first: bool) -> list[Any] | None:
        values = [[Axis(size) for size in shape] for shape in shapes]

        def mark() -> None:
            for i, how in marks:
                how(values[i][0], "marked")

        if marked_first:
            mark()
        try:
            for i, j in order:
                pair_products(values[i], values[j])
        except Conflict:
            return None
        if not marked_first:
            mark()
        return partition([axis for axes in values for axis in axes])

    turned = [pair if data.draw(st.booleans()) else pair[::-1] for pair in data.draw(st.permutations(pairs))]
    first, second = run(pairs, marked_first=True), run(turned, marked_first=False)
    if first is not None and second is not None:
        # A mark on an axis that is split later holds all of it, and one made afterwards holds the same.
        assert first == second


def test_an_atom_that_is_twice_in_an_axis() -> None:
    a, b = Axis(2), Axis(3)
    square, joined = product([a, a]), concat([a, b, a])
    assert is_twice(square, a) and is_twice(concat([b, square]), a) and is_twice(product([b, concat([a, b]), a]), a)
    assert not is_twice(joined, a) and not is_twice(square, b) and not is_twice(a, a)
    assert kept_indices(square, {a: torch.tensor([1])}).tolist() == [3]


# --- by example --------------------------------------------------------------------------------------------------


def test_heads_of_a_fused_projection() -> None:
    qkv, out = Axis(24), Axis(8)
    q, k, v = cut(qkv, [8, 8, 8])
    heads = [divide(part, [Size(2), Size(4)]) for part in (q, k, v)]
    for other in heads[1:]:
        tie(heads[0][0], other[0], "attention")
    tie(heads[0][1], heads[1][1], "attention")
    pair_products(heads[2], [out], "merge")
    assert repr(qkv) == "((2x4)+(2x4)+(2x4))" and repr(out) == "(2x4)"
    keep = {heads[0][0].root(): torch.tensor([1])}
    assert kept_indices(qkv, keep).tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]
    assert kept_indices(out, keep).tolist() == [4, 5, 6, 7]
    assert shrunk_size(qkv, {heads[2][1].root(): torch.tensor([0])}) == Size(8 + 8 + 2)


def test_a_concatenation_divides_where_its_parts_do() -> None:
    left, right = Axis(4), Axis(6)
    outer, inner = divide(concat([left, right]), [Size(5), Size(2)])
    assert repr(outer.root()) == "(2+3)" and repr(left) == "(2x2)" and repr(right) == "(3x2)"
    assert atoms(left)[1] is atoms(right)[1] is inner.root()


def does_not_line_up() -> None:
    pair_products([Axis(4), Axis(3)], [Axis(3), Axis(4)])


def cuts_through_a_view() -> None:
    axis = Axis(6)
    divide(axis, [Size(3), Size(2)])
    cut(axis, [3, 3])


def splits_a_join() -> None:
    divide(concat([Axis(3), Axis(5)]), [Size(2), Size(4)])


def cuts_symbols() -> None:
    cut(Axis(Size(2, ("s0",))), [1, 1])


def loses_elements() -> None:
    pair_products([Axis(4)], [Axis(2)])


@pytest.mark.parametrize("act", [does_not_line_up, cuts_through_a_view, splits_a_join, cuts_symbols, loses_elements])
def test_what_does_not_line_up_is_a_conflict(act: Callable[[], None]) -> None:
    with pytest.raises(Conflict):
        act()


def test_a_tie_of_structures_that_do_not_line_up_freezes_both() -> None:
    a, b = product([Axis(2), Axis(3)]), product([Axis(3), Axis(2)])
    parts = [*a.parts, *b.parts]
    tie(a, b, "add")
    assert all("at add" in part.frozen for part in parts)


def test_an_axis_of_one_index_broadcasts() -> None:
    one, wide = Axis(1), Axis(5)
    tie(one, wide, "add")
    assert one.root() is not wide.root() and not wide.frozen and atoms(one) == []


def test_unequal_sizes_freeze_both() -> None:
    a, b = Axis(4), Axis(5)
    tie(a, b, "add")
    assert a.frozen == b.frozen == "sizes 4 and 5 do not agree at add"


def test_symbolic_sizes_stay_and_their_numbers_may_shrink() -> None:
    """(batch heads), folded into one dimension, comes apart again."""
    batch, folded = Size(1, ("s0",)), Axis(Size(4, ("s0",)))
    assert folded.frozen == SYMBOLIC
    major, heads = divide(folded, [batch, Size(4)])
    assert major.frozen == SYMBOLIC and not heads.frozen
    assert explain(major, lambda _: "batch") == [f"batch: {SYMBOLIC}"] and explain(heads, lambda _: "heads") == []
    assert shrunk_size(folded, {heads: torch.tensor([0, 2, 3])}) == Size(3, ("s0",))
    freeze(folded, "a graph input")
    assert heads.frozen == major.frozen == "a graph input"


def test_sizes() -> None:
    batch = Size(4, ("s0",))
    assert batch.times(Size(3, ("s1",))) == Size(12, ("s0", "s1")) and batch.over(Size(2)) == Size(2, ("s0",))
    assert batch.over(batch) == ONE and batch.over(Size(1, ("s1",))) is None and batch.over(Size(3)) is None
    assert Size(0).over(Size(0)) is None
    assert [str(size) for size in (batch, Size(1, ("s0",)), Size(7), ONE)] == ["4*s0", "s0", "7", "1"]


def test_explain_walks_the_shortest_way() -> None:
    names = dict(zip("abcd", (Axis(4) for _ in range(4))))
    label = {id(axis): name for name, axis in names.items()}
    tie(names["a"], names["b"], "add")
    tie(names["b"], names["c"], "mul")
    tie(names["a"], names["d"], "view")
    freeze(names["d"], "graph output")
    steps = explain(names["c"], lambda axis: label[id(axis)])
    assert steps == ["c is tied by mul to b", "b is tied by add to a", "a is tied by view to d", "d: graph output"]
