"""The CPU ops fxprune::bitmap_linear and bitmap_linear_split: a weight by one bit an element and its nonzero values.

A weight [o, i] of float32, bfloat16 or float16 is stored as

    bits    int32 [o, words]     words = ceil(i / 32): bit j of word c says whether column 32 c + j is stored
    values  [nonzeros + 32]      row after row, columns in order; then zeros, which a kernel that reads ahead may touch
    rows    int64 [o + 2]        i, then where each row begins in values, and where the last one ends

x and the results have the values' dtype, or float32; sums are in float32. As in dense arithmetic a zero of the weight
is multiplied: with an infinite x it makes nan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.errors import InputError

from . import activated, register, shape, shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORD = 32
# Rows that are packed or unpacked at a time, in elements, so that temporaries stay small beside the weight.
_ELEMENTS = 1 << 20
# Times eight bytes that are 0 or 1: their bits side by side in the highest byte.
_GATHER_BITS = 0x0102040810204080


class Bitmap(NamedTuple):
    """A weight by its bits and nonzeros, as above."""

    bits: Tensor
    values: Tensor
    rows: Tensor


def pack(weight: Tensor) -> Bitmap:
    """weight [o, i] -> its elements with any bit set (so -0.0 too)."""
    i = weight.shape[1]
    words = -(-i // WORD)
    integers = torch.int32 if weight.element_size() == 4 else torch.int16
    bits, values, counts = [], [], []
    for block in weight.split(max(1, _ELEMENTS // i)):
        stored = block.view(integers) != 0
        lanes = F.pad(stored, (0, words * WORD - i)).contiguous().view(torch.int64)
        bits.append((lanes * _GATHER_BITS >> 56).to(torch.uint8).view(torch.int32))
        values.append(block[stored])
        counts.append(stored.sum(1))
    values.append(weight.new_zeros(WORD))
    rows = torch.cat([torch.tensor([i, 0]), torch.cat(counts).cumsum(0)])
    return Bitmap(torch.cat(bits), torch.cat(values), rows)


def unpack(packed: Bitmap) -> Tensor:
    """The weight [o, i], bit for bit as it was packed."""
    bits, values, rows = packed
    weight = values.new_zeros(len(rows) - 2, int(rows[0]))
    starts = rows[1:].tolist()
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    step = max(1, _ELEMENTS // weight.shape[1])
    for first in range(0, len(weight), step):
        block = weight[first : first + step]
        octets = bits[first : first + step].contiguous().view(torch.uint8)
        stored = octets.unsqueeze(2).bitwise_right_shift(places).bitwise_and_(1).flatten(1)[:, : weight.shape[1]]
        block[stored.bool()] = values[starts[first] : starts[first + len(block)]]
    return weight


def narrowed(weight: Tensor) -> Tensor:
    """A float32 weight [o, i] in bfloat16 or float16 where that loses no bit; any other as it is."""
    if weight.dtype != torch.float32:
        return weight
    blocks = weight.view(torch.int32).split(max(1, _ELEMENTS // max(1, weight.shape[1])))
    if not any((block & 0xFFFF).any() for block in blocks):
        return torch.cat([(block >> 16).to(torch.int16) for block in blocks]).view(torch.bfloat16)
    if all(torch.equal(block.view(torch.float32).half().float().view(torch.int32), block) for block in blocks):
        return weight.half()
    return weight


def widened(weight: Tensor) -> Tensor:
    """What was `narrowed`, in float32 again, bit for bit."""
    if weight.dtype == torch.bfloat16:
        return (weight.view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    return weight.float()


def bitmap_linear_reference(
    x: Tensor, bits: Tensor, values: Tensor, rows: Tensor, bias: Tensor | None, out_features: int, activation: str
) -> Tensor:
    """activation(x [..., i] @ W^T + bias) [..., o] in plain torch: the definition, and the fallback."""
    if x.dtype not in (values.dtype, torch.float32) or values.dtype not in DTYPES:
        raise InputError("bitmap_linear got x of another dtype", why=f"x is {x.dtype}, the values are {values.dtype}")
    packed = [len(rows) - 2, int(rows[0])]
    if packed != [out_features, *x.shape[-1:]]:
        why = f"the packed weight is {packed}, the call wants {[out_features, *x.shape[-1:]]}"
        raise InputError("bitmap_linear got a weight of another shape", why=why)
    y = F.linear(x, unpack(Bitmap(bits, values, rows)).to(x.dtype), bias)
    return activated(y, activation)


def bitmap_linear_split_reference(
    x: Tensor, bits: Tensor, values: Tensor, rows: Tensor, bias: Tensor | None, out_features: Sequence[int],
    activation: str,
) -> list[Tensor]:  # fmt: skip
    """bitmap_linear with the rows of W dealt out in order: one tensor [..., out_features[j]] for each part."""
    if min(out_features, default=0) < 0:
        raise InputError("bitmap_linear_split cannot deal out the rows", why=f"the parts have {out_features}")
    y = bitmap_linear_reference(x, bits, values, rows, bias, sum(out_features), activation)
    return [part.clone(memory_format=torch.contiguous_format) for part in y.split(list(out_features), -1)]


_PACKED = "Tensor x, Tensor bits, Tensor values, Tensor rows, Tensor? bias"
register("bitmap_linear", f"{_PACKED}, int out_features, str activation", "Tensor", bitmap_linear_reference, shape)
register(
    "bitmap_linear_split",
    f"{_PACKED}, int[] out_features, str activation",
    "Tensor[]",
    bitmap_linear_split_reference,
    shapes,
)
