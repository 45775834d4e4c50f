"""select: exactly the k smallest magnitudes over many tensors at once, as packed masks of what stays.

The tensors are read where they lie, in chunks of 65536 elements listed in a table, so nothing is concatenated and no
offset grows past 32 bits. A key is the bits of |x|, an integer that orders as the magnitude does. Three walks:

    sample   a few keys of each chunk say between which keys the threshold lies, almost surely
    count    keys below that bracket, and in each of its buckets; where these show that the threshold lies elsewhere,
             it is looked for there, in buckets that together hold all keys that are left
    mask     what stays as bits, 1 = stays, and of the elements that equal the threshold the first in flat order go

Only integers are added, so the answer is the same every time. Source of counting by digits: Alabi et al., "Fast
k-selection algorithms for graphics processing units", 2012.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .language import WHY_NOT, constexpr, jit, on, tl

CHUNK = 1 << 16
# Keys of one type in a bracket of this many buckets are counted in registers, for each chunk apart; others in a table.
_FEW = 8
_MANY = 1 << 16
# About so many keys are sampled; the bracket reaches over so many standard deviations of a rank in the sample.
_SAMPLE = 1 << 18
_DEVIATIONS = 5.0
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Tensors begin at multiples of so many bytes.
ALIGNED = 16
_BITS = {torch.float16: 15, torch.bfloat16: 15, torch.float32: 31}


def reference(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """x of any shapes and one dtype, NaN above all -> what stays, bool of their shapes, by sorting all of them."""
    keys = torch.cat([_keys(x).reshape(-1) for x in tensors])
    keep = torch.ones_like(keys, dtype=torch.bool)
    keep[keys.argsort(stable=True)[:k]] = False
    parts = keep.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def _keys(x: Tensor) -> Tensor:
    integer = torch.int32 if x.dtype is torch.float32 else torch.int16
    return x.contiguous().view(integer) & ((1 << _BITS[x.dtype]) - 1)


@dataclass(frozen=True)
class Chunks:
    """Tensors of one dtype on one device, the masks that hold already, and their chunks.

    addresses int64 [chunks] of the first element; alive int64 [chunks] of the bits of a mask that holds already, 0
    where none does; lengths int32 [chunks]; owners int64 [chunks], the tensor's place; starts int64 [chunks] within it.
    """

    tensors: tuple[Tensor, ...]
    kept: tuple[Tensor | None, ...]
    addresses: Tensor
    alive: Tensor
    lengths: Tensor
    owners: Tensor
    starts: Tensor

    @property
    def bits(self) -> int:
        """Bits of a key."""
        return _BITS[self.tensors[0].dtype]

    def programs(self) -> int:
        """How many programs walk over the chunks: enough to fill the device, and no more than there are chunks."""
        device = self.addresses.device
        units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        return max(1, min(len(self.lengths), 8 * units))


def chunks(tensors: Sequence[Tensor], alive: Sequence[Tensor | None] | None = None) -> Chunks:
    """x of any shapes, contiguous, of one dtype, on one device -> their chunks.

    `alive` holds for each the bits [ceil(n / 8)] uint8 of what is not masked already, or None. Raises ValueError for
    tensors that kernels cannot read.
    """
    alive = [None] * len(tensors) if alive is None else alive
    _check(tensors, alive)
    pointers = [0 if bits is None else bits.data_ptr() for bits in alive]
    rows = [[x.numel() for x in tensors], [x.data_ptr() for x in tensors], pointers]
    # One small copy; the table is made where it is read, and of a size that is known here, so that nothing waits.
    sizes, addresses, masks = torch.tensor(rows).to(tensors[0].device, non_blocking=True)
    counts = (sizes + CHUNK - 1) // CHUNK
    total = sum(-(-size // CHUNK) for size in rows[0])
    owners = torch.repeat_interleave(counts, output_size=total)
    starts = (torch.arange(total, device=owners.device) - (counts.cumsum(0) - counts)[owners]) * CHUNK
    addresses = addresses[owners] + starts * tensors[0].element_size()
    masks = torch.where(masks[owners] > 0, masks[owners] + starts // 8, 0)
    lengths = (sizes[owners] - starts).clamp(max=CHUNK).to(torch.int32)
    return Chunks(tuple(tensors), tuple(alive), addresses, masks, lengths, owners, starts)


def is_readable(x: Tensor) -> bool:
    """Whether a kernel can read x where it lies; what has no memory of its own, such as a wrapper, lies nowhere."""
    return x.is_contiguous() and x.data_ptr() % ALIGNED == 0 and (x.data_ptr() != 0 or x.numel() == 0)


def _check(tensors: Sequence[Tensor], alive: Sequence[Tensor | None]) -> None:
    if not tensors:
        raise ValueError("there are no tensors to select from")
    first = tensors[0]
    for place, (x, bits) in enumerate(zip(tensors, alive, strict=True)):
        if x.dtype not in _BITS:
            raise ValueError(f"tensor {place} is {x.dtype}; the kernels read float32, float16 and bfloat16")
        if (x.dtype, x.device) != (first.dtype, first.device):
            raise ValueError(f"tensor {place} is {x.dtype} on {x.device}, the first {first.dtype} on {first.device}")
        if not is_readable(x):
            raise ValueError(f"tensor {place} is not contiguous in memory, from a multiple of {ALIGNED} bytes on")
        if bits is not None and (bits.dtype is not torch.uint8 or bits.numel() != -(-x.numel() // 8)):
            raise ValueError(f"mask {place} is {bits.dtype} {list(bits.shape)}, not uint8 [{-(-x.numel() // 8)}]")
        if bits is not None and (bits.device != x.device or not bits.is_contiguous()):
            raise ValueError(f"mask {place} is not contiguous on {x.device}")


@dataclass(frozen=True)
class Threshold:
    """Keys below `key` leave, and of those equal to it the first `ties`.

    `equal` int32 [chunks] counts these in each chunk; None where that was not found on the way.
    """

    key: int
    ties: int
    equal: Tensor | None = None


def keep_all_but(chunks: Chunks, k: int) -> list[Tensor]:
    """What stays where the k smallest magnitudes leave, bits [ceil(n / 8)] uint8 for each tensor.

    Of equal ones those that come first leave, tensors in order. What an `alive` mask leaves out neither counts nor
    stays. Raises ValueError where there are no k elements.
    """
    total = elements(chunks)
    if not 0 <= k <= total:
        raise ValueError(f"cannot take {k} of {total} elements")
    if k == 0:
        none = torch.zeros_like(chunks.lengths)
        return masks(chunks, -1, none, none)
    found = threshold(chunks, k, total)
    equal = count_few(chunks, found.key, 0)[:, 1] if found.equal is None else found.equal
    before = equal.cumsum(0, dtype=torch.int64) - equal
    take = (found.ties - before).clamp(min=0).minimum(equal).to(torch.int32)
    return masks(chunks, found.key, take, equal)


def elements(chunks: Chunks) -> int:
    """How many elements are not masked already."""
    if all(bits is None for bits in chunks.kept):
        return sum(x.numel() for x in chunks.tensors)
    return int(count_few(chunks, 0, chunks.bits).sum(dtype=torch.int64))


def threshold(chunks: Chunks, k: int, total: int) -> Threshold:
    """The key that takes exactly k, from 1, of the `total` elements that are not masked already."""
    low, high = 0, 1 << chunks.bits  # It is among the keys from low to before high.
    start, stop = _bracket(chunks, k, total)
    while True:
        few = stop - start <= _FEW
        shift = 0 if few else max(0, (stop - start - 1).bit_length() - _MANY.bit_length() + 1)
        counts = count_few(chunks, start, 0) if few else count_many(chunks, start, shift)
        reach = (counts.sum(0, dtype=torch.int64) if few else counts).cumsum(0)
        found = torch.searchsorted(reach, k)
        place, before = torch.stack([found, reach[(found - 1).clamp(min=0)]]).tolist()
        if place == 0:
            high = start
        elif start + (place - 1 << shift) >= stop:
            low = stop
        else:
            low = start + (place - 1 << shift)
            high = min(low + (1 << shift), high)
            if high - low == 1:
                return Threshold(low, k - before, counts[:, place] if few else None)
        start, stop = low, high


def _bracket(chunks: Chunks, k: int, total: int) -> tuple[int, int]:
    """Keys between which the threshold lies almost surely: the first, and the one after the last."""
    if total < 4 * _SAMPLE:
        return 0, 1 << chunks.bits
    # What is none comes first; how many that are, and both keys, are asked for at once.
    found = sample(chunks).flatten().sort().values
    none = (found < 0).sum()
    count, share = len(found) - none, k / total
    spread = _DEVIATIONS * (count * share * (1 - share)).sqrt() + 1
    first, last = (count * share - spread).floor().long(), (count * share + spread).ceil().long()
    ends = found[torch.stack([first, last]).clamp(min=0).add(none).clamp(max=len(found) - 1)].long()
    start, stop = torch.where(torch.stack([first >= 0, last < count]), ends, -1).tolist()
    return max(start, 0), stop + 1 if stop >= 0 else 1 << chunks.bits


def sample(chunks: Chunks) -> Tensor:
    """Keys [chunks, few] int32 of elements spread over each chunk; -1 where there is none, or it is masked."""
    each = max(1, min(1024, 1 << max(0, (_SAMPLE // len(chunks.lengths)).bit_length() - 1)))
    found = torch.empty(len(chunks.lengths), each, dtype=torch.int32, device=chunks.lengths.device)
    _launch(_sample, chunks, len(found), found, EACH=each, SPACING=CHUNK // each)
    return found


def count_few(chunks: Chunks, low: int, shift: int) -> Tensor:
    """Counts [chunks, 1 + 8] int32: keys below `low`, and in each bucket of 2 ** shift keys from there on."""
    found = torch.empty(len(chunks.lengths), 1 + _FEW, dtype=torch.int32, device=chunks.lengths.device)
    _launch(_count_few, chunks, chunks.programs(), found, low, shift, BUCKETS=_FEW)
    return found


def count_many(chunks: Chunks, low: int, shift: int) -> Tensor:
    """Counts [1 + 65536] int64 of all chunks together, in the same order."""
    found = torch.zeros(1 + _MANY, dtype=torch.int64, device=chunks.lengths.device)
    _launch(_count_many, chunks, chunks.programs(), found, low, shift, BUCKETS=_MANY)
    return found


def masks(chunks: Chunks, key: int, take: Tensor, equal: Tensor) -> list[Tensor]:
    """What stays, bits [ceil(n / 8)] uint8 for each tensor: greater keys, and equal ones but the first of each chunk.

    take, equal int32 [chunks]: how many of the equal ones in a chunk leave, and how many there are.
    """
    device = chunks.lengths.device
    bits = [torch.empty(-(-x.numel() // 8), dtype=torch.uint8, device=device) for x in chunks.tensors]
    if len(chunks.lengths):
        outs = torch.tensor([b.data_ptr() for b in bits]).to(device)[chunks.owners] + chunks.starts // 8
        _launch(_mask, chunks, chunks.programs(), outs, key, take, equal.contiguous())
    return bits


def _launch(kernel: Any, chunks: Chunks, programs: int, *args: Any, **constants: int) -> None:
    if WHY_NOT:
        raise RuntimeError(WHY_NOT)
    if not len(chunks.lengths):
        return
    wide = chunks.tensors[0].element_size() == 4
    table = chunks.addresses, chunks.alive, chunks.lengths, len(chunks.lengths)
    integer = tl.int32 if wide else tl.int16
    with on(chunks.lengths):
        kernel[(programs,)](*table, *args, INTEGER=integer, SIZE=CHUNK, BLOCK=2048, **constants)


@jit
def _keys_at(address, alive, where, length, WHOLE: constexpr, INTEGER: constexpr):
    """Keys int32 at places of a chunk, and which of them count; WHOLE where all of them do."""
    begin = tl.multiple_of(address.to(tl.pointer_type(INTEGER)), 16)
    most = 0x7FFFFFFF if tl.int32 == INTEGER else 0x7FFF
    if WHOLE:
        return (tl.load(begin + where) & most).to(tl.int32), where >= 0
    else:
        valid = where < length
        bits = tl.load(begin + where, mask=valid, other=0)
        if alive != 0:
            byte = tl.load(alive.to(tl.pointer_type(tl.uint8)) + (where >> 3), mask=valid, other=0)
            valid = valid & (((byte >> (where & 7)) & 1) != 0)
        return (bits & most).to(tl.int32), valid


@jit
def _sample(
    addresses, alive, lengths, chunks, found,
    EACH: constexpr, SPACING: constexpr, INTEGER: constexpr, SIZE: constexpr, BLOCK: constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    place = tl.arange(0, EACH)
    # A place within each stretch that looks like chance, so that no pattern of columns lines up with it.
    mixed = (chunk * EACH + place).to(tl.uint32) * 2654435761
    where = place * SPACING + ((mixed >> 8) % SPACING).to(tl.int32)
    key, valid = _keys_at(
        tl.load(addresses + chunk), tl.load(alive + chunk), where, tl.load(lengths + chunk), False, INTEGER
    )
    tl.store(found + chunk * EACH + place, tl.where(valid, key, -1))


@jit
def _tally(address, alive, length, low, shift, WHOLE: constexpr, INTEGER: constexpr, SIZE: constexpr, BLOCK: constexpr):
    """For each lane [BLOCK] int32 the keys of a chunk below `low`, and in each of eight buckets, four bytes a word."""
    below = tl.zeros((BLOCK,), dtype=tl.int32)
    first, second = below, below
    for start in range(0, SIZE if WHOLE else length, BLOCK):
        key, valid = _keys_at(address, alive, start + tl.arange(0, BLOCK), length, WHOLE, INTEGER)
        above = key - low
        place = above >> shift
        one = 1 << (8 * (place & 3))
        below += (valid & (above < 0)).to(tl.int32)
        first += tl.where(valid & (place >> 2 == 0), one, 0)
        second += tl.where(valid & (place >> 2 == 1), one, 0)
    return below, first, second


@jit
def _count_few(
    addresses, alive, lengths, chunks, found, low, shift,
    BUCKETS: constexpr, INTEGER: constexpr, SIZE: constexpr, BLOCK: constexpr,
):  # fmt: skip
    # A lane meets SIZE / BLOCK keys, which a byte has to hold.
    tl.static_assert((BUCKETS == 8) & (SIZE // BLOCK < 256))
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        address, mask, length = tl.load(addresses + chunk), tl.load(alive + chunk), tl.load(lengths + chunk)
        if (length == SIZE) & (mask == 0):
            below, first, second = _tally(address, mask, length, low, shift, True, INTEGER, SIZE, BLOCK)
        else:
            below, first, second = _tally(address, mask, length, low, shift, False, INTEGER, SIZE, BLOCK)
        at = found + chunk * (1 + BUCKETS)
        tl.store(at, tl.sum(below))
        for byte in tl.static_range(4):
            tl.store(at + 1 + byte, tl.sum((first >> (8 * byte)) & 255))
            tl.store(at + 5 + byte, tl.sum((second >> (8 * byte)) & 255))


@jit
def _count_many(
    addresses, alive, lengths, chunks, found, low, shift,
    BUCKETS: constexpr, INTEGER: constexpr, SIZE: constexpr, BLOCK: constexpr,
):  # fmt: skip
    below = tl.zeros((BLOCK,), dtype=tl.int64)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        address, mask, length = tl.load(addresses + chunk), tl.load(alive + chunk), tl.load(lengths + chunk)
        for start in range(0, length, BLOCK):
            key, valid = _keys_at(address, mask, start + tl.arange(0, BLOCK), length, False, INTEGER)
            above = key - low
            below += (valid & (above < 0)).to(tl.int64)
            place = above >> shift
            inside = valid & (above >= 0) & (place < BUCKETS)
            tl.atomic_add(found + 1 + place, inside.to(tl.int64), mask=inside, sem="relaxed")
    tl.atomic_add(found, tl.sum(below), sem="relaxed")


@jit
def _mask(
    addresses, alive, lengths, chunks, outs, threshold, takes, equals,
    INTEGER: constexpr, SIZE: constexpr, BLOCK: constexpr,
):  # fmt: skip
    lane = tl.arange(0, 8)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        address, mask, length = tl.load(addresses + chunk), tl.load(alive + chunk), tl.load(lengths + chunk)
        out = tl.load(outs + chunk).to(tl.pointer_type(tl.uint8))
        take, all_equal = tl.load(takes + chunk), tl.load(equals + chunk)
        # Of all chunks only one has ties of both kinds, and only there does their order matter.
        mixed = (take > 0) & (take < all_equal)
        limit = tl.where(take > 0, threshold, threshold - 1)
        if (length == SIZE) & (mask == 0) & (mixed == 0):
            for start in range(0, SIZE, BLOCK):
                key, _ = _keys_at(address, mask, start + tl.arange(0, BLOCK), length, True, INTEGER)
                packed = tl.sum(tl.reshape((key > limit).to(tl.int32), (BLOCK // 8, 8)) << lane[None, :], 1)
                tl.store(out + start // 8 + tl.arange(0, BLOCK // 8), packed.to(tl.uint8))
        else:
            seen = take * 0
            for start in range(0, length, BLOCK):
                key, valid = _keys_at(address, mask, start + tl.arange(0, BLOCK), length, False, INTEGER)
                stays = (valid & (key > limit)).to(tl.int32)
                if mixed:
                    equal = (valid & (key == threshold)).to(tl.int32)
                    stays += tl.where(seen + tl.cumsum(equal) > take, equal, 0)
                    seen += tl.sum(equal)
                packed = tl.sum(tl.reshape(stays, (BLOCK // 8, 8)) << lane[None, :], 1)
                byte = start // 8 + tl.arange(0, BLOCK // 8)
                tl.store(out + byte, packed.to(tl.uint8), mask=byte * 8 < length)
