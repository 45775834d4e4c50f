"""The exact k-th smallest score by counting, so that chunks, tensors, devices and ranks reduce into one.

A non-negative float orders as the integer of its bit pattern does: that integer is its key. The threshold is
found digit by digit from the top (radix selection: Alabi et al., "Fast k-selection algorithms for graphics
processing units", 2012). Each step counts how often each next digit occurs among the keys still in question.
Counts simply add, so nobody needs another's scores:

    bracket = Bracket.start(dtype, k)
    while not bracket.done:
        counts = shard.count(bracket)                    # own scores only
        bracket = bracket.narrow(<sum of all counts>)    # the same on every shard
    ties = share(bracket.rank, <every shard's last counts[bracket.digit]>)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxprune.kernels.triton import cannot_run_on, select

from .mask import PackedMask, chunks
from .score import magnitude

# 16 bits settle fp16 and bf16 in one walk over the scores and fp32 in two; the counts (512 KB) still fit the
# cache.
DIGIT = 16

# dtype of scores -> the integer of its width, and its bits without the sign
_KEYS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float16: (torch.int16, 15),
    torch.bfloat16: (torch.int16, 15),
    torch.float32: (torch.int32, 31),
    torch.float64: (torch.int64, 63),
    torch.int64: (torch.int64, 63),
}

# dtype of weights -> that of their magnitudes, where it is another
_MAGNITUDES: dict[torch.dtype, torch.dtype] = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds magnitudes of all `dtypes` without rounding: their own, else float32, else float64.

    Integers are held as int64; beside floats as float64, which rounds those above 2 ** 53.
    """
    found = {_MAGNITUDES.get(dtype, dtype) for dtype in dtypes}
    found = {dtype if dtype.is_floating_point else torch.int64 for dtype in found}
    if len(found) == 1 and found <= set(_KEYS):
        return found.pop()
    return torch.float64 if found & {torch.float64, torch.int64} else torch.float32


def keys(score: Tensor, dtype: torch.dtype) -> Tensor:
    """score [n], non-negative, NaN above infinity -> integer keys [n] in the same order; -0.0 and +0.0 have one key.

    `dtype` must hold every score exactly (`common_dtype`).
    """
    integer, bits = _KEYS[dtype]
    return score.to(dtype).view(integer) & ((1 << bits) - 1)


@dataclass(frozen=True)
class Bracket:
    """What is known of the threshold: `prefix`, all but its `left` lowest bits, and `rank`.

    `rank`, from 1, is its place among the keys that begin with `prefix`. `digit` is the digit found last:
    when all are known, a shard's last counts at `digit` say how many of its keys equal the threshold.
    """

    dtype: torch.dtype
    left: int
    prefix: int
    rank: int
    digit: int = 0

    @classmethod
    def start(cls, dtype: torch.dtype, k: int) -> Bracket:
        """Nothing known yet of the k-th smallest key (k >= 1) of scores in `dtype`."""
        return cls(dtype, _KEYS[dtype][1], 0, k)

    @property
    def done(self) -> bool:
        """Whether `prefix` is the whole threshold; `rank` then says how many of the keys equal to it go."""
        return self.left == 0

    @property
    def width(self) -> int:
        """Bits in the next digit."""
        return min(DIGIT, self.left)

    def narrow(self, counts: Tensor) -> Bracket:
        """counts [2 ** width] of the next digit over all shards -> the bracket with that digit known."""
        reach = counts.cumsum(0)
        if int(reach[-1]) < self.rank:
            raise ValueError(f"rank {self.rank} of only {int(reach[-1])} scores")
        digit = int(torch.searchsorted(reach, self.rank))
        below = int(reach[digit] - counts[digit])
        return replace(
            self,
            left=self.left - self.width,
            prefix=self.prefix << self.width | digit,
            rank=self.rank - below,
            digit=digit,
        )


