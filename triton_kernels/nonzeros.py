"""nonzeros: a linear layer for few tokens whose weight is stored by its nonzero values and 8-bit columns.

    x        [m, i] float32, float16 or bfloat16, rows contiguous; i is at most 65536
    values   [groups, 8] of the same dtype: eight nonzeros of one row and of one chunk of 256 columns; what is left over
             in a chunk's last group is +0.0
    columns  uint8 [groups, 8]: the column of each within its chunk
    chunks   uint8 [groups]: the chunk
    order    int32 [o up to a multiple of 16]: the row at each place, those with most groups first; o where none is
    starts   int64 [places / 16 + 1]: where the groups of each 16 places begin, as a matrix [16, groups of the longest]
    y        [m, o] = act(x @ w.T + bias), with float32 sums

A thread takes a group: 16 bytes of values, 8 of columns, 1 of its chunk, which is 3.1 bytes a nonzero and nothing to be
summed up before they can be used. x comes from the L1 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import activation, operands
from .activation import activate
from .language import WHY_NOT, constexpr, jit, on, tl

GROUP, CHUNK, PLACES = 8, 256, 16


@dataclass(frozen=True)
class Nonzeros:
    """A weight [o, i] by its nonzeros, as above."""

    shape: tuple[int, int]
    values: Tensor
    columns: Tensor
    chunks: Tensor
    order: Tensor
    starts: Tensor


def pack(weight: Tensor) -> Nonzeros:
    """weight [o, i] -> its elements with any bit set. Raises ValueError for more than 65536 columns."""
    o, i = weight.shape
    if i > CHUNK * 256:
        raise ValueError(f"a weight of {i} columns is too wide for 256 chunks of {CHUNK}")
    chunks = -(-i // CHUNK)
    stored = torch.nn.functional.pad(operands.as_integers(weight) != 0, (0, chunks * CHUNK - i))
    counts = stored.view(o, chunks, CHUNK).sum(2)
    groups = (counts + GROUP - 1) // GROUP
    lengths = torch.nn.functional.pad(groups.sum(1), (0, -o % PLACES), value=-1)
    order = lengths.argsort(stable=True, descending=True)
    longest = lengths[order].view(-1, PLACES)[:, 0]
    starts = torch.nn.functional.pad((longest * PLACES).cumsum(0), (1, 0))
    # Where each row's groups begin, and each chunk's within it.
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))[:o]
    first = starts[place // PLACES] + place % PLACES * longest[place // PLACES]
    first = first.unsqueeze(1) + groups.cumsum(1) - groups
    row, column = stored.view(o, chunks * CHUNK).nonzero(as_tuple=True)
    chunk = column // CHUNK
    rank = (
        torch.arange(len(row), device=row.device)
        - (counts.flatten().cumsum(0) - counts.flatten())[row * chunks + chunk]
    )
    slot = first[row, chunk] * GROUP + rank
    total = int(starts[-1])
    values = weight.new_zeros(total * GROUP)
    values[slot] = weight[row, column]
    columns = torch.zeros(total * GROUP, dtype=torch.uint8, device=weight.device)
    columns[slot] = (column % CHUNK).to(torch.uint8)
    of_group = torch.zeros(total, dtype=torch.uint8, device=weight.device)
    of_group[slot // GROUP] = chunk.to(torch.uint8)
    order = order.clamp(max=o).to(torch.int32)
    return Nonzeros((o, i), values.view(-1, GROUP), columns.view(-1, GROUP), of_group, order, starts)


def reference_unpack(packed: Nonzeros) -> Tensor:
    """The weight [o, i], bit for bit as it was packed."""
    o, i = packed.shape
    longest = (packed.starts.diff() // PLACES).repeat_interleave(PLACES, output_size=len(packed.order))
    rows = packed.order.long().repeat_interleave(longest, output_size=len(packed.chunks))
    columns = packed.chunks.long().unsqueeze(1) * CHUNK + packed.columns
    # What fills groups up goes behind the weight. Every size is known beforehand, so that no device is waited for.
    values = operands.as_integers(packed.values)
    place = torch.where(values != 0, rows.unsqueeze(1) * i + columns, o * i)
    weight = values.new_zeros(o * i + 1).scatter_(0, place.flatten(), values.flatten())
    return weight[: o * i].view(packed.values.dtype).view(o, i)


def unpack(packed: Nonzeros) -> Tensor:
    """The weight [o, i], bit for bit as it was packed."""
    if WHY_NOT:
        raise RuntimeError(WHY_NOT)
    values = operands.as_integers(packed.values)
    weight = values.new_zeros(packed.shape)
    if packed.values.numel():
        with on(values):
            _unpack[(len(packed.order) // PLACES, 8)](
                values, packed.columns, packed.chunks, packed.order, packed.starts, weight, *packed.shape,
                PLACES=PLACES, GROUPS=8, GROUP=GROUP, CHUNK=CHUNK, num_warps=4,
            )  # fmt: skip
    return weight.view(packed.values.dtype)


def reference(x: Tensor, packed: Nonzeros, bias: Tensor | None = None, act: str = "") -> Tensor:
    """x [m, i] -> y [m, o], the definition."""
    return activation.reference(torch.nn.functional.linear(x, reference_unpack(packed), bias), act)


def linear(x: Tensor, packed: Nonzeros, bias: Tensor | None = None, act: str = "") -> Tensor:
    """x [m, i] -> y [m, o]. Raises ValueError for tensors that the kernel cannot read."""
    operands.check(x, packed.values, packed.shape, bias)
    m, (o, _) = len(x), packed.shape
    y = torch.empty(m, o, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    tokens = 1 if m == 1 else 2 if m == 2 else 4
    with on(x):
        _nonzeros[(len(packed.order) // PLACES * -(-m // tokens),)](
            x, packed.values, packed.columns, packed.chunks, packed.order, packed.starts,
            x if bias is None else bias, y, m, o, x.stride(0),
            BIAS=bias is not None, KIND=activation.index(act), TOKENS=tokens, PLACES=PLACES, GROUPS=8,
            GROUP=GROUP, CHUNK=CHUNK,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return y


@jit
def _nonzeros(
    x, values, columns, chunks, order, starts, bias, y, m, o, stride,
    BIAS: constexpr, KIND: constexpr, TOKENS: constexpr, PLACES: constexpr, GROUPS: constexpr,
    GROUP: constexpr, CHUNK: constexpr,
):  # fmt: skip
    # Programs of the same rows stand together, so that these are read from memory once.
    groups = tl.cdiv(m, TOKENS)
    slice_ = tl.program_id(0) // groups
    place = tl.arange(0, PLACES)
    token = tl.program_id(0) % groups * TOKENS + tl.arange(0, TOKENS)
    first = tl.load(starts + slice_)
    longest = (tl.load(starts + slice_ + 1) - first).to(tl.int32) // PLACES
    lane = tl.arange(0, GROUP)
    begin = first + place.to(tl.int64) * longest
    sums = tl.zeros((TOKENS, PLACES, GROUPS), dtype=tl.float32)
    rows = x + token.to(tl.int64)[:, None, None, None] * stride
    for start in tl.range(0, longest, GROUPS, num_stages=3):
        group = start + tl.arange(0, GROUPS)
        inside = (group < longest)[None, :]
        at = begin[:, None] + group[None, :]
        chunk = tl.load(chunks + at, mask=inside, other=0).to(tl.int32)
        slot = at[:, :, None] * GROUP + lane[None, None, :]
        value = tl.load(values + slot, mask=inside[:, :, None], other=0.0).to(tl.float32)
        column = tl.load(columns + slot, mask=inside[:, :, None], other=0).to(tl.int32) + chunk[:, :, None] * CHUNK
        known = inside[None, :, :, None] & (token < m)[:, None, None, None]
        given = tl.load(rows + column[None, :, :, :], mask=known, other=0.0).to(tl.float32)
        # What fills a group up adds nothing, whatever stands in x.
        sums += tl.sum(tl.where(value[None, :, :, :] != 0.0, given * value[None, :, :, :], 0.0), 3)
    row = tl.load(order + slice_ * PLACES + place)
    total = tl.sum(sums, 2)
    if BIAS:
        total += tl.load(bias + row, mask=row < o, other=0.0).to(tl.float32)[None, :]
    inside = (token < m)[:, None] & (row < o)[None, :]
    tl.store(
        y + token.to(tl.int64)[:, None] * o + row[None, :], activate(total, KIND).to(y.dtype.element_ty), mask=inside
    )


@jit
def _unpack(
    values, columns, chunks, order, starts, weight, o, i,
    PLACES: constexpr, GROUPS: constexpr, GROUP: constexpr, CHUNK: constexpr,
):  # fmt: skip
    place, lane = tl.arange(0, PLACES), tl.arange(0, GROUP)
    first = tl.load(starts + tl.program_id(0))
    longest = (tl.load(starts + tl.program_id(0) + 1) - first).to(tl.int32) // PLACES
    begin = first + place.to(tl.int64) * longest
    row = tl.load(order + tl.program_id(0) * PLACES + place)
    for start in range(tl.program_id(1) * GROUPS, longest, tl.num_programs(1) * GROUPS):
        group = start + tl.arange(0, GROUPS)
        inside = (row < o)[:, None] & (group < longest)[None, :]
        at = begin[:, None] + group[None, :]
        chunk = tl.load(chunks + at, mask=inside, other=0).to(tl.int32)
        slot = at[:, :, None] * GROUP + lane[None, None, :]
        value = tl.load(values + slot, mask=inside[:, :, None], other=0)
        column = tl.load(columns + slot, mask=inside[:, :, None], other=0).to(tl.int32) + chunk[:, :, None] * CHUNK
        # What fills a group up is written nowhere.
        tl.store(weight + row.to(tl.int64)[:, None, None] * i + column, value, mask=value != 0)
