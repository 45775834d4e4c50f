"""Masks as packed bits: one bit an element instead of the four bytes that a float mask takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Every walk over a weight goes in pieces of this many elements, which bounds the temporaries at a few times
# 8 bytes each. A multiple of 8, so that pieces of a mask begin at a whole byte.
CHUNK = 1 << 20

# Multiplying eight bytes of 0/1, read as one little-endian integer, by _GATHER puts byte j's bit at bit 56
# + j; no two partial products meet, so nothing carries. _SPREAD copies a byte into all eight; _PICK leaves
# bit j of byte j.
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_PICK = 0x8040201008040201 - (1 << 64)


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of `tensor` (any shape) in flat order, in 1-D pieces of at most CHUNK elements."""
    size = tensor.numel()
    flat = tensor.reshape(-1) if tensor.is_contiguous() else None
    for start in range(0, size, CHUNK):
        stop = min(start + CHUNK, size)
        if flat is not None:
            yield flat[start:stop]
        else:  # reshape would copy the whole tensor; torch cannot take from fp8, but it can from its bytes
            index = torch.arange(start, stop, device=tensor.device)
            if tensor.dtype.itemsize == 1:
                yield tensor.view(torch.uint8).take(index).view(tensor.dtype)
            else:
                yield tensor.take(index)


def pack_bits(keep: Tensor) -> Tensor:
    """keep [n] bool -> bits [ceil(n / 8)] uint8; bit j of byte b is element 8 b + j; spare bits are 0."""
    size = keep.numel()
    if size % 8 or keep.storage_offset() % 8 or not keep.is_contiguous():
        padded = torch.zeros(-(-size // 8) * 8, dtype=torch.bool, device=keep.device)
        padded[:size] = keep
        keep = padded
    return (keep.view(torch.int64) * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_bits(bits: Tensor, size: int) -> Tensor:
    """bits [ceil(size / 8)] uint8 -> keep [size] bool, the inverse of `pack_bits`."""
    spread = (bits.to(torch.int64) * _SPREAD).bitwise_and_(_PICK)
    return spread.view(torch.uint8)[:size].ne(0)


@dataclass(frozen=True, eq=False)
class PackedMask:
    """Which elements of a weight of `shape` are kept, one bit each.

    `bits` is uint8 [ceil(n / 8)]; bit j of byte b is element 8 b + j in flat order, 1 = kept. Bits past the
    last element are 0.
    """

    shape: tuple[int, ...]
    bits: Tensor

    @classmethod
    def pack(cls, keep: Tensor) -> PackedMask:
        """keep, bool of any shape -> PackedMask on the same device."""
        if keep.dtype is not torch.bool:
            raise TypeError(f"a mask to pack is a bool tensor, not {keep.dtype}")
        return cls.from_chunks(keep.shape, keep.device, chunks(keep))

    @classmethod
    def from_chunks(cls, shape: Sequence[int], device: torch.device, pieces: Iterable[Tensor]) -> PackedMask:
        """Pieces [<= CHUNK] bool, in flat order and each but the last of CHUNK elements -> PackedMask."""
        bits = torch.empty(-(-math.prod(shape) // 8), dtype=torch.uint8, device=device)
        start = 0
        for piece in pieces:
            packed = pack_bits(piece)
            bits[start : start + packed.numel()] = packed
            start += packed.numel()
        return cls(tuple(shape), bits)

    def numel(self) -> int:
        """How many elements the weight has."""
        return math.prod(self.shape)

    def chunks(self) -> Iterator[Tensor]:
        """The mask as bool in flat order, in 1-D pieces that line up with `chunks(weight)`."""
        size = self.numel()
        for start in range(0, size, CHUNK):
            stop = min(start + CHUNK, size)
            yield unpack_bits(self.bits[start // 8 : -(-stop // 8)], stop - start)

    def unpack(self) -> Tensor:
        """The mask as a bool tensor of `shape`."""
        keep = torch.empty(self.numel(), dtype=torch.bool, device=self.bits.device)
        for start, piece in zip(range(0, self.numel(), CHUNK), self.chunks(), strict=True):
            keep[start : start + piece.numel()] = piece
        return keep.view(self.shape)

    def kept(self) -> int:
        """How many elements are kept."""
        if self.bits.numel() == 0:
            return 0
        ones = torch.tensor([byte.bit_count() for byte in range(256)], device="cpu")
        return int((torch.bincount(self.bits, minlength=256).cpu() * ones).sum())