@dataclass(frozen=True)
class Threshold:
    """Keys below `key` go, and of those equal to it the first `ties[s]` of shard s, in flat order."""

    dtype: torch.dtype
    key: int
    ties: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Shard:
    """Weights held in one place (a device, a rank), in the order in which ties are broken, and their score.

    `kept` holds a mask or None for each weight: elements masked already are not counted and stay masked.
    `score` maps a piece [n] of a weight to non-negative finite scores [n], element by element.
    """

    weights: tuple[Tensor, ...]
    kept: tuple[PackedMask | None, ...]
    score: Callable[[Tensor], Tensor] = magnitude

    def alive(self) -> int:
        """How many elements are not masked already: what a threshold ranks."""
        pairs = zip(self.weights, self.kept, strict=True)
        return sum(weight.numel() if kept is None else kept.kept() for weight, kept in pairs)

    def keep_all_but(self, k: int) -> list[PackedMask]:
        """One mask for each weight, by which the k elements leave that score least; on a GPU by one kernel for all.

        Raises ValueError where k is negative or more than there are.
        """
        if not self._suits_kernel():
            return self.masks(threshold([self], k), 0)
        alive = [None if kept is None else kept.bits for kept in self.kept]
        found = select.keep_all_but(select.chunks(self.weights, alive), k)
        return [PackedMask(tuple(w.shape), bits) for w, bits in zip(self.weights, found, strict=True)]

    def _suits_kernel(self) -> bool:
        """Whether the kernel may stand in for counting: it knows magnitudes alone, and reads what lies in order."""
        if self.score is not magnitude or not self.weights:
            return False
        first = self.weights[0]
        if first.dtype not in select.DTYPES or cannot_run_on(first.device):
            return False
        return all(
            (weight.dtype, weight.device) == (first.dtype, first.device)
            and type(weight) in (Tensor, torch.nn.Parameter)
            and select.is_readable(weight)
            for weight in self.weights
        )

    def count(self, bracket: Bracket) -> Tensor:
        """Counts [2 ** width] int64, on the CPU, of the next digit among keys that begin as `bracket`."""
        total = torch.zeros(1 << bracket.width, dtype=torch.int64, device="cpu")
        rest = bracket.left - bracket.width
        whole = bracket.left == _KEYS[bracket.dtype][1]
        for weight, kept in zip(self.weights, self.kept, strict=True):
            counts = torch.zeros_like(total, device=weight.device)
            for key, alive in self._keys(weight, kept, bracket.dtype):
                if alive is not None:
                    key = key[alive]
                if not whole:
                    key = key[(key >> bracket.left) == bracket.prefix]
                digit = (key >> rest) & ((1 << bracket.width) - 1)
                counts += torch.bincount(digit, minlength=1 << bracket.width)
            total += counts.cpu()
        return total

    def masks(self, threshold: Threshold, shard: int) -> list[PackedMask]:
        """One mask for each weight; `shard` says which of the threshold's ties are this shard's."""
        ties = threshold.ties[shard]
        made = []

        def pieces(weight: Tensor, kept: PackedMask | None) -> Iterator[Tensor]:
            nonlocal ties
            for key, alive in self._keys(weight, kept, threshold.dtype):
                keep = key >= threshold.key
                if alive is not None:
                    keep &= alive
                if ties:
                    equal = (key == threshold.key) & keep
                    gone = equal.nonzero().squeeze(1)[:ties]
                    keep[gone] = False
                    ties -= gone.numel()
                yield keep

        for weight, kept in zip(self.weights, self.kept, strict=True):
            made.append(PackedMask.from_chunks(weight.shape, weight.device, pieces(weight, kept)))
        return made

    def _keys(
        self, weight: Tensor, kept: PackedMask | None, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        alive = iter(kept.chunks()) if kept is not None else None
        for piece in chunks(weight):
            yield keys(self.score(piece), dtype), None if alive is None else next(alive)


def share(rank: int, equal: Sequence[int]) -> tuple[int, ...]:
    """How many of `rank` ties each shard takes, shards in order, given how many equal elements each has."""
    taken = []
    for count in equal:
        taken.append(min(count, rank))
        rank -= taken[-1]
    return tuple(taken)


def threshold(shards: Sequence[Shard], k: int) -> Threshold:
    """The threshold that takes exactly `k` of the elements of all `shards` that are not masked already.

    Raises ValueError where k is negative or more than there are.
    """
    dtype = common_dtype(weight.dtype for shard in shards for weight in shard.weights)
    if k == 0:
        return Threshold(dtype, 0, (0,) * len(shards))
    if k < 0:
        raise ValueError(f"cannot take {k} elements")
    bracket, last = Bracket.start(dtype, k), []
    while not bracket.done:
        last = [shard.count(bracket) for shard in shards]
        bracket = bracket.narrow(torch.stack(last).sum(0))
    equal = [int(counts[bracket.digit]) for counts in last]
    return Threshold(dtype, bracket.prefix, share(bracket.rank, equal))
