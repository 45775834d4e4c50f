"""blocks: a linear layer whose weight is made of tiles, most of which are zero and not stored.

    x        [m, i] float32, float16 or bfloat16, rows contiguous
    values   [tiles, h, w] of the same dtype: the tiles that are stored, by rows of tiles; h, w are 16, 32, 64 ...
    columns  int32 [tiles]: the place of each in its row of tiles
    starts   int32 [o / h + 1]: where each row of tiles begins
    order    int32 [o / h]: the rows of tiles, those with most tiles first, so that the last programs are short
    y        [m, o] = act(x @ w.T + bias), with float32 sums

A row of tiles without any still gives act(bias). Few rows of x (decoding) leave most of a device idle, so there several
programs share a row of tiles and their sums are added in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import activation, operands
from .activation import activate
from .language import constexpr, jit, on, tl


@dataclass(frozen=True)
class Tiles:
    """A weight [o, i] by its tiles, as above."""

    shape: tuple[int, int]
    values: Tensor
    columns: Tensor
    starts: Tensor
    order: Tensor


def pack(weight: Tensor, tile: tuple[int, int]) -> Tiles:
    """weight [o, i] -> its tiles that hold any bit. Raises ValueError where tiles do not divide it."""
    (o, i), (h, w) = weight.shape, tile
    if h < 1 or w < 1 or o % h or i % w:
        raise ValueError(f"tiles {h}x{w} do not divide a weight {o}x{i}")
    tiles = weight.reshape(o // h, h, i // w, w).transpose(1, 2)
    stored = (operands.as_integers(tiles) != 0).flatten(2).any(2)
    counts = stored.sum(1)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    columns = stored.nonzero()[:, 1].to(torch.int32)
    order = counts.argsort(stable=True, descending=True).to(torch.int32)
    return Tiles((o, i), tiles[stored].contiguous(), columns, starts, order)


def unpack(tiles: Tiles) -> Tensor:
    """The weight [o, i], bit for bit as it was packed."""
    (o, i), (_, h, w) = tiles.shape, tiles.values.shape
    rows = torch.arange(o // h, device=tiles.starts.device)
    rows = rows.repeat_interleave(tiles.starts.diff(), output_size=len(tiles.values))
    weight = tiles.values.new_zeros(o // h, i // w, h, w)
    weight[rows, tiles.columns.long()] = tiles.values
    return weight.transpose(1, 2).reshape(o, i)


def reference(x: Tensor, tiles: Tiles, bias: Tensor | None = None, act: str = "") -> Tensor:
    """x [m, i] -> y [m, o], the definition."""
    return activation.reference(torch.nn.functional.linear(x, unpack(tiles), bias), act)


def linear(x: Tensor, tiles: Tiles, bias: Tensor | None = None, act: str = "") -> Tensor:
    """x [m, i] -> y [m, o]. Raises ValueError for tensors that the kernel cannot read."""
    (o, i), (_, h, w) = tiles.shape, tiles.values.shape
    operands.check(x, tiles.values, (o, i), bias)
    if h < 16 or w < 16 or h & (h - 1) or w & (w - 1):
        raise ValueError(f"the kernel takes tiles whose sides are powers of two from 16 on, not {h}x{w}")
    m = len(x)
    y = torch.empty(m, o, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    rows = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    blocks, programs = o // h, -(-m // rows) * (o // h)
    shares = _shares(programs, i // w, x.device)
    sums = y if shares == 1 else torch.empty(shares, m, o, dtype=torch.float32, device=x.device)
    kind = activation.index(act)
    with on(x):
        _blocks[(blocks, -(-m // rows), shares)](
            x, tiles.values, tiles.columns, tiles.starts, tiles.order, x if bias is None else bias, sums,
            m, o, x.stride(0),
            BIAS=bias is not None and shares == 1, KIND=kind if shares == 1 else 0, PRECISION=operands.precision(x),
            SHARES=shares, ROWS=rows, H=h, W=w, num_warps=8 if rows * h >= 128 * 64 else 4,
            num_stages=7 if x.element_size() == 2 else 2,
        )  # fmt: skip
    if shares > 1:
        with on(x):
            _add[(m, -(-o // 1024))](
                sums,
                x if bias is None else bias,
                y,
                m * o,
                o,
                BIAS=bias is not None,
                KIND=kind,
                SHARES=shares,
                BLOCK=1024,
            )
    return y


def _shares(programs: int, longest: int, device: torch.device) -> int:
    """How many programs share a row of tiles, a power of two, so that about two of each fill the device."""
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    shares = 1
    while shares < 8 and programs * shares < 2 * units and longest > 4 * shares:
        shares *= 2
    return shares


@jit
def _blocks(
    x, values, columns, starts, order, bias, found, m, o, stride,
    BIAS: constexpr, KIND: constexpr, PRECISION: constexpr, SHARES: constexpr,
    ROWS: constexpr, H: constexpr, W: constexpr,
):  # fmt: skip
    block = tl.load(order + tl.program_id(0))
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first, last = tl.load(starts + block), tl.load(starts + block + 1)
    inside = (row < m)[:, None]
    lane, depth = tl.arange(0, H), tl.arange(0, W)
    sums = tl.zeros((ROWS, H), dtype=tl.float32)
    for tile in range(first + tl.program_id(2), last, SHARES):
        column = tl.load(columns + tile)
        left = tl.load(x + row[:, None] * stride + (column * W + depth)[None, :], mask=inside, other=0.0)
        right = tl.load(values + (tile * H + lane.to(tl.int64))[None, :] * W + depth[:, None])
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    place = block * H + lane
    if BIAS:
        sums += tl.load(bias + place).to(tl.float32)[None, :]
    at = tl.program_id(2).to(tl.int64) * m * o + row[:, None] * o + place[None, :]
    tl.store(found + at, activate(sums, KIND).to(found.dtype.element_ty), mask=inside)


@jit
def _add(
    sums, bias, y, size, o,
    BIAS: constexpr, KIND: constexpr, SHARES: constexpr, BLOCK: constexpr,
):  # fmt: skip
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * o + place
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(sums + share * size + at, mask=place < o, other=0.0)
    if BIAS:
        total += tl.load(bias + place, mask=place < o, other=0.0).to(tl.float32)
    tl.store(y + at, activate(total, KIND).to(y.dtype.element_ty), mask=place < o)
