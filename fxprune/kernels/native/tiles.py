"""The CPU ops fxprune::tiles_linear and tiles_linear_split: bf16 weights by bits and values, in the order of AMX tiles.

W [o, i] is cut into panels of 32 rows, and a panel into blocks of 32 columns, those without a nonzero left out. A block
is two tiles, of its first and its last 16 rows. A tile has 16 lines, one for each pair of columns: [16 rows][2]. A line
is a word of 32 bits, lowest first, and its values.

Products of bf16 are summed in fp32, where the instructions take subnormal numbers for 0. What was pruned within a block
that is stored counts as 0, so that there inf * 0 is nan, as in a dense product; a block without a nonzero is not read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.errors import InputError

from . import activated, function_of_object, register, shape, shapes

PANEL = 32  # rows
BLOCK = 32  # columns
LINES = 16
# Values after the last one: the kernel reads a vector at a time.
SPARE = 32


class Tiles(NamedTuple):
    """A weight by bits and values.

    values   bf16  [nnz + 32]        the nonzeros by (panel, tile, block, line)
    bits     int32 [blocks * 32]     by (panel, block, tile, line)
    columns  int16 [blocks]          where a block stands in its panel (16 bits without a sign)
    starts   int64 [2 + 3 (panels + 1)]   o, i; for each panel its first block, and the first value of its first and of
                                     its second tiles; where the last panel ends
    """

    values: Tensor
    bits: Tensor
    columns: Tensor
    starts: Tensor


def isa() -> str:
    """The instructions that the C++ kernels use: "AMX", "AVX-512", or "" where they do not run."""
    name = function_of_object("fxprune_tiles")
    if name is None:
        return ""
    name.restype = ctypes.c_char_p
    return name().decode()


def pack(weight: Tensor) -> Tiles:
    """The nonzeros (elements with any bit set, so -0.0 too) of a weight [o, i]."""
    o, i = weight.shape
    panels, blocks = -(-o // PANEL), -(-i // BLOCK)
    places = torch.arange(32)
    values, bits, columns, sizes = [], [], [], []
    # Panel by panel, so that temporaries stay small beside the weight.
    for panel in range(panels):
        rows = weight[panel * PANEL : (panel + 1) * PANEL]
        rows = F.pad(rows, (0, blocks * BLOCK - i, 0, PANEL - len(rows)))
        lines = rows.view(2, 16, blocks, LINES, 2).permute(0, 2, 3, 1, 4).reshape(2, blocks, LINES, 32)
        kept = lines.view(torch.int16) != 0
        stored = kept.any(-1).any(-1).any(0).nonzero().flatten()
        values += [lines[0][kept[0]], lines[1][kept[1]]]
        words = (kept[:, stored].long() << places).sum(-1)
        bits.append(words.transpose(0, 1).flatten().to(torch.int32))
        columns.append(stored.to(torch.int16))
        sizes.append([len(stored), len(values[-2]), len(values[-1])])
    stored, first, second = torch.tensor(sizes).unbind(1)
    begin = F.pad(torch.stack([first, second], 1).flatten().cumsum(0), (1, 1))
    begin[-1] = begin[-2]
    starts = torch.cat([F.pad(stored.cumsum(0), (1, 0)).unsqueeze(1), begin.view(-1, 2)], 1)
    return Tiles(
        torch.cat([*values, weight.new_zeros(SPARE)]),
        torch.cat(bits),
        torch.cat(columns),
        torch.cat([torch.tensor([o, i]), starts.flatten()]),
    )


def unpack(packed: Tiles) -> Tensor:
    """The weight [o, i], bit for bit as it was packed."""
    o, i = packed.starts[:2].tolist()
    panels, blocks = -(-o // PANEL), -(-i // BLOCK)
    stored = packed.starts[2:].view(-1, 3)[:, 0].diff()
    panel = torch.arange(panels).repeat_interleave(stored)
    kept = torch.zeros(panels, 2, blocks, LINES, 32, dtype=torch.bool)
    words = packed.bits.view(-1, 2, LINES, 1) >> torch.arange(32, dtype=torch.int32) & 1
    kept[panel, :, packed.columns.long() & 0xFFFF] = words.bool()
    lines = packed.values.new_zeros(kept.shape)
    lines[kept] = packed.values[: len(packed.values) - SPARE]
    weight = lines.view(panels, 2, blocks, LINES, 16, 2).permute(0, 1, 4, 2, 3, 5)
    return weight.reshape(panels * PANEL, blocks * BLOCK)[:o, :i].contiguous()


def tiles_linear_reference(
    x: Tensor, values: Tensor, bits: Tensor, columns: Tensor, starts: Tensor,
    bias: Tensor | None, out_features: int, activation: str,
) -> Tensor:  # fmt: skip
    """activation(x [..., i] @ W^T + bias) [..., o] in plain torch: the definition, and the fallback."""
    if x.dtype != torch.bfloat16:
        raise InputError("tiles_linear takes bfloat16 only", why=f"x is {x.dtype}")
    if starts[:2].tolist() != [out_features, *x.shape[-1:]]:
        why = f"the packed weight is {starts[:2].tolist()}, the call wants {[out_features, *x.shape[-1:]]}"
        raise InputError("tiles_linear got a weight of another shape", why=why)
    weight = unpack(Tiles(values, bits, columns, starts)).float()
    y = F.linear(x.float(), weight, None if bias is None else bias.float())
    return activated(y, activation).bfloat16()


def tiles_linear_split_reference(
    x: Tensor, values: Tensor, bits: Tensor, columns: Tensor, starts: Tensor,
    bias: Tensor | None, out_features: Sequence[int], activation: str,
) -> list[Tensor]:  # fmt: skip
    """tiles_linear with the rows of W dealt out in order: one tensor [..., out_features[j]] for each part."""
    if min(out_features, default=0) < 0:
        raise InputError("tiles_linear_split cannot deal out the rows", why=f"the parts have {out_features}")
    y = tiles_linear_reference(x, values, bits, columns, starts, bias, sum(out_features), activation)
    return [part.clone(memory_format=torch.contiguous_format) for part in y.split(list(out_features), -1)]


_PACKED = "Tensor x, Tensor values, Tensor bits, Tensor columns, Tensor starts, Tensor? bias"
register(
    "tiles_linear",
    f"{_PACKED}, int out_features, str activation",
    "Tensor",
    tiles_linear_reference,
    shape,
    runs=lambda: bool(isa()),
)
register(
    "tiles_linear_split",
    f"{_PACKED}, int[] out_features, str activation",
    "Tensor[]",
    tiles_linear_split_reference,
    shapes,
    runs=lambda: bool(isa()),
)
