"""Weights times masks, in every dtype: also the 8-bit floats, for which torch lacks most arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.select.mask import PackedMask, chunks


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """weight * mask (one shape), which the gradient of the weight passes through.

    A weight of 8-bit floats has +0.0 where the mask is 0, and no gradient.
    """
    if is_byte_float(weight):
        return (as_bytes(weight.detach()) * (mask != 0)).view(weight.dtype)
    return mask.to(dtype=weight.dtype) * weight


def zeroed(mask: Tensor, gone: Tensor) -> Tensor:
    """A copy of `mask` with 0 where `gone` (bool, the mask's shape or one that broadcasts to it)."""
    new = mask.clone()
    (as_bytes(new) if is_byte_float(new) else new).masked_fill_(gone, 0)
    return new


def packed(mask: Tensor) -> PackedMask | None:
    """mask (any shape, any dtype) -> one bit an element; None where it is not all 0 and 1 or has no values."""
    if mask.is_meta or not all(bool(((piece == 0) | (piece == 1)).all()) for piece in chunks(mask)):
        return None
    return PackedMask.from_chunks(mask.shape, mask.device, (piece != 0 for piece in chunks(mask)))


def unpacked_like(bits: PackedMask, weight: Tensor, start: Tensor | None = None) -> Tensor:
    """The mask as 0 and 1 in the weight's dtype, device and layout, times the mask `start` if given."""
    mask = torch.empty_like(weight, requires_grad=False)
    if not mask.is_contiguous() or (start is not None and not start.is_contiguous()):
        keep = bits.unpack().to(mask.device)
        return mask.copy_(keep if start is None else masked(start.to(mask.device, mask.dtype), keep))
    flat, at = mask.view(-1), 0
    old = None if start is None else start.view(-1)
    for piece in bits.chunks():
        to = flat[at : at + piece.numel()]
        keep = piece.to(mask.device)
        if old is None:
            to.copy_(keep)
        else:
            to.copy_(masked(old[at : at + piece.numel()].to(mask.device, mask.dtype), keep))
        at += piece.numel()
    return mask


def is_byte_float(tensor: Tensor) -> bool:
    """Whether the tensor holds 8-bit floats."""
    return tensor.is_floating_point() and tensor.dtype.itemsize == 1


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of an 8-bit tensor, sharing its storage; the byte 0 is +0.0."""
    return tensor.view(torch.uint8)
