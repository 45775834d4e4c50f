"""segments: whether nonzeros in segments, as `kernels.native.segments` has them, describe a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.kernels.native.segments import Segments


def fault_of_segments(segments: Segments, rows: int, row_block: int, k_blocks: int, whole: Tensor, last: Tensor) -> str:
    """What is wrong about the segments of a weight of so many rows, or nothing.

    `whole` [65536] bool says which columns may stand in a K-block, and `last` which in the last one of a row. Lengths
    and where blocks begin are for the kernel to check.
    """
    order, counts, starts = segments.order.long(), segments.counts.long(), segments.starts
    row_blocks = -(-rows // row_block)
    if min(rows, row_block, k_blocks) < 1 or len(starts) != row_blocks * k_blocks + 1:
        return "it has another number of blocks"
    if not len(order) == len(counts) == rows * k_blocks or len(segments.values) != len(segments.columns):
        return "its parts are not as long as one another"
    sizes = starts.diff()
    if starts[0] != 0 or starts[-1] != len(segments.values) or bool((sizes < 0).any()) or bool((counts < 0).any()):
        return "its blocks do not follow one another"
    # Every block but those of the last rows has row_block segments.
    lengths = torch.full((row_blocks, k_blocks), row_block)
    lengths[-1] = rows - (row_blocks - 1) * row_block
    block = torch.arange(len(sizes)).repeat_interleave(lengths.flatten())
    if not torch.equal(torch.zeros_like(sizes).index_add_(0, block, counts), sizes):
        return "its segments hold another number of values than their blocks"
    if bool((order < 0).any()) or bool((order >= lengths.flatten()[block]).any()):
        return "it has a row that is not there"
    seen = torch.zeros(len(sizes) * row_block, dtype=torch.bool)
    seen[block * row_block + order] = True
    if int(seen.sum()) != len(order):
        return "it has a row twice"
    columns = segments.columns.long() & 0xFFFF
    is_last = (torch.arange(len(sizes)) % k_blocks == k_blocks - 1).repeat_interleave(sizes)
    if not bool(torch.where(is_last, last[columns], whole[columns]).all()):
        return "it has a column that is not there"
    return ""


def first(count: int) -> Tensor:
    """The columns below `count`, as `fault_of_segments` takes them."""
    return torch.arange(1 << 16) < count
