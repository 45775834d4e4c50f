"""gemv24: a linear layer for few tokens whose weight is 2:4 sparse, as `prune24.pack` packs it.

    x        [m, i] float16 or bfloat16, rows contiguous
    values   [o, i / 2] of the same dtype
    meta     int32 [o, ceil(i / 32)]: for each four of x the places of its two values, `first | second << 2`
    y        [m, o] = act(x @ w.T + bias), with float32 sums

A thread takes words of meta and their 16 values. Four of x are one number of 64 bits, and the two that belong to the
values of a four are shifted out of it: nothing is gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import activation, operands, prune24
from .activation import activate
from .language import constexpr, jit, on, tl


def reference(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, act: str = "") -> Tensor:
    """x [m, i] -> y [m, o], the definition."""
    return activation.reference(torch.nn.functional.linear(x, prune24.reference_unpack(values, meta), bias), act)


def linear(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, act: str = "") -> Tensor:
    """x [m, i] -> y [m, o]. Raises ValueError for tensors that the kernel cannot read."""
    m, o, i = len(x), len(values), 2 * values.shape[1]
    operands.check(x, values, (o, i), bias)
    if x.element_size() != 2:
        raise ValueError(f"the kernel reads four elements of 16 bits at once, not {x.dtype}")
    operands.check_meta(meta, values, (o, i))
    y = torch.empty(m, o, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    tokens = 1 if m == 1 else 2 if m == 2 else 4
    rows, words = 8, 16
    # A row of x that begins between two fours is moved.
    aligned = x.stride(0) % 4 == 0 and x.storage_offset() % 4 == 0 and x.data_ptr() % 8 == 0
    fours = (x if aligned else x.clone(memory_format=torch.contiguous_format)).view(torch.int64)
    with on(x):
        _gemv24[(-(-o // rows) * -(-m // tokens),)](
            fours, values, meta, x if bias is None else bias, y, m, o, fours.shape[1], fours.stride(0),
            BIAS=bias is not None, KIND=activation.index(act), TOKENS=tokens, ROWS=rows, WORDS=words,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return y


@jit
def _gemv24(
    x, values, meta, bias, y, m, o, fours, stride,
    BIAS: constexpr, KIND: constexpr, TOKENS: constexpr, ROWS: constexpr, WORDS: constexpr,
):  # fmt: skip
    # Programs of the same rows stand together, so that these are read from memory once.
    groups = tl.cdiv(m, TOKENS)
    row = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) % groups * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, 8)
    words = (fours + 7) // 8
    kind = values.dtype.element_ty
    # Added up across threads once, behind the loop.
    sums = tl.zeros((TOKENS, ROWS, WORDS, 8), dtype=tl.float32)
    real, known = row < o, (token < m)[:, None, None]
    for start in tl.range(0, words, WORDS, num_stages=3):
        word = start + tl.arange(0, WORDS)
        packed = tl.load(
            meta + row[:, None] * words + word[None, :], mask=real[:, None] & (word < words)[None, :], other=0
        )
        # Sixteen neighbours in the last dimension, so that they are loaded 16 bytes at a time.
        slot = word[:, None] * 16 + tl.arange(0, 16)[None, :]
        inside = real[:, None, None] & (slot < fours * 2)[None, :, :]
        stored = tl.load(values + row[:, None, None] * fours * 2 + slot[None, :, :], mask=inside, other=0.0)
        one, other = tl.split(tl.reshape(stored, (ROWS, WORDS, 8, 2)))
        four = word[:, None] * 8 + lane[None, :]
        place = token.to(tl.int64)[:, None, None] * stride + four[None, :, :]
        given = tl.load(x + place, mask=known & (four < fours)[None, :, :], other=0)[:, None, :, :]
        nibble = packed[:, :, None] >> (4 * lane)[None, None, :]
        first, second = ((nibble & 3) * 16).to(tl.int64), ((nibble & 12) * 4).to(tl.int64)
        left = (given >> first[None, :, :, :]).to(tl.int16).to(kind, bitcast=True).to(tl.float32)
        right = (given >> second[None, :, :, :]).to(tl.int16).to(kind, bitcast=True).to(tl.float32)
        sums = tl.fma(tl.broadcast_to(one.to(tl.float32)[None, :, :, :], sums.shape), left, sums)
        sums = tl.fma(tl.broadcast_to(other.to(tl.float32)[None, :, :, :], sums.shape), right, sums)
    total = tl.sum(tl.sum(sums, 3), 2)
    if BIAS:
        total += tl.load(bias + row, mask=real, other=0.0).to(tl.float32)[None, :]
    inside = (token < m)[:, None] & real[None, :]
    tl.store(
        y + token.to(tl.int64)[:, None] * o + row[None, :], activate(total, KIND).to(y.dtype.element_ty), mask=inside
    )
