"""weights: the weight of a convolution as the kernel of a net reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.errors import InputError

from .. import segments
from ..segments import Segments
from .steps import Conv
from .taps import Taps


def pack(weight: Tensor, taps: Taps, tile: int, row_block: int, k_block: int) -> Segments:
    """The nonzeros of a weight [o, i, kh, kw], for tiles of this width; `columns` are vectors of the block."""
    o, i, kh, kw = weight.shape
    packed = segments.pack(weight.reshape(o, i * kh * kw), row_block, k_block * kh * kw)
    return packed._replace(columns=_table(taps, tile, k_block)[packed.columns.long()])


def unpack(packed: Segments, shape: Sequence[int], taps: Taps, tile: int, row_block: int, k_block: int) -> Tensor:
    """The weight [o, i, kh, kw], bit for bit as it was packed."""
    o, i = shape
    table = _table(taps, tile, k_block).long() & 0xFFFF
    column = torch.full((k_block * taps.places(tile),), -1, dtype=torch.int16)
    column[table] = torch.arange(len(table), dtype=torch.int16)
    columns = column[packed.columns.long() & 0xFFFF]
    per = math.prod(taps.kernel)
    dense = segments.unpack(packed._replace(columns=columns), (o, i * per), row_block, k_block * per)
    return dense.view(o, i, *taps.kernel)


def _table(taps: Taps, tile: int, k_block: int) -> Tensor:
    """The vector of each (channel, tap) of a K-block, as the bits of a 16-bit integer without sign."""
    offsets, places = torch.tensor(taps.offsets(tile)), taps.places(tile)
    table = torch.arange(k_block).unsqueeze(1) * places + offsets
    if int(table.max()) > 0xFFFF or table.numel() > 0x7FFF:
        why = f"{k_block} channels of {places} vectors and {len(offsets)} taps do not fit 16-bit numbers"
        raise InputError("a K-block is too large", why=why)
    return table.flatten().to(torch.int16)


def weight_of(step: Conv, packed: Segments) -> Tensor:
    """The weight [o, i, kh, kw] of one convolution of a net, from the packed tensors of all."""
    row_blocks, k_blocks = -(-step.rows // step.row_block), -(-step.channels // step.k_block)
    starts = packed.starts[step.first_start :][: row_blocks * k_blocks + 1]
    values = slice(step.first_value, step.first_value + step.values)
    ranks = slice(step.first_segment, step.first_segment + step.rows * k_blocks)
    own = Segments(packed.values[values], packed.columns[values], packed.order[ranks], packed.counts[ranks], starts)
    return unpack(own, (step.rows, step.channels), step.taps, step.tile, step.row_block, step.k_block)
