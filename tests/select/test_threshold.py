"""Exact thresholds: shards that only exchange counts decide as one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.select import threshold as threshold_module
from fxprune.select.mask import PackedMask
from fxprune.select.score import magnitude
from fxprune.select.threshold import Bracket, Shard, Threshold, common_dtype, keys, share, threshold

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
shapes = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_keys_order_as_scores_do(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    score = torch.tensor([0.0, info.smallest_normal / 2, info.smallest_normal, 0.5, 1.0, info.max], dtype=dtype)
    key = keys(score, dtype)
    assert bool((key[1:] > key[:-1]).all())
    assert int(keys(torch.tensor([-0.0], dtype=dtype), dtype)) == int(key[0]) == 0


def test_common_dtype() -> None:
    half, brain, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    assert [common_dtype({dtype}) for dtype in (half, brain, single, double)] == [half, brain, single, double]
    assert common_dtype({half, brain}) == common_dtype({half, single}) == single
    assert common_dtype({half, double}) == double
    assert common_dtype({torch.float8_e5m2}) == common_dtype([]) == single


def test_ties_are_shared_in_order() -> None:
    assert share(5, [2, 0, 9, 4]) == (2, 0, 3, 0)


def exchange(shards: list[Shard], dtype: torch.dtype, k: int) -> Threshold:
    """Two ranks that see only their own scores: what passes between them is counts."""
    brackets = [Bracket.start(dtype, k) for _ in shards]
    last: list[Tensor] = []
    while not brackets[0].done:
        last = [shard.count(bracket) for shard, bracket in zip(shards, brackets, strict=True)]
        total = torch.stack(last).sum(0)  # an all-reduce
        brackets = [bracket.narrow(total) for bracket in brackets]
    equal = [int(counts[b.digit]) for counts, b in zip(last, brackets, strict=True)]  # an all-gather
    return Threshold(dtype, brackets[0].prefix, share(brackets[0].rank, equal))


@settings(deadline=None, max_examples=60)
@given(
    many=st.lists(shapes, min_size=2, max_size=5),
    cut=st.integers(0, 5),
    fraction=st.floats(0.0, 1.0),
    dtype=st.sampled_from(FLOATS),
    levels=st.sampled_from([2, 3, 10_000]),
    digit=st.sampled_from([4, 11, 16]),
    seed=st.integers(0, 99),
)
def test_shards_reduce_into_one_threshold(
    many: list[list[int]],
    cut: int,
    fraction: float,
    dtype: torch.dtype,
    levels: int,
    digit: int,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights = [(torch.randint(-levels, levels + 1, s, generator=draw) / 64).to(dtype) for s in many]
    kept = [PackedMask.pack(torch.rand(s, generator=draw) < 0.8) for s in many]
    whole = Shard(tuple(weights), tuple(kept), magnitude)
    split = [
        Shard(tuple(weights[:cut]), tuple(kept[:cut]), magnitude),
        Shard(tuple(weights[cut:]), tuple(kept[cut:]), magnitude),
    ]
    k = round(fraction * whole.alive())
    assert whole.alive() == sum(shard.alive() for shard in split)
    before, threshold_module.DIGIT = threshold_module.DIGIT, digit
    try:
        one = threshold([whole], k)
        two = threshold(split, k)
        alone = whole.masks(one, 0)
        together = split[0].masks(two, 0) + split[1].masks(two, 1)
        if k:
            assert exchange(split, dtype, k) == two
    finally:
        threshold_module.DIGIT = before
    assert one.key == two.key and sum(one.ties) == sum(two.ties)
    assert all(torch.equal(a.bits, b.bits) for a, b in zip(alone, together, strict=True))
    gone = sum(mask.kept() for mask in kept) - sum(mask.kept() for mask in alone)
    assert gone == k


def test_a_rank_beyond_the_scores_is_refused() -> None:
    shard = Shard((torch.rand(3),), (None,))
    with pytest.raises(ValueError, match="rank 4 of only 3"):
        threshold([shard], 4)
    with pytest.raises(ValueError, match="-1"):
        threshold([shard], -1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is not interpreted beside a GPU")
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_the_kernel_decides_as_counting_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold_module, "cannot_run_on", lambda device: "")
    calls = []
    plain = threshold_module.select.keep_all_but
    monkeypatch.setattr(threshold_module.select, "keep_all_but", lambda *a: calls.append(a) or plain(*a))
    weights = tuple((torch.randint(-9, 10, size) / 8).to(dtype) for size in ((30, 40), (7,), (0, 3), (70_000,)))
    kept = (PackedMask.pack(torch.rand(30, 40) < 0.5), None, None, PackedMask.pack(torch.rand(70_000) < 0.9))
    shard = Shard(weights, kept)
    for k in (0, 1, 500, shard.alive() // 2, shard.alive()):
        for one, other in zip(shard.keep_all_but(k), shard.masks(threshold([shard], k), 0), strict=True):
            assert one.shape == other.shape and torch.equal(one.bits, other.bits)
    assert len(calls) == 5
    with pytest.raises(ValueError, match="cannot take -1"):
        shard.keep_all_but(-1)
    # What the kernel cannot read is counted.
    for other in (
        Shard((weights[0].T,), (None,)),
        Shard((weights[3][1:],), (None,)),
        Shard((weights[0], weights[1].double()), (None, None)),
        Shard(weights[:1], (None,), lambda piece: piece.abs()),
        Shard((), ()),
    ):
        if other.weights:
            assert other.keep_all_but(3)[0].kept() == other.weights[0].numel() - 3
    assert len(calls) == 6


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_the_kernel_decides_as_counting_does_on_a_gpu(dtype: torch.dtype) -> None:
    weights = tuple(torch.randn(size, device="cuda").to(dtype) for size in ((3000, 400), (7,), (2_000_000,)))
    shard = Shard(weights, (None, None, PackedMask.pack(torch.rand(2_000_000, device="cuda") < 0.9)))
    for k in (1, 500, shard.alive() // 2, shard.alive()):
        for one, other in zip(shard.keep_all_but(k), shard.masks(threshold([shard], k), 0), strict=True):
            assert torch.equal(one.bits, other.bits)
