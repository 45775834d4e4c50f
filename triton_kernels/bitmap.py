"""bitmap: a linear layer for few tokens whose weight is stored by one bit an element and its nonzero values.

    x       [m, i] float32, float16 or bfloat16, rows contiguous
    bits    int32 [o, words], words = ceil(i / 32): bit j of word c says whether column 32 c + j is stored
    values  [nonzeros] of x's dtype: row after row, columns in order
    starts  int64 [o]: where each row begins in values
    ranks   uint16 [o, ceil(words / 2)]: how many of a row's values come before each 64 columns
    y       [m, o] = act(x @ w.T + bias), with float32 sums

Where a value lies follows from the rank of its 64 columns and from counting bits below it, so that no thread waits for
another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import activation, operands
from .activation import activate
from .language import WHY_NOT, constexpr, jit, on, tl


@dataclass(frozen=True)
class Bitmap:
    """A weight [o, i] by its bits and nonzeros, as above."""

    shape: tuple[int, int]
    bits: Tensor
    values: Tensor
    starts: Tensor
    ranks: Tensor


def pack(weight: Tensor) -> Bitmap:
    """weight [o, i] -> its elements with any bit set. Raises ValueError for rows of more than 65535 of them."""
    o, i = weight.shape
    stored = operands.as_integers(weight) != 0
    words = -(-i // 32)
    lanes = torch.nn.functional.pad(stored, (0, words * 32 - i)).unflatten(1, (words, 32))
    # The sum of distinct bits below 2 ** 32, as the int32 of the same bits.
    bits = (lanes.long() << torch.arange(32, device=weight.device)).sum(2).to(torch.int32)
    counts = stored.sum(1)
    if int(counts.max() if o else 0) > 65535:
        raise ValueError(f"a row of {int(counts.max())} nonzeros is too long for ranks of 16 bits")
    starts = counts.cumsum(0) - counts
    pairs = torch.nn.functional.pad(lanes.sum(2), (0, words % 2)).unflatten(1, (-(-words // 2), 2)).sum(2)
    ranks = (pairs.cumsum(1) - pairs).to(torch.int32).to(torch.uint16)
    return Bitmap((o, i), bits, weight[stored], starts, ranks)


def reference_unpack(packed: Bitmap) -> Tensor:
    """The weight [o, i], bit for bit as it was packed."""
    o, i = packed.shape
    lanes = packed.bits.unsqueeze(2).bitwise_right_shift(torch.arange(32, device=packed.bits.device)).bitwise_and(1)
    stored = lanes.flatten(1)[:, :i]
    if not packed.values.numel():
        return packed.values.new_zeros(o, i)
    # Every size is known beforehand, so that no device is waited for.
    place = packed.starts.unsqueeze(1) + stored.cumsum(1) - stored
    return torch.where(stored.bool(), packed.values[place.clamp(max=len(packed.values) - 1)], 0.0)


def unpack(packed: Bitmap) -> Tensor:
    """The weight [o, i], bit for bit as it was packed."""
    if WHY_NOT:
        raise RuntimeError(WHY_NOT)
    (o, i), rows, words = packed.shape, 8, 16
    values = operands.as_integers(packed.values)
    weight = torch.empty(o, i, dtype=values.dtype, device=values.device)
    if weight.numel():
        count = packed.bits.shape[1]
        with on(values):
            _unpack[(-(-o // rows), -(-count // words))](
                packed.bits, values, packed.starts, packed.ranks, weight, o, i, count,
                ROWS=rows, WORDS=words, num_warps=4,
            )  # fmt: skip
    return weight.view(packed.values.dtype)


def reference(x: Tensor, packed: Bitmap, bias: Tensor | None = None, act: str = "") -> Tensor:
    """x [m, i] -> y [m, o], the definition."""
    return activation.reference(torch.nn.functional.linear(x, reference_unpack(packed), bias), act)


def linear(x: Tensor, packed: Bitmap, bias: Tensor | None = None, act: str = "") -> Tensor:
    """x [m, i] -> y [m, o]. Raises ValueError for tensors that the kernel cannot read."""
    operands.check(x, packed.values, packed.shape, bias)
    m, (o, _) = len(x), packed.shape
    y = torch.empty(m, o, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    tokens = 1 if m == 1 else 2 if m == 2 else 4
    rows, words = 8, 16
    with on(x):
        _bitmap[(-(-o // rows) * -(-m // tokens),)](
            x, packed.bits, packed.values, packed.starts, packed.ranks, x if bias is None else bias, y,
            m, o, packed.shape[1], packed.bits.shape[1], x.stride(0),
            BIAS=bias is not None, KIND=activation.index(act), TOKENS=tokens, ROWS=rows, WORDS=words,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return y


@jit
def _counts(word):
    """Word int32 -> the bits set in each of its bytes."""
    pairs = word - ((word >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (nibbles + (nibbles >> 4)) & 0x0F0F0F0F


@jit
def _decoded(bits, values, ranks, begin, row, word, real, words, ROWS: constexpr, WORDS: constexpr):
    """Values [ROWS, WORDS, 4, 8] of words of bits, 0 where none is stored, and which are."""
    byte, lane = tl.arange(0, 4), tl.arange(0, 8)
    inside = real[:, None] & (word < words)[None, :]
    at = row[:, None] * words + word[None, :]
    packed = tl.load(bits + at, mask=inside, other=0)
    odd = (word & 1) != 0
    lower = tl.load(bits + at - 1, mask=inside & odd[None, :], other=0)
    rank = tl.load(ranks + row[:, None] * ((words + 1) // 2) + (word // 2)[None, :], mask=inside, other=0)
    # Multiplied by ones, the last byte is the sum of all, and each the sum of those up to it.
    before = ((_counts(lower) * 0x01010101) >> 24) & 0xFF
    below = (_counts(packed) * 0x01010101) << 8
    first = begin[:, None] + rank.to(tl.int32) + before
    octet = (packed[:, :, None] >> (8 * byte)[None, None, :]) & 0xFF
    offset = first[:, :, None] + ((below[:, :, None] >> (8 * byte)[None, None, :]) & 0xFF)
    # The same within a byte: its bits spread to nibbles, and shifted on by one, so that each has those below it.
    spread = (octet | (octet << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    lanes = (spread * 0x11111110)[:, :, :, None] >> (4 * lane)[None, None, None, :]
    spot = offset[:, :, :, None] + (lanes & 0xF)
    kept = ((octet[:, :, :, None] >> lane[None, None, None, :]) & 1) != 0
    return tl.load(values + spot, mask=kept, other=0), kept


@jit
def _bitmap(
    x, bits, values, starts, ranks, bias, y, m, o, i, words, stride,
    BIAS: constexpr, KIND: constexpr, TOKENS: constexpr, ROWS: constexpr, WORDS: constexpr,
):  # fmt: skip
    # Programs of the same rows stand together, so that these are read from memory once.
    groups = tl.cdiv(m, TOKENS)
    row = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) % groups * TOKENS + tl.arange(0, TOKENS)
    real = row < o
    begin = tl.load(starts + row, mask=real, other=0)
    # Added up across threads once, behind the loop.
    sums = tl.zeros((TOKENS, ROWS, WORDS, 4), dtype=tl.float32)
    for start in tl.range(0, words, WORDS, num_stages=3):
        word = start + tl.arange(0, WORDS)
        value, stays = _decoded(bits, values, ranks, begin, row, word, real, words, ROWS, WORDS)
        column = word[:, None] * 32 + tl.arange(0, 32)[None, :]
        given = tl.load(
            x + token.to(tl.int64)[:, None, None] * stride + column[None, :, :],
            mask=(token < m)[:, None, None] & (column < i)[None, :, :], other=0.0,
        )  # fmt: skip
        given = tl.reshape(given, (TOKENS, 1, WORDS, 4, 8)).to(tl.float32)
        terms = tl.where(stays[None, :, :, :, :], given * value.to(tl.float32)[None, :, :, :, :], 0.0)
        sums += tl.sum(terms, 4)
    total = tl.sum(tl.sum(sums, 3), 2)
    if BIAS:
        total += tl.load(bias + row, mask=real, other=0.0).to(tl.float32)[None, :]
    inside = (token < m)[:, None] & real[None, :]
    tl.store(
        y + token.to(tl.int64)[:, None] * o + row[None, :], activate(total, KIND).to(y.dtype.element_ty), mask=inside
    )


@jit
def _unpack(bits, values, starts, ranks, weight, o, i, words, ROWS: constexpr, WORDS: constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    real = row < o
    begin = tl.load(starts + row, mask=real, other=0)
    value, _ = _decoded(bits, values, ranks, begin, row, word, real, words, ROWS, WORDS)
    column = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    at = row[:, None, None] * i + column[None, :, :]
    inside = real[:, None, None] & (column < i)[None, :, :]
    tl.store(weight + at, tl.reshape(value, (ROWS, WORDS, 32)), mask=inside)
