"""Scores, packed masks, and what is refused before anything is ranked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune import mask as mask_module
from fxprune.errors import InputError
from fxprune.mask import PackedMask, chunks
from fxprune.patterns import Channels
from fxprune.score import SCORES, check_weight, group_score, magnitude, scores

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def refused(make: Callable[[], object], *words: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert error.value.what and error.value.where and error.value.why and error.value.do
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize("dtype", FLOATS)
def test_magnitude(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-1.5, 2.0], [0.0, -0.0]]).to(dtype)
    score = magnitude(weight)
    assert score.dtype == dtype
    assert torch.equal(score.double(), weight.double().abs())


def test_every_named_score_states_its_source() -> None:
    assert SCORES["l1"] is magnitude
    assert all("Source:" in (score.__doc__ or "") for score in SCORES.values())


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_weights_pass_and_others_do_not(dtype: torch.dtype) -> None:
    weight = torch.ones(3, 5).to(dtype)
    check_weight("w", weight)
    check_weight("w", weight.t())
    check_weight("w", weight[:0])
    broken = weight.float()
    broken[1, 2] = float("nan")
    refused(lambda: check_weight("enc.w", broken.to(dtype)), '"enc.w" [3, 5]', "NaN")


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinite_weight(value: float) -> None:
    refused(lambda: check_weight("enc.w", torch.tensor([1.0, value])), '"enc.w"', "infinity")


def test_weights_without_float_values() -> None:
    refused(lambda: check_weight("w", torch.ones(2, dtype=torch.int64)), "int64")
    refused(lambda: check_weight("w", torch.ones(2, dtype=torch.complex64)), "complex64")
    refused(lambda: check_weight("w", torch.ones(2, device="meta")), "meta")


def test_user_score() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    found = scores("w", weight, lambda w: w.square())
    assert torch.equal(found, weight.detach().square()) and not found.requires_grad


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (lambda w: 3.0, "float"),
        (lambda w: w[:2].abs(), "[2, 4]"),
        (lambda w: w.long(), "int64"),
        (lambda w: w.to(torch.complex64), "complex64"),
        (lambda w: w.abs() / 0.0, "NaN or infinite"),
        (lambda w: -w.abs() - 1, "negative"),
        (lambda w: w.abs().to("meta"), "meta"),
    ],
)
def test_bad_user_scores(answer: Callable[[Tensor], Any], word: str) -> None:
    refused(lambda: scores("enc.w", torch.ones(3, 4), answer), '"enc.w" [3, 4]', word)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    seed=st.integers(0, 9),
    chunk=st.sampled_from([8, 64, 1 << 20]),
)
def test_masks_pack_and_unpack(shape: list[int], seed: int, chunk: int) -> None:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    before = mask_module.CHUNK
    mask_module.CHUNK = chunk
    try:
        packed = PackedMask.pack(keep)
        assert torch.equal(packed.unpack(), keep)
        assert torch.equal(
            PackedMask.pack(keep.mT if keep.dim() > 1 else keep).unpack(), keep.mT if keep.dim() > 1 else keep
        )
    finally:
        mask_module.CHUNK = before
    assert packed.shape == keep.shape and packed.bits.shape == (-(-keep.numel() // 8),)
    assert packed.kept() == int(keep.sum())
    assert packed.bits.tolist() == reference_bits(keep)
    assert PackedMask.ones(shape).bits.tolist() == reference_bits(torch.ones(shape, dtype=torch.bool))


def reference_bits(keep: Tensor) -> list[int]:
    flat = keep.flatten().tolist()
    return [sum(bit << j for j, bit in enumerate(flat[b : b + 8])) for b in range(0, len(flat), 8)]


def test_a_slice_of_bools_packs() -> None:
    keep = torch.rand(41) < 0.5
    assert torch.equal(PackedMask.pack(keep[3:35]).unpack(), keep[3:35])


def test_only_bools_pack() -> None:
    with pytest.raises(TypeError, match="float32"):
        PackedMask.pack(torch.ones(3))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bool])
def test_chunks_of_strided_tensors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_module, "CHUNK", 8)
    weight = torch.randn(5, 7, 2).to(dtype).permute(2, 0, 1)
    flat = torch.cat([piece.float() for piece in chunks(weight)])
    assert torch.equal(flat, weight.float().flatten())


NORMS = [0.1, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf]


def members() -> list[tuple[Tensor, int, Tensor]]:
    """Members of a group of six: by rows, by columns with two indices elsewhere, and two slices for each index."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(6)
    elsewhere = torch.cat([index, index.new_full((2,), -1)])
    return [
        (torch.randn(6, 20, generator=generator) * 0.005, 0, index),
        (torch.randn(3, 8, generator=generator) * 0.005, 1, elsewhere),
        (torch.randn(12, 2, 3, generator=generator) * 0.005, 0, index.repeat_interleave(2)),
        (torch.randn(6, generator=generator) * 0.005, 0, index),
    ]


def by_definition(tensor: Tensor, dim: int, index: Tensor, p: float) -> Tensor:
    rows = tensor.movedim(dim, 0).double()
    return torch.stack([torch.linalg.vector_norm(rows[index == i], p) for i in range(6)])


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("norm", NORMS)
def test_group_scores_are_the_norms_of_all_slices(norm: float, reduce: str) -> None:
    norms = torch.stack([by_definition(*member, norm) for member in members()])
    wanted = {"sum": norms.sum(0), "mean": norms.mean(0), "max": norms.amax(0)}[reduce]
    torch.testing.assert_close(group_score(members(), Channels(0.5, norm=norm, reduce=reduce)), wanted)


@pytest.mark.parametrize("scale", [1e-30, 0.005, 1.0, 1e30])
@pytest.mark.parametrize("norm", [300, 1e6])
def test_large_norms_rank_as_the_largest_magnitude_does(norm: float, scale: float) -> None:
    scaled = [(tensor.double() * scale, dim, index) for tensor, dim, index in members()]
    found = group_score(scaled, Channels(0.5, norm=norm))
    limit = group_score(scaled, Channels(0.5, norm=math.inf))
    torch.testing.assert_close(found, limit, rtol=0.02, atol=0)
    assert torch.equal(found.argsort(), limit.argsort())


@pytest.mark.parametrize("norm", [1, 2, 300, math.inf])
def test_slices_of_zeros_score_zero(norm: float) -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-3, 2e-3]])
    found = group_score([(weight, 0, torch.arange(2))], Channels(0.5, norm=norm))
    assert found[0] == 0 and found[1] > 0
    empty = group_score([(weight[:, :0], 0, torch.arange(2))], Channels(0.5, norm=norm))
    assert empty.tolist() == [0, 0]
