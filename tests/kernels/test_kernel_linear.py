"""The kernels of sparse linear layers (blocks, nonzeros, gemv24, bitmap), held against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_case import ARITHMETIC, DEVICES, FLOATS, assert_sums, normal, poisoned, same_bits, sparse
from triton_kernels import activation, bitmap, blocks, gemv24, nonzeros, prune24

SIZES = [(1, 5, 36), (2, 16, 700), (5, 33, 520), (3, 7, 4), (0, 4, 8), (4, 1, 64), (1, 20, 256)]
Linear = Callable[..., Tensor]


def check(
    linear: Linear, weight: Tensor, m: int, monkeypatch: pytest.MonkeyPatch, acts: Sequence[str] = ("", "silu")
) -> None:
    """linear(x, bias, act) -> y for a weight [o, i], with and without a bias, and with activations."""
    o, i = weight.shape
    x, bias = (normal(*size, dtype=weight.dtype, device=str(weight.device)) for size in ((m, i), (o,)))
    a, w, b = x.double(), weight.double(), bias.double()
    scale = a.abs() @ w.abs().T + b.abs()
    for act in acts:
        with poisoned(monkeypatch):
            found = linear(x, bias, act)
        # An activation is no steeper than 1.13, and is itself computed to a few units.
        assert_sums(found, activation.reference(a @ w.T + b, act), 1.13 * scale + 1, i)
    assert_sums(linear(x, None, ""), a @ w.T, scale, i)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("m", "o", "i"), SIZES)
@pytest.mark.parametrize(("device", "dtype"), ARITHMETIC)
def test_few_tokens(
    device: str, dtype: torch.dtype, m: int, o: int, i: int, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = sparse(o, i, density, dtype, device)
    for layout in (nonzeros, bitmap):
        packed = layout.pack(weight)
        check(lambda x, b, act, f=layout.linear, p=packed: f(x, p, b, act), weight, m, monkeypatch)
    if dtype is not torch.float32:
        values, meta = prune24.pack(weight)
        two = prune24.reference_unpack(values, meta)
        check(lambda x, b, act: gemv24.linear(x, values, meta, b, act), two, m, monkeypatch)


@pytest.mark.parametrize(("device", "dtype"), ARITHMETIC)
def test_activations(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(32, 64, 0.5, dtype, device)
    for layout in (nonzeros, bitmap):
        packed = layout.pack(weight)
        check(lambda x, b, act, f=layout.linear, p=packed: f(x, p, b, act), weight, 3, monkeypatch, activation.NAMES)
    if dtype is not torch.float32:
        values, meta = prune24.pack(weight)
        two = prune24.reference_unpack(values, meta)
        check(lambda x, b, act: gemv24.linear(x, values, meta, b, act), two, 3, monkeypatch, activation.NAMES)
    tiles = blocks.pack(weight, (16, 16))
    check(lambda x, b, act: blocks.linear(x, tiles, b, act), weight, 3, monkeypatch, activation.NAMES)


TILES = [
    (5, 32, 48, (16, 16)),
    (70, 64, 160, (32, 32)),
    (1, 16, 512, (16, 16)),
    (3, 32, 64, (16, 64)),
    (0, 16, 16, (16, 16)),
]


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("m", "o", "i", "tile"), TILES)
@pytest.mark.parametrize(("device", "dtype"), ARITHMETIC)
def test_tiles(
    device: str,
    dtype: torch.dtype,
    m: int,
    o: int,
    i: int,
    tile: tuple[int, int],
    density: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (h, w), keep = tile, torch.rand(o // tile[0], i // tile[1]) < density
    keep[:1] = False
    mask = keep.repeat_interleave(h, 0).repeat_interleave(w, 1).to(device)
    weight = torch.where(mask, normal(o, i, dtype=dtype, device=device), 0.0)
    packed = blocks.pack(weight, tile)
    assert len(packed.values) == int(keep.sum())
    check(lambda x, b, act: blocks.linear(x, packed, b, act), weight, m, monkeypatch)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_packing_keeps_every_bit(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for (o, i), density in (((37, 300), 0.3), ((5, 1100), 1.0), ((3, 31), 0.0), ((20, 600), 0.5), ((0, 8), 1.0)):
        weight = sparse(o, i, density, dtype, device)
        if o > 4:
            weight[3, 5], weight[4, i - 10] = -0.0, torch.nan
        for layout in (nonzeros, bitmap):
            packed = layout.pack(weight)
            assert same_bits(layout.reference_unpack(packed), weight)
            with poisoned(monkeypatch):
                assert same_bits(layout.unpack(packed), weight)
    square = sparse(32, 64, 0.01, dtype, device)
    square[0, 0] = -0.0
    assert same_bits(blocks.unpack(blocks.pack(square, (16, 16))), square)


def test_a_group_holds_eight_of_a_chunk() -> None:
    weight = torch.zeros(3, 600)
    weight[1, [0, 1, 255, 256, 599]] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    weight[2, 10:19] = 1.0
    packed = nonzeros.pack(weight)
    # Three chunks with something in row 1, so three groups; each of the sixteen places has as many.
    assert packed.values.shape == (16 * 3, 8) and packed.starts.tolist() == [0, 48]
    assert packed.order.tolist() == [1, 2, 0, *[3] * 13]
    assert packed.chunks[:6].tolist() == [0, 1, 2, 0, 0, 0]
    assert packed.values[0].tolist() == [1.0, 2.0, 3.0, 0, 0, 0, 0, 0] and packed.columns[0, :3].tolist() == [0, 1, 255]
    assert packed.columns[2, 0] == 599 - 512 and packed.values[4].tolist() == [1.0, *[0] * 7]


@pytest.mark.parametrize("device", DEVICES)
def test_infinities_in_x_meet_stored_values_alone(device: str) -> None:
    weight = sparse(6, 300, 0.2, torch.float32, device)
    weight[:, 0] = 0.0
    x = normal(2, 300, device=device)
    x[:, 0] = torch.inf
    for layout in (nonzeros, bitmap):
        assert bool(layout.linear(x, layout.pack(weight)).isfinite().all())


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_x_begin_anywhere(device: str) -> None:
    weight = sparse(16, 32, 0.5, torch.float16, device)
    wide = normal(5, 45, dtype=torch.float16, device=device)
    values, meta = prune24.pack(weight)
    tiles, bits, groups = blocks.pack(weight, (16, 16)), bitmap.pack(weight), nonzeros.pack(weight)
    for first in (0, 1, 4, 8):
        x = wide[:, first : first + 32]
        for linear in (
            lambda x: gemv24.linear(x, values, meta),
            lambda x: blocks.linear(x, tiles),
            lambda x: bitmap.linear(x, bits),
            lambda x: nonzeros.linear(x, groups),
        ):
            assert torch.equal(linear(x), linear(x.clone(memory_format=torch.contiguous_format)))


def test_what_the_kernels_cannot_read_is_refused() -> None:
    weight = torch.randn(16, 32).half()
    x = torch.randn(2, 32).half()
    packed: list[tuple[Any, tuple[Any, ...]]] = [
        (nonzeros, (nonzeros.pack(weight),)),
        (bitmap, (bitmap.pack(weight),)),
        (blocks, (blocks.pack(weight, (16, 16)),)),
        (gemv24, prune24.reference_pack(weight)),
    ]
    for layout, given in packed:
        for x_, bias, act, why in (
            (x.float(), None, "", "x is torch.float32 and the weight torch.float16"),
            (x[:, :31], None, "", r"x \[2, 31\] does not fit"),
            (torch.randn(32, 2).half().T, None, "", "rows of x"),
            (x, torch.randn(15).half(), "", r"the bias is torch.float16 \[15\]"),
            (x, None, "tanh", "there is no activation 'tanh', only '', 'relu'"),
        ):
            with pytest.raises(ValueError, match=why):
                layout.linear(x_, *given, bias, act)
    for call, why in (
        (lambda: blocks.pack(weight, (5, 16)), "tiles 5x16 do not divide a weight 16x32"),
        (lambda: blocks.linear(x, blocks.pack(weight, (8, 8))), "powers of two from 16 on, not 8x8"),
        (
            lambda: gemv24.linear(x.float(), *prune24.reference_pack(weight.float())),
            "16 bits at once, not torch.float32",
        ),
        (lambda: prune24.unpack(weight, weight), "meta is torch.float16"),
        (lambda: nonzeros.pack(torch.zeros(1, 65537)), "a weight of 65537 columns is too wide"),
        (lambda: bitmap.pack(torch.ones(1, 65536)), "a row of 65536 nonzeros is too long"),
    ):
        with pytest.raises(ValueError, match=why):
            call()
