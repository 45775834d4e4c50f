"""norms: Lp norms of channels and of blocks of a weight, each element read once, and the same every time.

    slices  x [a, c, b] -> [c]: one norm for each index of the middle dimension
    tiles   x [r, n] -> [r / h, n / w]: one norm for each tile [h, w]

x is float32, float16 or bfloat16 and contiguous; p is a number above 0 or infinity. Sums are float32, of pieces of a
fixed size in a fixed order, and so are the norms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .language import WHY_NOT, constexpr, jit, on, tl

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Elements of one channel that a program sums; more programs share a longer one.
_PIECE = 1 << 14
# A grid has at most 65535 programs in its second dimension.
_MOST = 1 << 15


def reference_slices(x: Tensor, p: float) -> Tensor:
    """x [a, c, b] -> norms [c] float32."""
    return (
        torch.linalg.vector_norm(x.float(), p, dim=(0, 2))
        if x.numel()
        else x.new_zeros(x.shape[1], dtype=torch.float32)
    )


def reference_tiles(x: Tensor, shape: tuple[int, int], p: float) -> Tensor:
    """x [r, n] -> norms [r / h, n / w] float32 of tiles of `shape` (h, w)."""
    (r, n), (h, w) = x.shape, shape
    return torch.linalg.vector_norm(x.float().view(r // h, h, n // w, w), p, dim=(1, 3))


def slices(x: Tensor, p: float = 2.0) -> Tensor:
    """x [a, c, b] -> norms [c] float32. Raises ValueError for tensors that the kernel cannot read."""
    _check(x, 3, p)
    a, c, b = x.shape
    if x.numel() == 0:
        return torch.zeros(c, dtype=torch.float32, device=x.device)
    block_c, block_b = (64, 16) if b == 1 else (4, 256)
    pieces = max(1, min(_MOST, -(-a * b // _PIECE)))
    sums = torch.empty(pieces, c, dtype=torch.float32, device=x.device)
    share = -(-a * b // pieces)
    each = -(-share // block_b) * block_b
    with on(x):
        _slices[(-(-c // block_c), pieces)](
            x, sums, a * b, b, c, each, P=float(p), KIND=_kind(p), BLOCK_C=block_c, BLOCK_B=block_b, num_warps=4
        )
    return _root(sums, p)


def tiles(x: Tensor, shape: tuple[int, int], p: float = 2.0) -> Tensor:
    """x [r, n] -> norms [r / h, n / w] float32 of tiles (h, w). Raises ValueError as `slices` does."""
    _check(x, 2, p)
    (r, n), (h, w) = x.shape, shape
    if h < 1 or w < 1 or r % h or n % w:
        raise ValueError(f"tiles {h}x{w} do not divide {list(x.shape)}")
    sums = torch.empty(r // h, n // w, dtype=torch.float32, device=x.device)
    if x.numel():
        wide = 1 << (w - 1).bit_length()
        high = min(1 << (h - 1).bit_length(), max(1, 4096 // wide))
        count = max(1, 4096 // (wide * high))
        with on(x):
            _tiles[(r // h * -(-(n // w) // count),)](
                x, sums, n, h, w, P=float(p), KIND=_kind(p), HIGH=high, WIDE=wide, COUNT=count, num_warps=4
            )
    return _root(sums.unsqueeze(0), p)


def _kind(p: float) -> int:
    return {1.0: 1, 2.0: 2, math.inf: 0}.get(float(p), 3)


def _root(sums: Tensor, p: float) -> Tensor:
    """Sums [pieces, ...] of |x| ** p -> norms [...]."""
    if p == math.inf:
        return sums.amax(0)
    total = sums.sum(0)
    return total if p == 1 else total.sqrt() if p == 2 else total.pow(1 / p)


def _check(x: Tensor, dims: int, p: float) -> None:
    if WHY_NOT:
        raise RuntimeError(WHY_NOT)
    if x.dtype not in _DTYPES or x.dim() != dims or not x.is_contiguous():
        raise ValueError(
            f"the kernel reads contiguous float tensors of {dims} dimensions, not {x.dtype} {list(x.shape)}"
        )
    if not p > 0:
        raise ValueError(f"there is no norm of order {p}")


@jit
def _power(x, P: constexpr, KIND: constexpr):
    size = tl.abs(x.to(tl.float32))
    if KIND == 2:
        return size * size
    elif KIND == 3:
        # exp2 and log2 are what a device has; zero has no logarithm, and NaN stays.
        return tl.where(size == 0, 0.0, tl.exp2(P * tl.log2(tl.where(size == 0, 1.0, size))))
    else:
        return size


@jit
def _slices(x, sums, length, b, c, each, P: constexpr, KIND: constexpr, BLOCK_C: constexpr, BLOCK_B: constexpr):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1).to(tl.int64) * each
    total = tl.zeros((BLOCK_C, BLOCK_B), dtype=tl.float32)
    for start in range(0, each, BLOCK_B):
        inner = first + start + tl.arange(0, BLOCK_B)
        inside = (channel < c)[:, None] & ((inner < length) & (start + tl.arange(0, BLOCK_B) < each))[None, :]
        place = (inner // b * b * c + inner % b)[None, :] + (channel.to(tl.int64) * b)[:, None]
        term = _power(tl.load(x + place, mask=inside, other=0.0), P, KIND)
        total = tl.maximum(total, term, propagate_nan=tl.PropagateNan.ALL) if KIND == 0 else total + term
    if KIND == 0:
        # A maximum passes over NaN; the sum of what is none does not.
        result = tl.max(total, 1) + tl.sum(tl.where(total != total, total, 0.0), 1)
    else:
        result = tl.sum(total, 1)
    tl.store(sums + tl.program_id(1) * c + channel, result, mask=channel < c)


@jit
def _tiles(x, sums, n, h, w, P: constexpr, KIND: constexpr, HIGH: constexpr, WIDE: constexpr, COUNT: constexpr):
    many = n // w
    each = tl.cdiv(many, COUNT)
    band = tl.program_id(0).to(tl.int64) // each
    tile = tl.program_id(0) % each * COUNT + tl.arange(0, COUNT)
    lane = tl.arange(0, WIDE)
    inside = (tile < many)[:, None] & (lane < w)[None, :]
    column = tile[:, None] * w + lane[None, :]
    total = tl.zeros((HIGH, COUNT, WIDE), dtype=tl.float32)
    for start in range(0, h, HIGH):
        row = start + tl.arange(0, HIGH)
        place = (band * h + row)[:, None, None] * n + column[None, :, :]
        term = _power(tl.load(x + place, mask=(row < h)[:, None, None] & inside[None, :, :], other=0.0), P, KIND)
        total = tl.maximum(total, term, propagate_nan=tl.PropagateNan.ALL) if KIND == 0 else total + term
    if KIND == 0:
        unknown = tl.where(total != total, total, 0.0)
        result = tl.max(tl.max(total, 0), 1) + tl.sum(tl.sum(unknown, 0), 1)
    else:
        result = tl.sum(tl.sum(total, 0), 1)
    tl.store(sums + band * many + tile, result, mask=tile < many)
