"""weights: the weight of a convolution, or of a product, as the kernel of a net reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.errors import InputError

from .. import segments
from ..segments import Segments
from .steps import Conv, Product
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


class Panels(NamedTuple):
    """A bfloat16 weight [o, i] of a product: panels of 32 rows, of blocks of 32 columns, of two tiles of 16 rows.

    words   int32 [panels * blocks * 32]   the bits of each row of a tile, by (panel, block, tile, row)
    values  bf16  [nonzeros]               of the bits that are set, by (panel, tile, block, row)
    starts  int64 [2 panels + 1]           where each panel's first and second tiles begin in values, and the end
    """

    words: Tensor
    values: Tensor
    starts: Tensor


_PANEL, _BLOCK = 32, 32
# Values after the last one of all products: lines are read a vector at a time.
SPARE = 32


def pack_panels(weight: Tensor) -> Panels:
    """The elements with any bit set (so -0.0 too) of a bfloat16 weight [o, i]."""
    o, i = weight.shape
    panels, blocks = -(-o // _PANEL), -(-i // _BLOCK)
    words, values, sizes = [], [], []
    # Panel by panel, so that temporaries stay small beside the weight.
    for panel in range(panels):
        rows = weight[panel * _PANEL : (panel + 1) * _PANEL]
        rows = F.pad(rows, (0, blocks * _BLOCK - i, 0, _PANEL - len(rows)))
        lines = rows.view(2, 16, blocks, _BLOCK).transpose(1, 2).contiguous()
        kept = lines.view(torch.int16) != 0
        values.append(lines[kept])
        words.append((kept.long() << torch.arange(_BLOCK)).sum(-1).transpose(0, 1).flatten().to(torch.int32))
        sizes.append(kept.sum((1, 2, 3)))
    return Panels(torch.cat(words), torch.cat(values), F.pad(torch.cat(sizes).cumsum(0), (1, 0)))


def panels_of(step: Product, words: Tensor, brains: Tensor, starts: Tensor) -> Tensor:
    """The weight [o, i] of one product of a net, bit for bit as it was packed, from the packed tensors of all."""
    panels, blocks = -(-step.rows // _PANEL), -(-step.channels // _BLOCK)
    own = words[step.first_word :][: panels * blocks * 2 * 16].view(panels, blocks, 2, 16, 1)
    kept = (own >> torch.arange(_BLOCK, dtype=torch.int32) & 1).bool().transpose(1, 2)
    lines = brains.new_zeros(kept.shape)
    lines[kept] = brains[step.first_value :][: step.values]
    weight = lines.transpose(2, 3).reshape(panels * _PANEL, blocks * _BLOCK)
    return weight[: step.rows, : step.channels].contiguous()
