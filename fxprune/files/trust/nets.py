"""nets: whether the packed tensors of a call of fxprune::net are what its program says.

What a program asks for, step by step, the kernel holds against the sizes of tensors at every call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxprune.errors import InputError
from fxprune.kernels.native.net import Conv, Product, decode
from fxprune.kernels.native.segments import Segments

from .bits import fault_of_panels
from .segments import fault_of_segments

_KINDS = {
    "values": torch.float32, "columns": torch.int16, "order": torch.int16, "counts": torch.int16,
    "starts": torch.int64, "dense": torch.float32, "words": torch.int32, "brains": torch.bfloat16,
}  # fmt: skip


def fault_of_net(tensors: Mapping[str, Tensor], program: Sequence[int]) -> str:
    """What is wrong about a net's tensors, or about what its program says of them; nothing if all is well."""
    for name, kind in _KINDS.items():
        if tensors[name].dtype != kind or tensors[name].dim() != 1 or not tensors[name].is_contiguous():
            return f"its {name} are of another kind"
    try:
        steps = decode(program)
    except InputError as error:
        return error.why
    for number, step in enumerate(steps):
        if isinstance(step, Conv):
            fault = _fault_of_conv(step, tensors)
        elif isinstance(step, Product):
            fault = _fault_of_product(step, tensors)
        else:
            continue
        if fault:
            return f"in step {number} {fault}"
    return ""


def _fault_of_conv(step: Conv, tensors: Mapping[str, Tensor]) -> str:
    places = (step.first_value, step.values, step.first_segment, step.first_start)
    if min(step.rows, step.channels, step.row_block, step.k_block, step.tile) < 1 or min(places) < 0:
        return "a size is less than it can be"
    if step.row_block > 0x7FFF or min(*step.taps.kernel, *step.taps.stride, *step.taps.dilation) < 1:
        return "a size is not what it can be"
    row_blocks, k_blocks = -(-step.rows // step.row_block), -(-step.channels // step.k_block)
    ranks = slice(step.first_segment, step.first_segment + step.rows * k_blocks)
    own = slice(step.first_value, step.first_value + step.values)
    starts = tensors["starts"][step.first_start :][: row_blocks * k_blocks + 1]
    parts = (tensors["values"][own], tensors["columns"][own], tensors["order"][ranks], tensors["counts"][ranks])
    if len(parts[0]) != step.values:
        return "values are not there"
    whole = _vectors(step, step.k_block)
    last = _vectors(step, step.channels - (k_blocks - 1) * step.k_block)
    if whole is None or last is None:
        return "a K-block is too large"
    return fault_of_segments(Segments(*parts, starts), step.rows, step.row_block, k_blocks, whole, last)


def _vectors(step: Conv, channels: int) -> Tensor | None:
    """Which vectors of a K-block of so many channels a tap can stand at; None where they are too many for 16 bits."""
    places = step.taps.places(step.tile)
    if channels * places > 1 << 16:
        return None
    found = torch.zeros(1 << 16, dtype=torch.bool)
    offsets = torch.tensor(step.taps.offsets(step.tile))
    found[(torch.arange(channels).unsqueeze(1) * places + offsets).flatten()] = True
    return found


def _fault_of_product(step: Product, tensors: Mapping[str, Tensor]) -> str:
    places = (step.first_value, step.values, step.first_word, step.first_start)
    if min(step.rows, step.channels) < 1 or min(places) < 0:
        return "a size is less than it can be"
    panels, blocks = -(-step.rows // 32), -(-step.channels // 32)
    words = tensors["words"][step.first_word :][: panels * blocks * 32]
    starts = tensors["starts"][step.first_start :][: 2 * panels + 1]
    room = len(tensors["brains"]) - step.first_value
    return fault_of_panels(words, starts, step.rows, step.channels, step.values, room)
