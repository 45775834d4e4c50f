"""Products with a sum: linear, the matmul family, einsum, attention, embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fxprune.couple.axis import Conflict, divide

from .notation import Operand, axes, operand, relate, zero_of
from .relation import Atoms, Dims, Here, Relation, Resize, add, relation, tie_broadcast

axes("* i, o i, +o? -> * o", "linear")
axes("m k, k n -> m n", "mm")
axes("b m k, b k n -> b m n", "bmm")
axes("k, k -> ", "dot", "vdot")
axes("m k, k -> m", "mv")
axes("m, n -> m n", "outer", "ger")
axes(". d, * -> * d", "embedding", weight=0)
axes("* i, * j, o i j, +o? -> * o", "bilinear")
# Which expert a row goes to is a matter of its position.
axes(". k, . k n, .? -> . n", "_grouped_mm")
axes(". k, . k n, .? -> . n", "transformers::grouped_mm_fallback", names=("input", "weight", "offs"))

Reading = tuple[list[Operand], tuple[str, ...], list[Dims | None]]


def contraction(*ops: str) -> Callable[[Callable[..., Reading]], Callable[..., Reading]]:
    """Register ops whose letters depend on the call: the function gives (operands, result, tensors) of one.

    It raises Conflict for a call that letters cannot say, which then freezes.
    """

    def register(read: Callable[..., Reading]) -> Callable[..., Reading]:
        def tie(here: Here, out: Dims, **arguments: Any) -> None:
            operands, result, given = read(out, **arguments)
            relate(here, operands, result, given, out)

        def zero(here: Here, out: Dims, **arguments: Any) -> Atoms:
            operands, result, given = read(out, **arguments)
            return zero_of(here, operands, result, given, out)

        for op in ops:
            add(op, Relation(tie, zero, None, (read.__doc__ or "").strip()))
        return read

    return register


def _reading(spec: str, *given: Dims | None) -> Reading:
    left, right = spec.split("->")
    return [operand(text) for text in left.split(",")], tuple(right.split()), list(given)


def _broadcast(letters: str, dims: Dims) -> str:
    """The last of some letters, as many as an operand has that broadcasts to them all."""
    found = letters.split()
    return " ".join(found[len(found) - len(dims) :])


@contraction("matmul", "linalg_matmul")
def matmul(out: Dims, self: Dims, other: Dims, **_: Any) -> Reading:
    """* m k, * k n -> * m n"""
    if len(self) == 1 and len(other) == 1:
        return _reading("k, k ->", self, other)
    if len(self) == 1:
        return _reading("k, * k n -> * n", self, other)
    if len(other) == 1:
        return _reading("* m k, k -> * m", self, other)
    return _reading("* m k, * k n -> * m n", self, other)


def _sum_with_product(op: str, product: str, result: str, first: str, second: str) -> None:
    """Declare an op that adds `self`, which broadcasts to the result, to a product of two arguments."""

    def read(out: Dims, self: Dims, **a: Any) -> Reading:
        return _reading(f"{product}, +{_broadcast(result, self)} -> {result}", a[first], a[second], self)

    read.__doc__ = f"{product}, +{result} -> {result}"
    contraction(op)(read)


_sum_with_product("addmm", "m k, k n", "m n", "mat1", "mat2")
_sum_with_product("baddbmm", "b m k, b k n", "b m n", "batch1", "batch2")
_sum_with_product("addbmm", "b m k, b k n", "m n", "batch1", "batch2")
_sum_with_product("addmv", "m k, k", "m", "mat", "vec")
_sum_with_product("addr", "m, n", "m n", "vec1", "vec2")


def _letters(name: str, dims: Dims, contracted: dict[int, str]) -> list[str]:
    return [contracted.get(i, f"{name}{i}") for i in range(len(dims))]


def _over(left: Dims, right: Dims, pairs: list[tuple[int, int]]) -> Reading:
    """Two tensors summed over pairs of dimensions; what is left of the first comes before that of the second."""
    a = _letters("a", left, {i: f"k{n}" for n, (i, _) in enumerate(pairs)})
    b = _letters("b", right, {j: f"k{n}" for n, (_, j) in enumerate(pairs)})
    kept = [letter for letter in a + b if letter[0] != "k"]
    return [Operand(tuple(a), False, False), Operand(tuple(b), False, False)], tuple(kept), [left, right]


@contraction("inner")
def inner(out: Dims, self: Dims, other: Dims, **_: Any) -> Reading:
    """.. k, .. k -> .. .."""
    return _over(self, other, [(len(self) - 1, len(other) - 1)] if len(self) and len(other) else [])


@contraction("tensordot")
def tensordot(out: Dims, self: Dims, other: Dims, dims_self: list[int], dims_other: list[int], **_: Any) -> Reading:
    """a sum over pairs of dimensions"""
    return _over(self, other, [(i % len(self), j % len(other)) for i, j in zip(dims_self, dims_other)])


@contraction("linalg_multi_dot", "chain_matmul")
def multi_dot(out: Dims, **a: Any) -> Reading:
    """a b, b c, c d -> a d, where the first and the last may be vectors"""
    found: list[Dims] = next(v for v in a.values() if isinstance(v, list))
    rows = [[f"k{i}", f"k{i + 1}"] for i in range(len(found))]
    if len(found[0]) == 1:
        rows[0] = rows[0][1:]
    if len(found[-1]) == 1:
        rows[-1] = rows[-1][:1]
    kept = [*(rows[0][:1] if len(found[0]) == 2 else []), *(rows[-1][1:] if len(found[-1]) == 2 else [])]
    return [Operand(tuple(row), False, False) for row in rows], tuple(kept), list(found)


@contraction("einsum")
def einsum(out: Dims, tensors: list[Dims], equation: str = "", **_: Any) -> Reading:
    """the letters of its equation"""
    left, arrow, right = equation.replace(" ", "").partition("->")
    rows = [row.replace("...", "*") for row in left.split(",")]
    if not arrow:
        letters = "".join(rows)
        once = sorted(c for c in set(letters) if letters.count(c) == 1 and c != "*")
        right = ("*" if "*" in letters else "") + "".join(once)
    right = right.replace("...", "*")
    if not equation or any(len(set(row)) != len(row) for row in rows):
        raise Conflict("a letter that stands twice in one operand")
    return [operand(" ".join(row)) for row in rows], tuple(right), list(tensors)


def _resize_attention(sizes: Resize, out: Dims, query: Dims, scale: Any = None, **_: Any) -> dict[str, Any]:
    # The default scale is that of the width; the pruned model's is of the old one.
    if scale is None and sizes.changed(query[-1]):
        return {"scale": 1.0 / math.sqrt(sizes.old(query[-1]))}
    return {}


def _zero_of_attention(here: Here, out: Dims, query: Dims, key: Dims, value: Dims, **_: Any) -> Atoms:
    here.sums(query[-1], query.zero | key.zero)
    # Scores of removed heads may be anything: their values are zero, and so is what comes out.
    return {atom for atom in value.zero if atom in out.atoms()}


@relation("scaled_dot_product_attention", zero=_zero_of_attention, resize=_resize_attention)
def attention(
    here: Here,
    out: Dims,
    query: Dims,
    key: Dims,
    value: Dims,
    attn_mask: Dims | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    **_: Any,
) -> None:
    """* s d, * t d, * t e, +* s t? -> * s e"""
    here.tie(query[-1], key[-1])
    here.tie(value[-1], out[-1])
    here.tie(query[-2], out[-2])
    here.tie(key[-2], value[-2])
    here.freeze(key[-2], "a softmax runs over it")
    if is_causal:
        here.freeze(query[-2], "positions along it matter")
    tie_broadcast(here, Dims(out.axes[:-2]), [Dims(query.axes[:-2])])
    heads_differ = enable_gqa and len(key) > 2 and key[-3].root().size != query[-3].root().size
    for operand_ in (key, value):
        batch = operand_.axes[:-3] if heads_differ else operand_.axes[:-2]
        against = out.axes[:-3] if heads_differ else out.axes[:-2]
        tie_broadcast(here, Dims(against), [Dims(batch)])
    if heads_differ:
        # query head i reads key head i // n
        groups = key[-3].root().size
        each = query[-3].root().size.over(groups)
        if each is None:
            here.freeze_all([query, key, value, out], "its heads do not divide")
        else:
            parts = divide(query[-3], [groups, each], here.name)
            here.tie(parts[0], key[-3])
            here.tie(key[-3], value[-3])
    if attn_mask is not None:
        tie_broadcast(here, Dims((*out.axes[:-2], query[-2], key[-2])), [attn_mask])


def _zero_of_bag(here: Here, out: list[Dims], weight: Dims, **_: Any) -> Atoms:
    # The last output of a maximum holds positions, which are not zero.
    return (weight.zero & out[0].atoms()) - out[3].atoms()


@relation("embedding_bag", zero=_zero_of_bag)
def embedding_bag(here: Here, out: list[Dims], weight: Dims, **a: Any) -> None:
    """. d, . -> . d, .., a sum, mean or maximum of rows"""
    here.tie(weight[1], out[0][1])
    if len(out[3]) > 1:
        here.tie(weight[1], out[3][1])
    rest = [v for v in a.values() if isinstance(v, Dims)]
    rows = [Dims(dims.axes[:1]) for dims in (weight, out[0], out[3])]
    here.freeze_all([*rows, *out[1:3], *rest], "positions along it matter")
    here.writes(weight, weight[1])
