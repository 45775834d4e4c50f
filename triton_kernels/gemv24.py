"""gemv24: a linear layer for few tokens whose weight is 2:4 sparse, as `prune24.pack` packs it.

    x        [m, i] float32, float16 or bfloat16, rows contiguous
    values   [o, i / 2] of the same dtype
    meta     int32 [o, ceil(i / 32)]: for each four of x the places of its two values, `first | second << 2`
    y        [m, o] = act(x @ w.T + bias), with float32 sums

A thread takes a word of meta and its 16 values; the two of x that belong to each four are selected, not gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import activation, operands, prune24
from .activation import activate
from .language import constexpr, jit, on, tl


def reference(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, act: str = "") -> Tensor:
    """x [m, i] -> y [m, o], the definition."""
    return activation.reference(torch.nn.functional.linear(x, prune24.unpack(values, meta), bias), act)


def linear(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, act: str = "") -> Tensor:
    """x [m, i] -> y [m, o]. Raises ValueError for tensors that the kernel cannot read."""
    m, o, i = len(x), len(values), 2 * values.shape[1]
    operands.check(x, values, (o, i), bias)
    if i % 4 or meta.dtype is not torch.int32 or meta.shape != (o, -(-i // 32)) or meta.device != x.device:
        raise ValueError(f"meta is {meta.dtype} {list(meta.shape)} on {meta.device}, not int32 [{o}, {-(-i // 32)}]")
    if not (values.is_contiguous() and meta.is_contiguous()):
        raise ValueError("values and meta are not contiguous")
    y = torch.empty(m, o, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    tokens = 1 if m == 1 else 2 if m == 2 else 4
    rows, words = 8, 16
    with on(x):
        _gemv24[(-(-o // rows), -(-m // tokens))](
            x, values, meta, x if bias is None else bias, y, m, o, values.shape[1] // 2, x.stride(0),
            BIAS=bias is not None, KIND=activation.index(act), TOKENS=tokens, ROWS=rows, WORDS=words,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return y


@jit
def _gemv24(
    x, values, meta, bias, y, m, o, fours, stride,
    BIAS: constexpr, KIND: constexpr, TOKENS: constexpr, ROWS: constexpr, WORDS: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, 8)
    words = (fours + 7) // 8
    sums = tl.zeros((TOKENS, ROWS, WORDS), dtype=tl.float32)
    known = (token < m)[:, None, None]
    for start in tl.range(0, words, WORDS, num_stages=3):
        word = start + tl.arange(0, WORDS)
        packed = tl.load(
            meta + row[:, None] * words + word[None, :], mask=(row < o)[:, None] & (word < words)[None, :], other=0
        )
        four = word[:, None] * 8 + lane[None, :]
        inside = (row < o)[:, None, None] & (four < fours)[None, :, :]
        pair = tl.arange(0, 2)
        at = (row[:, None, None] * fours + four[None, :, :])[:, :, :, None] * 2 + pair[None, None, None, :]
        one, other = tl.split(tl.load(values + at, mask=inside[:, :, :, None], other=0.0).to(tl.float32))
        nibble = packed[:, :, None] >> (4 * lane)[None, None, :]
        first, second = nibble & 3, (nibble >> 2) & 3
        base = x + token.to(tl.int64)[:, None, None] * stride + (four * 4)[None, :, :]
        given = known & (four < fours)[None, :, :]
        a = tl.load(base, mask=given, other=0.0).to(tl.float32)[:, None, :, :]
        b = tl.load(base + 1, mask=given, other=0.0).to(tl.float32)[:, None, :, :]
        c = tl.load(base + 2, mask=given, other=0.0).to(tl.float32)[:, None, :, :]
        d = tl.load(base + 3, mask=given, other=0.0).to(tl.float32)[:, None, :, :]
        left = tl.where((first == 0)[None, :, :, :], a, tl.where((first == 1)[None, :, :, :], b, c))
        right = tl.where((second == 3)[None, :, :, :], d, tl.where((second == 2)[None, :, :, :], c, b))
        sums += tl.sum(one[None, :, :, :] * left + other[None, :, :, :] * right, 3)
    total = tl.sum(sums, 2)
    if BIAS:
        total += tl.load(bias + row, mask=row < o, other=0.0).to(tl.float32)[None, :]
    inside = (token < m)[:, None] & (row < o)[None, :]
    tl.store(
        y + token.to(tl.int64)[:, None] * o + row[None, :], activate(total, KIND).to(y.dtype.element_ty), mask=inside
    )
