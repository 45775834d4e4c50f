"""prune24: which n of every m weights stay, and the packing of 2:4 weights, each in one walk over the weight.

    weight  [o, i] float32, float16 or bfloat16, contiguous; i is a multiple of m (1 to 16)
    bits    uint8 [ceil(o * i / 8)]: `select`'s answer; bit j of byte b is element 8 b + j in flat order, 1 = kept
    values  [o, i / 2] of the weight's dtype: `pack`'s two of each four, in order
    meta    int32 [o, ceil(i / 32)]: four bits for each four, their places `first | second << 2`, lowest bits first

The n largest magnitudes of each m neighbours along i stay; of equal ones those that come later. NaN is above all.
`pack` keeps the two largest, so a weight that has at most two nonzeros in each four comes back whole (`unpack`), but
for -0.0, which becomes +0.0: a four with fewer nonzeros holds zeros in the places that are left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import operands
from .language import WHY_NOT, constexpr, jit, on, tl

_INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def reference_select(weight: Tensor, n: int, m: int) -> Tensor:
    """weight [o, i] -> which stay, bool [o, i], by sorting."""
    keys = _keys(weight).view(-1, m)
    gone = keys.argsort(dim=1, stable=True)[:, : m - n]
    return torch.ones_like(keys, dtype=torch.bool).scatter_(1, gone, False).view(weight.shape)


def reference_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [o, i] -> values [o, i / 2] and meta int32 [o, ceil(i / 32)]."""
    o, i = weight.shape
    keep = reference_select(weight, 2, 4).view(-1, 4)
    places = torch.arange(4, device=weight.device).expand_as(keep)[keep].view(-1, 2)
    values = weight.reshape(-1, 4)[keep].view(o, i // 2)
    nibbles = (places[:, 0] | places[:, 1] << 2).view(o, i // 4)
    words = torch.nn.functional.pad(nibbles, (0, -(i // 4) % 8)).unflatten(1, (-(-i // 32), 8))
    words = (words << torch.arange(0, 32, 4, device=weight.device)).sum(-1)
    return torch.where(values == 0, 0.0, values), words.to(torch.int32)


def reference_unpack(values: Tensor, meta: Tensor) -> Tensor:
    """values [o, i / 2], meta int32 [o, ceil(i / 32)] -> weight [o, i]."""
    o, i = len(values), 2 * values.shape[1]
    nibbles = meta.unsqueeze(-1).bitwise_right_shift(torch.arange(0, 32, 4, device=meta.device)).bitwise_and(15)
    nibbles = nibbles.flatten(1)[:, : i // 4]
    places = torch.stack([nibbles & 3, nibbles >> 2], -1).long()
    # As integers, since copies of a NaN may be other NaNs.
    given = values.view(_INTEGERS[values.dtype]).view(o, i // 4, 2)
    return given.new_zeros(o, i // 4, 4).scatter_(2, places, given).view(values.dtype).view(o, i)


def select(weight: Tensor, n: int, m: int) -> Tensor:
    """weight [o, i] -> bits uint8 [ceil(o * i / 8)]. Raises ValueError for what the kernel cannot do."""
    if not 1 <= m <= 16 or not 0 <= n <= m:
        raise ValueError(f"the kernel selects n of up to 16 neighbours, not {n} of {m}")
    _check(weight, m)
    groups = weight.numel() // m
    lanes = 1 << (m - 1).bit_length()
    # Where groups fill their lanes eight neighbours are a byte; else each element is one first.
    whole, block = m == lanes, 1024 // lanes
    keep = torch.empty(-(-weight.numel() // 8) * (1 if whole else 8), dtype=torch.uint8, device=weight.device)
    if groups:
        with on(weight):
            _select[(-(-groups // block),)](
                weight.view(_INTEGERS[weight.dtype]), keep, groups, n, m,
                LANES=lanes, BLOCK=block, WHOLE=whole, num_warps=4,
            )  # fmt: skip
    if whole:
        return keep
    keep[weight.numel() :] = 0
    shifts = torch.arange(8, dtype=torch.uint8, device=keep.device)
    return keep.view(-1, 8).bitwise_left_shift(shifts).sum(1, dtype=torch.uint8)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [o, i] -> values [o, i / 2] and meta int32 [o, ceil(i / 32)]. Raises ValueError as `select` does."""
    _check(weight, 4)
    o, i = weight.shape
    values = torch.empty(o, i // 2, dtype=weight.dtype, device=weight.device)
    meta = torch.empty(o, -(-i // 32), dtype=torch.int32, device=weight.device)
    if weight.numel():
        integer = _INTEGERS[weight.dtype]
        block = 256
        with on(weight):
            _pack[(o, -(-i // (4 * block)))](
                weight.view(integer), values.view(integer), meta, i // 4, meta.shape[1], BLOCK=block, num_warps=4
            )
    return values, meta


def unpack(values: Tensor, meta: Tensor) -> Tensor:
    """values [o, i / 2], meta int32 [o, ceil(i / 32)] -> weight [o, i]. Raises ValueError for other tensors."""
    _check(values, 2)
    o, i = len(values), 2 * values.shape[1]
    operands.check_meta(meta, values, (o, i))
    weight = torch.empty(o, i, dtype=values.dtype, device=values.device)
    if weight.numel():
        integer, block = _INTEGERS[values.dtype], 256
        with on(values):
            _unpack[(o, -(-i // (4 * block)))](
                values.view(integer), meta, weight.view(integer), i // 4, meta.shape[1], BLOCK=block, num_warps=4
            )
    return weight


def _keys(weight: Tensor) -> Tensor:
    integer = _INTEGERS[weight.dtype]
    return weight.contiguous().view(integer) & torch.iinfo(integer).max


def _check(weight: Tensor, m: int) -> None:
    if WHY_NOT:
        raise RuntimeError(WHY_NOT)
    if weight.dtype not in _INTEGERS or weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError(f"the kernel reads contiguous float matrices, not {weight.dtype} {list(weight.shape)}")
    if weight.shape[1] % m:
        raise ValueError(f"rows of {weight.shape[1]} are no multiple of {m}")


@jit
def _select(weight, keep, groups, n, m, LANES: constexpr, BLOCK: constexpr, WHOLE: constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)
    inside = (group < groups)[:, None] & (lane < m)[None, :]
    place = group[:, None] * m + lane[None, :]
    bits = tl.load(weight + place, mask=inside, other=0)
    most = 0x7FFFFFFF if weight.dtype.element_ty == tl.int32 else 0x7FFF
    # What is no element is below all, so it takes the place of none.
    key = tl.where(lane[None, :] < m, (bits & most).to(tl.int32), -1)
    before = (key[:, None, :] > key[:, :, None]) | (
        (key[:, None, :] == key[:, :, None]) & (lane[None, None, :] > lane[None, :, None])
    )
    rank = tl.sum(before.to(tl.int32), 2)
    stays = (rank < n) & inside
    if WHOLE:
        bits = tl.reshape(stays.to(tl.int32), (BLOCK * LANES // 8, 8)) << tl.arange(0, 8)[None, :]
        byte = tl.program_id(0).to(tl.int64) * (BLOCK * LANES // 8) + tl.arange(0, BLOCK * LANES // 8)
        tl.store(keep + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte * 8 // m < groups)
    else:
        tl.store(keep + place, stays.to(tl.uint8), mask=inside)


@jit
def _pack(weight, values, meta, fours, words, BLOCK: constexpr):
    row = tl.program_id(0).to(tl.int64)
    four = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = four < fours
    place = (row * fours + four)[:, None] * 4 + tl.arange(0, 4)[None, :]
    bits = tl.load(weight + place, mask=inside[:, None], other=0)
    even, odd = tl.split(tl.reshape(bits, (BLOCK, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    most = 0x7FFFFFFF if weight.dtype.element_ty == tl.int32 else 0x7FFF
    p, q, r, s = (a & most), (b & most), (c & most), (d & most)
    # Six comparisons rank four; of equal ones the later is above.
    pq, pr, ps = (p > q).to(tl.int32), (p > r).to(tl.int32), (p > s).to(tl.int32)
    qr, qs, rs = (q > r).to(tl.int32), (q > s).to(tl.int32), (r > s).to(tl.int32)
    keep_a = pq + pr + ps >= 2
    keep_b = (1 - pq) + qr + qs >= 2
    keep_c = (1 - pr) + (1 - qr) + rs >= 2
    first = tl.where(keep_a, 0, tl.where(keep_b, 1, 2))
    second = tl.where(keep_a & keep_b, 1, tl.where(keep_c & (keep_a | keep_b), 2, 3))
    one = tl.where(keep_a, a, tl.where(keep_b, b, c))
    other = tl.where(keep_a & keep_b, b, tl.where(keep_c & (keep_a | keep_b), c, d))
    pair = tl.join(tl.where((one & most) == 0, 0, one), tl.where((other & most) == 0, 0, other))
    spot = (row * fours + four)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(values + spot, pair.to(values.dtype.element_ty), mask=inside[:, None])
    nibble = tl.where(inside, first | (second << 2), 0)
    word = tl.sum(tl.reshape(nibble, (BLOCK // 8, 8)) << (4 * tl.arange(0, 8))[None, :], 1)
    at = tl.program_id(1) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(meta + row * words + at, word, mask=at < words)


@jit
def _unpack(values, meta, weight, fours, words, BLOCK: constexpr):
    row = tl.program_id(0).to(tl.int64)
    four = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = four < fours
    spot = (row * fours + four)[:, None] * 2 + tl.arange(0, 2)[None, :]
    one, other = tl.split(tl.load(values + spot, mask=inside[:, None], other=0))
    nibble = tl.load(meta + row * words + four // 8, mask=inside, other=0) >> (4 * (four & 7))
    place = tl.arange(0, 4)[None, :]
    second = tl.where(place == ((nibble >> 2) & 3)[:, None], other[:, None], 0)
    both = tl.where(place == (nibble & 3)[:, None], one[:, None], second)
    at = (row * fours + four)[:, None] * 4 + place
    tl.store(weight + at, both.to(weight.dtype.element_ty), mask=inside[:, None])
