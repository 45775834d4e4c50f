"""Products with a sum: linear, the matmul family, einsum, attention, embedding."""

from __future__ import annotations

import math
from typing import Any

from ..axis import atoms, divide
from .notation import axes, operand, relate, zero_of
from .relation import Atoms, Dims, Here, Resize, relation, tie_broadcast

axes("* i, o i, +o? -> * o", "linear")
axes("m k, k n -> m n", "mm")
axes("b m k, b k n -> b m n", "bmm")
axes("k, k -> ", "dot", "vdot")
axes("m k, k -> m", "mv")
axes("m, n -> m n", "outer", "ger")
axes(". d, * -> * d", "embedding", weight=0)
axes("* i, * j, o i j, +o? -> * o", "bilinear")


def _matmul_operands(x: Dims, y: Dims) -> tuple[str, str, str]:
    if len(x) == 1 and len(y) == 1:
        return "k", "k", ""
    if len(x) == 1:
        return "k", "* k n", "* n"
    if len(y) == 1:
        return "* m k", "k", "* m"
    return "* m k", "* k n", "* m n"


def _zero_of_matmul(here: Here, out: Dims, self: Dims, other: Dims, **_: Any) -> Atoms:
    a, b, result = _matmul_operands(self, other)
    return zero_of(here, [operand(a), operand(b)], tuple(result.split()), [self, other], out)


@relation("matmul", "__matmul__", zero=_zero_of_matmul)
def matmul(here: Here, out: Dims, self: Dims, other: Dims, **_: Any) -> None:
    """* m k, * k n -> * m n"""
    a, b, result = _matmul_operands(self, other)
    relate(here, [operand(a), operand(b)], tuple(result.split()), [self, other], out)
    if self.source and not other.source and len(self) > 1:
        here.writes(self, self[-2])


def _addmm(here: Here, out: Dims, given: list[Dims]) -> tuple[list[Any], tuple[str, ...], list[Dims | None]]:
    bias, x, y = given
    result = ("b", "m", "n") if len(out) == 3 else ("m", "n")
    batch = "b " if len(out) == 3 else ""
    letters = "+" + " ".join(result[len(result) - len(bias) :])
    return [operand(batch + "m k"), operand(batch + "k n"), operand(letters)], result, [x, y, bias]


def _zero_of_addmm(here: Here, out: Dims, self: Dims, **a: Any) -> Atoms:
    x, y = (a["mat1"], a["mat2"]) if "mat1" in a else (a["batch1"], a["batch2"])
    operands, result, given = _addmm(here, out, [self, x, y])
    return zero_of(here, operands, result, given, out)


@relation("addmm", "baddbmm", zero=_zero_of_addmm)
def addmm(here: Here, out: Dims, self: Dims, **a: Any) -> None:
    """+m n, m k, k n -> m n"""
    x, y = (a["mat1"], a["mat2"]) if "mat1" in a else (a["batch1"], a["batch2"])
    operands, result, given = _addmm(here, out, [self, x, y])
    relate(here, operands, result, given, out)


@relation("addbmm", zero=lambda here, out, **_: set())
def addbmm(here: Here, out: Dims, **a: Any) -> None:
    """a sum over batches, which freezes"""
    here.freeze_all([out, *(v for v in a.values() if isinstance(v, Dims))], "no rule that shrinks it")


def _einsum(equation: str, tensors: list[Dims], out: Dims) -> tuple[list[Any], tuple[str, ...]] | None:
    left, arrow, right = equation.replace(" ", "").partition("->")
    rows = [row.replace("...", "*") for row in left.split(",")]
    if not arrow:
        letters = "".join(rows)
        right = ("*" if "*" in letters else "") + "".join(
            sorted(c for c in set(letters) if letters.count(c) == 1 and c != "*")
        )
    right = right.replace("...", "*")
    if any(len(set(row)) != len(row) for row in [*rows, right]):
        return None
    return [operand(" ".join(row)) for row in rows], tuple(right)


def _zero_of_einsum(here: Here, out: Dims, equation: str, tensors: list[Dims], **_: Any) -> Atoms:
    read = _einsum(equation, tensors, out)
    return set() if read is None else zero_of(here, read[0], read[1], list(tensors), out)


@relation("einsum", zero=_zero_of_einsum)
def einsum(here: Here, out: Dims, equation: str, tensors: list[Dims], **_: Any) -> None:
    """the letters of its equation"""
    read = _einsum(equation, tensors, out)
    if read is None:
        here.freeze_all([out, *tensors], "a letter that stands twice in one operand")
        return
    relate(here, read[0], read[1], list(tensors), out)


def _resize_attention(sizes: Resize, out: Dims, query: Dims, scale: Any = None, **_: Any) -> dict[str, Any]:
    # The default scale is that of the width; the pruned model's is of the old one.
    if scale is None and sizes.changed(query[-1]):
        return {"scale": 1.0 / math.sqrt(sizes.old(query[-1]))}
    return {}


def _zero_of_attention(here: Here, out: Dims, query: Dims, key: Dims, value: Dims, **_: Any) -> Atoms:
    for atom in atoms(query[-1]):
        if not atom.frozen and atom not in query.zero | key.zero:
            here.freeze(atom, "summed over where its removed indices are not zero")
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
    enable_gqa: bool = False,
    **_: Any,
) -> None:
    """* s d, * t d, * t e, +* s t? -> * s e"""
    here.tie(query[-1], key[-1])
    here.tie(value[-1], out[-1])
    here.tie(query[-2], out[-2])
    here.tie(key[-2], value[-2])
    here.freeze(key[-2], "a softmax runs over it")
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
