"""Scores, packed masks, and what is refused before anything is ranked."""

from __future__ import annotations

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
from fxprune.score import SCORES, check_weight, magnitude, scores

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
