"""masked: matrix products with a weight that is masked inside the kernel, so that w * m never lies in memory.

    x       [m, i] float32, float16 or bfloat16, rows contiguous
    weight  [o, i] of the same dtype, contiguous
    bits    uint8 [ceil(o * i / 8)]; bit j of byte b is element 8 b + j of the weight in flat order, 1 = kept

    forward          y  [m, o] = x @ (w * m).T + bias
    gradient_input   dx [m, i] = dy @ (w * m)
    gradient_weight  dw [o, i] = (dy.T @ x) * m

What a mask leaves out counts as +0.0, also where the weight holds NaN there. Sums are float32; float32 products are
those of IEEE unless torch allows TF32. A mask adds 1/8 byte an element to what is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import operands
from .language import constexpr, jit, on, tl


def unpack(weight: Tensor, bits: Tensor) -> Tensor:
    """The mask as bool, of the weight's shape."""
    lanes = bits.unsqueeze(1).bitwise_right_shift(torch.arange(8, device=bits.device)).bitwise_and(1)
    return lanes.flatten()[: weight.numel()].bool().view(weight.shape)


def reference(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [m, i] -> y [m, o], the definition."""
    return torch.nn.functional.linear(x, torch.where(unpack(weight, bits), weight, 0.0), bias)


def forward(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [m, i] -> y [m, o]. Raises ValueError for tensors that the kernel cannot read."""
    _check(x, weight, bits, bias)
    return _product(x, weight, bits, bias, weight.shape[0], turned=True)


def gradient_input(dy: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    """dy [m, o] -> dx [m, i]. Raises ValueError for tensors that the kernel cannot read."""
    _check(dy, weight, bits, turned=True)
    return _product(dy, weight, bits, None, weight.shape[1], turned=False)


def gradient_weight(dy: Tensor, x: Tensor, bits: Tensor) -> Tensor:
    """dy [m, o], x [m, i] -> dw [o, i], +0.0 where the mask leaves out. Raises ValueError as the others do."""
    found = torch.empty(dy.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device)
    _check(dy, found, bits, turned=True)
    _check(x, found, bits)
    if len(dy) != len(x):
        raise ValueError(f"dy has {len(dy)} rows and x {len(x)}")
    (o, i), m = found.shape, len(x)
    side, depth = _tile(o, x), 32
    grid = (-(-o // side), -(-i // side))
    if found.numel():
        with on(x):
            _gradient_weight[grid](
                dy, x, bits, found, o, i, m, dy.stride(0), x.stride(0),
                PRECISION=operands.precision(x), SIDE=side, DEPTH=depth, num_warps=8 if side > 64 else 4, num_stages=3,
            )  # fmt: skip
    return found


def _product(a: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, n: int, *, turned: bool) -> Tensor:
    m, k = a.shape
    found = torch.empty(m, n, dtype=a.dtype, device=a.device)
    rows = 16 if m <= 16 else 64 if m <= 64 or a.element_size() == 4 else 128
    columns, depth = _tile(n, a), 64 if a.element_size() == 2 else 32
    warps = 4 if rows < (128 if a.element_size() == 2 else 64) else 8
    grid = (-(-m // rows), -(-n // columns))
    if found.numel():
        with on(a):
            _masked[grid](
                a, weight, bits, a if bias is None else bias, found, m, n, k, a.stride(0), weight.shape[1],
                BIAS=bias is not None, TURNED=turned, WHOLE_BYTES=weight.shape[1] % 8 == 0,
                PRECISION=operands.precision(a), ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=warps, num_stages=3,
            )  # fmt: skip
    return found


def _tile(size: int, x: Tensor) -> int:
    """The side of a tile of results; those of float32 products without tensor cores have to fit the registers."""
    return 32 if size <= 32 else 64 if size <= 512 or x.element_size() == 4 else 128


def _check(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None, *, turned: bool = False) -> None:
    if weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError(f"the weight {list(weight.shape)} is no contiguous matrix")
    o, i = weight.shape
    operands.check(x, weight, (i, o) if turned else (o, i), bias)
    if bits.dtype is not torch.uint8 or bits.numel() != -(-weight.numel() // 8) or not bits.is_contiguous():
        raise ValueError(f"the mask is {bits.dtype} {list(bits.shape)}, not uint8 [{-(-weight.numel() // 8)}]")
    if bits.device != x.device:
        raise ValueError(f"x is on {x.device}, the mask on {bits.device}")


@jit
def _kept(bits, rows, columns, first, o, i, WHOLE_BYTES: constexpr, HEIGHT: constexpr, WIDTH: constexpr):
    """Which of a tile [HEIGHT, WIDTH] of the weight stay; rows int64 [HEIGHT], columns int64 [WIDTH] from `first`."""
    if WHOLE_BYTES:
        byte = first // 8 + tl.arange(0, WIDTH // 8)
        inside = (rows < o)[:, None] & (byte * 8 < i)[None, :]
        packed = tl.load(bits + rows[:, None] * (i // 8) + byte[None, :], mask=inside, other=0)
        lanes = packed[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]
        return tl.reshape(lanes & 1, (HEIGHT, WIDTH)) != 0
    else:
        inside = (rows < o)[:, None] & (columns < i)[None, :]
        place = rows[:, None] * i + columns[None, :]
        packed = tl.load(bits + (place >> 3), mask=inside, other=0)
        return ((packed >> (place & 7).to(tl.uint8)) & 1) != 0


@jit
def _masked(
    a, weight, bits, bias, found, m, n, k, stride, i,
    BIAS: constexpr, TURNED: constexpr, WHOLE_BYTES: constexpr, PRECISION: constexpr,
    ROWS: constexpr, COLUMNS: constexpr, DEPTH: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        inner = start + tl.arange(0, DEPTH).to(tl.int64)
        left = tl.load(
            a + row[:, None] * stride + inner[None, :], mask=(row < m)[:, None] & (inner < k)[None, :], other=0.0
        )
        if TURNED:
            inside = (column < n)[:, None] & (inner < k)[None, :]
            tile = tl.load(weight + column[:, None] * i + inner[None, :], mask=inside, other=0.0)
            kept = _kept(bits, column, inner, start, n, k, WHOLE_BYTES, COLUMNS, DEPTH)
            right = tl.trans(tl.where(kept, tile, 0.0))
        else:
            inside = (inner < k)[:, None] & (column < n)[None, :]
            tile = tl.load(weight + inner[:, None] * i + column[None, :], mask=inside, other=0.0)
            kept = _kept(bits, inner, column, tl.program_id(1) * COLUMNS, k, n, WHOLE_BYTES, DEPTH, COLUMNS)
            right = tl.where(kept, tile, 0.0)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    if BIAS:
        sums += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(found + row[:, None] * n + column[None, :], sums.to(found.dtype.element_ty), mask=inside)


@jit
def _gradient_weight(
    dy, x, bits, found, o, i, m, dy_stride, x_stride,
    PRECISION: constexpr, SIDE: constexpr, DEPTH: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    sums = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for start in range(0, m, DEPTH):
        inner = start + tl.arange(0, DEPTH).to(tl.int64)
        left = tl.load(
            dy + inner[:, None] * dy_stride + row[None, :], mask=(inner < m)[:, None] & (row < o)[None, :], other=0.0
        )
        right = tl.load(
            x + inner[:, None] * x_stride + column[None, :],
            mask=(inner < m)[:, None] & (column < i)[None, :],
            other=0.0,
        )
        sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION)
    inside = (row < o)[:, None] & (column < i)[None, :]
    place = row[:, None] * i + column[None, :]
    packed = tl.load(bits + (place >> 3), mask=inside, other=0)
    kept = ((packed >> (place & 7).to(tl.uint8)) & 1) != 0
    tl.store(found + place, tl.where(kept, sums, 0.0).to(found.dtype.element_ty), mask=inside)
