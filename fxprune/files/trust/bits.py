"""bits: whether the bits and values of the formats `bitmap`, `tiles` and the products of a net describe a weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.kernels.native import bitmap, tiles
from fxprune.kernels.native.net import SPARE

_ONES = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.int16)


def ones(words: Tensor) -> Tensor:
    """words [..., w] of any integers -> how many bits of each row are set [...]."""
    octets = words.contiguous().view(torch.uint8)
    return _ONES[octets.long()].sum(-1)


def fault_of_bitmap(bits: Tensor, values: Tensor, rows: Tensor) -> str:
    """What is wrong about a weight in the layout bitmap, or nothing."""
    kinds = (bits.dtype, rows.dtype)
    if kinds != (torch.int32, torch.int64) or values.dtype not in bitmap.DTYPES or bits.dim() != 2 or rows.dim() != 1:
        return "its tensors are of other kinds"
    if len(rows) < 3 or int(rows[0]) < 1 or tuple(bits.shape) != (len(rows) - 2, -(-int(rows[0]) // bitmap.WORD)):
        return "its tensors do not fit together"
    if rows[1] != 0 or int(rows[-1]) + bitmap.WORD != len(values) or not torch.equal(ones(bits), rows[1:].diff()):
        return "it has another number of values than of bits"
    return _beyond(bits[:, -1], int(rows[0]))


def fault_of_tiles(values: Tensor, bits: Tensor, columns: Tensor, starts: Tensor) -> str:
    """What is wrong about a weight in the layout tiles, or nothing."""
    kinds = (values.dtype, bits.dtype, columns.dtype, starts.dtype)
    if kinds != (torch.bfloat16, torch.int32, torch.int16, torch.int64) or len(starts) < 5:
        return "its tensors are of other kinds"
    o, i = starts[:2].tolist()
    panels, blocks = -(-o // tiles.PANEL), -(-i // tiles.BLOCK)
    if min(o, i) < 1 or len(starts) != 2 + 3 * (panels + 1) or len(bits) != len(columns) * 2 * tiles.LINES:
        return "its tensors do not fit together"
    begin = starts[2:].view(-1, 3)
    stored = begin[:, 0].diff()
    if bool((stored < 0).any()) or begin[0, 0] != 0 or int(begin[-1, 0]) != len(columns):
        return "its panels do not follow one another"
    panel = torch.arange(panels).repeat_interleave(stored)
    column = columns.long() & 0xFFFF
    # Blocks of a panel stand in their order, each once.
    if bool((column >= blocks).any()) or bool(((panel * blocks + column).diff() <= 0).any()):
        return "it has a block that is not there, or one twice"
    lines = bits.view(-1, 2, tiles.LINES)
    if fault := _beyond(lines[column == blocks - 1].flatten(0, 1), i, pairs=True):
        return fault
    held = torch.zeros(panels, 2, dtype=torch.int64).index_add_(0, panel, ones(lines).long())
    wanted = F.pad(begin[:, 1:].flatten()[:-1].diff(), (0, 0))
    if begin[0, 1] != 0 or not torch.equal(held.flatten(), wanted) or begin[-1, 1] + tiles.SPARE != len(values):
        return "it has another number of values than of bits"
    return _rows_beyond(lines[panel == panels - 1], o)


def fault_of_panels(words: Tensor, starts: Tensor, rows: int, channels: int, values: int, room: int) -> str:
    """What is wrong about the bits of a product of a net, or nothing. `room` counts the values from its first on."""
    panels, blocks = -(-rows // tiles.PANEL), -(-channels // tiles.BLOCK)
    if len(words) != panels * blocks * 32 or len(starts) != 2 * panels + 1:
        return "its tensors do not fit together"
    own = words.view(panels, blocks, 2, 16)
    held = ones(own.transpose(1, 2).flatten(2))
    if starts[0] != 0 or int(starts[-1]) != values or not torch.equal(held.flatten().long(), starts.diff()):
        return "it has another number of values than of bits"
    if values + SPARE > room:
        return "its values are not there"
    last = own[-1].transpose(0, 1).flatten(0, 0)
    beyond = rows - (panels - 1) * tiles.PANEL
    if bool(last.transpose(0, 1).reshape(blocks, 32)[:, beyond:].any()):
        return "it has bits beyond its rows"
    return _beyond(own[:, -1].flatten(), channels)


def _beyond(words: Tensor, columns: int, *, pairs: bool = False) -> str:
    """Whether the words of the last columns have bits beyond them. In `pairs` a word is of two columns, by line."""
    rest = columns % tiles.BLOCK or tiles.BLOCK
    if not pairs:
        allowed = (1 << rest) - 1
        is_fine = not bool((words.long() & 0xFFFFFFFF & ~allowed).any())
    else:
        # Line j has the columns 2 j and 2 j + 1, in turn for each row.
        places = torch.arange(tiles.LINES)
        even, odd = (2 * places < rest).long() * 0x55555555, (2 * places + 1 < rest).long() * 0xAAAAAAAA
        is_fine = not bool((words.long() & 0xFFFFFFFF & ~(even | odd)).any())
    return "" if is_fine else "it has bits beyond its columns"


def _rows_beyond(lines: Tensor, rows: int) -> str:
    """Whether the blocks [.., 2, lines] of the last panel have bits of rows that are not there."""
    rest = rows % tiles.PANEL or tiles.PANEL
    allowed = torch.tensor([(1 << 2 * max(0, min(16, rest - first))) - 1 for first in (0, 16)])
    is_fine = not bool((lines.long() & 0xFFFFFFFF & ~allowed.view(1, 2, 1)).any())
    return "" if is_fine else "it has bits beyond its rows"
