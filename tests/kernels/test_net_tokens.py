"""net over tokens: linears, layer norm and attention against plain torch, for odd sizes, batches and masks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.kernels import native
from fxprune.kernels.native import net, tiles
from fxprune.kernels.native.net import Finish, Taps

from .net_case import Made, agrees, op

pytestmark = pytest.mark.skipif(not native.status().available, reason="needs a C++ compiler")


def started(width: int, *channels: int, tile: int = 4, seed: int = 0) -> Made:
    """A net with an input [n, width, c] for each of `channels`."""
    made = Made(torch.Generator().manual_seed(seed))
    for number, c in enumerate(channels):
        made.add(net.Enter(number, tile), (c, 1, width))
    return made


def attention(made: Made, q: int, k: int, v: int, heads: int, **more: Any) -> int:
    sizes = [made.shapes[x][0] // heads for x in (q, k, v)]
    step = net.Attention(q, k, v, heads, more.pop("size", sizes[0]), more.pop("v_size", sizes[2]), **more)
    return made.add(step, (heads * step.v_size, 1, made.shapes[q][2]))


def leave(made: Made, x: int) -> Made:
    made.steps.append(net.Exit(x, "tokens"))
    return made


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 70),
    images=st.integers(1, 5),
    channels=st.integers(1, 9),
    tile=st.sampled_from(net.TILES),
    affine=st.sampled_from([(True, True), (True, False), (False, False)]),
    seed=st.integers(0, 99),
)
def test_layer_norm(
    width: int, images: int, channels: int, tile: int, affine: tuple[bool, bool], seed: int
) -> None:  # fmt: skip
    made = started(width, channels, tile=tile, seed=seed)
    weight, bias = (made.put_dense(made.random(channels)) if given else -1 for given in affine)
    made.add(net.LayerNorm(0, weight, bias, 1e-3), (channels, 1, width))
    agrees(leave(made, 1), [made.random(images, width, channels)])


@st.composite
def any_attention(draw: st.DrawFn) -> tuple[Made, list[Tensor]]:
    images, heads = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    size, v_size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    first = [draw(st.integers(0, 2)) for _ in range(3)]
    channels = [first[0] + heads * size, first[1] + heads * size + 1, first[2] + heads * v_size]
    made = Made(torch.Generator().manual_seed(draw(st.integers(0, 99))))
    inputs = []
    for number, (c, width) in enumerate(zip(channels, (queries, keys, keys))):
        made.add(net.Enter(number, draw(st.sampled_from(net.TILES))), (c, 1, width))
        inputs.append(made.random(images, width, c))
    mask = -1
    if draw(st.booleans()):
        full = (images, heads, queries, keys)
        added = made.random(*(size if draw(st.booleans()) else 1 for size in full))
        added[torch.rand(added.shape, generator=made.generator) < 0.3] = -math.inf
        inputs.append(added.to(memory_format=draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))))
        mask = 3
    where = {"first_q": first[0], "first_k": first[1], "first_v": first[2], "size": size, "v_size": v_size}
    scale = draw(st.sampled_from([1.0, 0.3]))
    attention(made, 0, 1, 2, heads, mask=mask, causal=draw(st.booleans()), scale=scale, **where)
    return leave(made, 3), inputs


@settings(max_examples=120, deadline=None)
@given(any_attention())
def test_attention(case: tuple[Made, list[Tensor]]) -> None:
    agrees(*case)


@settings(max_examples=120, deadline=None)
@given(any_attention(), st.sampled_from([1, 2]))
def test_attention_of_bfloat16_numbers(case: tuple[Made, list[Tensor]], threads: int) -> None:
    made, inputs = case
    inputs = [inputs[0][:1], *(x[:1] for x in inputs[1:])]  # tiles have one image
    steps = [dataclasses.replace(s, rounds=True) if isinstance(s, net.Attention) else s for s in made.steps]
    made.steps = steps
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        arguments = made.arguments(inputs)
        (got,), (wanted,) = op(*arguments), net.net_reference(*arguments)
    finally:
        torch.set_num_threads(before)
    # Scores are off by 2^-8 of sums of up to nine products of normal numbers, and shares by what that comes to.
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.15)
    assert (got - wanted).abs().mean() < 0.01


@pytest.mark.parametrize(("size", "v_size"), [(64, 64), (32, 40), (80, 33)])
@pytest.mark.parametrize("width", [1, 31, 128, 200])
def test_long_heads_of_bfloat16_numbers(size: int, v_size: int, width: int) -> None:
    made = started(width, 2 * (2 * size + v_size), tile=8)
    where = {"first_k": 2 * size, "first_v": 4 * size, "size": size, "v_size": v_size, "scale": size**-0.5}
    leave(made, attention(made, 0, 0, 0, 2, causal=True, rounds=True, **where))
    x = made.random(1, width, 2 * (2 * size + v_size))
    arguments = made.arguments([x])
    (got,), (wanted,) = op(*arguments), net.net_reference(*arguments)
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("images", [1, 3, 16])
@pytest.mark.parametrize("width", [1, 5, 16, 33, 128])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_encoder_layer(images: int, width: int, threads: int) -> None:
    made = started(width, 24, tile=8)
    blocks: dict[str, Any] = {"blocks": (16, 24), "tile": 8}
    q, k, v = (made.conv(0, 24, Taps(), **blocks) for _ in range(3))
    mixed = attention(made, q, k, v, 3, scale=8**-0.5)
    x = made.conv(mixed, 24, Taps(), residual=0, **blocks)
    norm = [made.put_dense(made.random(24)) for _ in range(2)]
    x = made.add(net.LayerNorm(x, *norm), (24, 1, width))
    y = made.conv(x, 50, Taps(), finish=Finish("gelu"), **blocks)
    y = made.conv(y, 24, Taps(), residual=x, **blocks)
    leave(made, made.add(net.LayerNorm(y, *norm), (24, 1, width)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        agrees(made, [made.random(images, width, 24)])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 16, 33, 100])
@pytest.mark.parametrize("channels", [1, 31, 64, 400, 801])
@pytest.mark.parametrize("tile", net.TILES)
def test_products_by_tiles(rows: int, channels: int, tile: int) -> None:
    # 400 columns are expanded in two goes, 801 in three.
    made = started(40, channels, rows, tile=tile)
    y = made.product(0, rows, residual=1, finish=Finish("relu", -1.0, 3.0))
    z = made.product(0, rows, zeros=0.95, bias=False, finish=Finish("silu", adds_last=True), residual=y)
    leave(made, z)
    before = torch.get_num_threads()
    try:
        for threads, images in ((1, 1), (2, 1), (2, 3)):
            torch.set_num_threads(threads)
            agrees(made, [made.random(images, 40, channels), made.random(images, 40, rows)])
    finally:
        torch.set_num_threads(before)


def test_products_round_what_they_read_to_the_nearest_bfloat16() -> None:
    made = started(17, 32)
    weight = torch.eye(32)
    packed = net.pack_panels(weight.bfloat16())
    made.panels.append(packed)
    made.all_starts.append(packed.starts)
    leave(made, made.add(net.Product(0, 32, 32, values=len(packed.values)), (32, 1, 17)))
    x = made.random(1, 17, 32)
    x[0, 0] = 1.0 + 2.0**-8 * torch.arange(32)  # half way between two, every other time
    (y,) = op(*made.arguments([x]))
    assert torch.equal(y, x.bfloat16().float())
    x[0, 5, 3] = math.nan
    (y,) = op(*made.arguments([x]))
    # By tiles a zero of the weight is multiplied, as in a dense product; without them it is passed over.
    assert y[0, 5].isnan().sum() == (32 if tiles.isa() == "AMX" else 1)
    assert not y[0, :5].isnan().any() and not y[0, 6:].isnan().any()


def test_a_query_that_sees_no_key_gets_zeros_as_in_torch() -> None:
    made = started(6, 4)
    leave(made, attention(made, 0, 0, 0, 1, mask=1))
    x, mask = made.random(2, 6, 4), torch.zeros(1, 1, 6, 6)
    mask[:, :, 2] = -math.inf
    (y,) = op(*made.arguments([x, mask]))
    wanted = F.scaled_dot_product_attention(x, x, x, mask[0], scale=1.0)
    assert not y[:, 2].any()
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_no_number_makes_its_own_row_of_its_own_head_nan(bad: float) -> None:
    made = started(20, 4, 4)
    leave(made, attention(made, 0, 1, 1, 2))
    x, other = made.random(1, 20, 4), made.random(1, 20, 4)
    (plain,) = op(*made.arguments([x.clone(), other]))
    x[0, 9, 0] = bad
    (y,) = op(*made.arguments([x, other]))
    assert y[0, 9, :2].isnan().all()
    y[0, 9, :2] = plain[0, 9, :2]
    torch.testing.assert_close(y, plain, rtol=0, atol=0)


def test_no_images() -> None:
    made = leave(started(7, 5), 0)
    assert [y.shape for y in op(*made.arguments([torch.zeros(0, 7, 5)]))] == [(0, 7, 5)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mask": 7}, "out of range"),
        ({"mask": 1}, "another size than the scores"),
        ({"heads": 3}, "more heads than its maps"),
        ({"first_v": 1}, "more heads than its maps"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], says: str) -> None:
    made = started(6, 4)
    made.steps.append(net.Attention(0, 0, 0, **{"heads": 2, "size": 2, "v_size": 2, **changes}))
    leave(made, 1)
    inputs = [made.random(1, 6, 4), torch.zeros(1, 1, 5, 6)]
    with pytest.raises(RuntimeError, match=says):
        op(*made.arguments(inputs))


def test_a_map_of_several_rows_is_no_row_of_tokens() -> None:
    made = leave(Made(torch.Generator(), [net.Enter(0)]), 0)
    with pytest.raises(RuntimeError, match="several rows"):
        op(*made.arguments([torch.zeros(1, 2, 3, 4)]))
