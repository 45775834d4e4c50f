"""segments: a matrix stored by its nonzeros, as the C++ kernels read it.

W [o, i] is cut into row blocks of NB rows and nK K-blocks of Kb columns. One row's part of one K-block is a segment.
The segments of a block are sorted by their number of nonzeros, which makes the kernel's trip counts predictable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """A matrix by its nonzeros.

    values    float32 [nnz]         the nonzeros by (row block, K-block, segment)
    columns   int16   [nnz]         column within the K-block
    order     int16   [o * nK]      the row within the row block that a segment belongs to
    counts    int16   [o * nK]      number of nonzeros of a segment
    starts    int64   [blocks + 1]  where each block begins in values and columns
    """

    values: Tensor
    columns: Tensor
    order: Tensor
    counts: Tensor
    starts: Tensor


def pack(weight: Tensor, row_block: int, k_block: int) -> Segments:
    """The nonzeros (elements with any bit set, so -0.0 too) of a weight [o, i]."""
    _, i = weight.shape
    k_blocks = -(-i // k_block)
    column = torch.arange(k_block, dtype=torch.int16)
    parts: dict[str, list[Tensor]] = {"values": [], "columns": [], "order": [], "counts": [], "sizes": []}
    # Row block by row block, so that temporaries stay small beside the weight.
    for block in weight.split(row_block):
        padded = torch.nn.functional.pad(block, (0, k_blocks * k_block - i))
        segments = padded.view(len(block), k_blocks, k_block).transpose(0, 1)
        counts = (segments.view(torch.int32) != 0).sum(-1)
        counts, order = counts.sort(dim=1, stable=True)
        segments = segments.take_along_dim(order.unsqueeze(-1), 1)
        kept = segments.view(torch.int32) != 0
        parts["values"].append(segments[kept])
        parts["columns"].append(column.expand_as(kept)[kept])
        parts["order"].append(order.to(torch.int16).flatten())
        parts["counts"].append(counts.to(torch.int16).flatten())
        parts["sizes"].append(counts.sum(1))
    tensors = {name: torch.cat(part) for name, part in parts.items()}
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), tensors.pop("sizes").cumsum(0)])
    return Segments(**tensors, starts=starts)


def unpack(segments: Segments, shape: tuple[int, int], row_block: int, k_block: int) -> Tensor:
    """The weight [o, i], bit for bit as it was packed."""
    o, i = shape
    k_blocks = -(-i // k_block)
    order = segments.order
    segment = torch.arange(order.numel(), device=order.device)
    # Segments stand by row block, then K-block, then sorted row; the last row block may have fewer rows.
    block = segment // (row_block * k_blocks)
    rows = (o - block * row_block).clamp(max=row_block)
    k = (segment - block * row_block * k_blocks) // rows
    base = (block * row_block + order) * i + k * k_block
    values = segments.values
    at = base.repeat_interleave(segments.counts.long(), output_size=values.numel()) + segments.columns
    return values.new_zeros(o * i).index_copy_(0, at, values).view(o, i)
