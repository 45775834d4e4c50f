"""global_unstructured: one ranking over many weights, whatever holds them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.prune as theirs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune.prune as ours
from fxprune.select import mask as packed_mask
from fxprune.select.threshold import Bracket, Shard, keys, threshold

Pairs = list[tuple[nn.Module, str]]


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 3), nn.Embedding(4, 6), nn.Linear(3, 1))


def places(model: nn.Module, chosen: list[bool]) -> Pairs:
    pairs = [(m, n) for m in model for n, p in list(m.named_parameters()) if p is not None]
    return [pair for pair, take in zip(pairs, chosen, strict=False) if take] or pairs[:1]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 999),
    st.lists(st.booleans(), min_size=9, max_size=9),
    st.lists(st.one_of(st.floats(0, 1), st.integers(0, 12)), min_size=1, max_size=3),
    st.sampled_from(["L1Unstructured", "RandomUnstructured"]),
    st.sampled_from(["none", "some", "all"]),
    st.sampled_from([64, 1 << 20]),
)
def test_masks_equal_torchs(
    seed: int, chosen: list[bool], amounts: list[float], how: str, scored: str, chunk: int
) -> None:
    model = net(seed)
    with torch.no_grad():  # a batch-norm starts with equal weights, which tie
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    twin = copy.deepcopy(model)
    before, packed_mask.CHUNK = packed_mask.CHUNK, chunk
    try:
        for index, amount in enumerate(amounts):
            failed = []
            for lib, each in ((theirs, twin), (ours, model)):
                generator = torch.Generator().manual_seed(seed + index)
                pairs = places(each, chosen) if index == 0 else pairs_of(each)
                scores = {
                    pair: torch.randn(getattr(*pair).shape, generator=generator)
                    for at, pair in enumerate(pairs)
                    if scored == "all" or (scored == "some" and at % 2)
                }
                torch.manual_seed(seed)
                try:
                    lib.global_unstructured(pairs, getattr(lib, how), scores, amount=amount)
                except ValueError:
                    failed.append(lib)
            assert len(failed) in (0, 2)
    finally:
        packed_mask.CHUNK = before
    ours_state, theirs_state = model.state_dict(), twin.state_dict()
    assert list(ours_state) == list(theirs_state)
    assert all(torch.equal(ours_state[key], theirs_state[key]) for key in ours_state)
    for (one, name), (two, _) in zip(pairs_of(model), pairs_of(twin), strict=True):
        assert torch.equal(getattr(one, name), getattr(two, name))


def pairs_of(model: nn.Module) -> Pairs:
    """Every pruned parameter, or the first where none is."""
    found = [(m, n.removesuffix("_mask")) for m in model for n, _ in m.named_buffers() if n.endswith("_mask")]
    return found or [(model[0], "weight")]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.floats(0, 1))
def test_ties_take_the_lowest_index_of_the_first_weight(seed: int, amount: float) -> None:
    model = net(seed)
    pairs = places(model, [True] * 9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    flat = torch.cat([getattr(*pair).detach().abs().flatten() for pair in pairs])
    count = round(amount * len(flat))
    ours.global_unstructured(pairs, ours.L1Unstructured, amount=amount)
    expected = torch.ones(len(flat))
    expected[flat.sort(stable=True).indices[:count]] = 0
    assert torch.equal(torch.cat([getattr(m, f"{n}_mask").flatten() for m, n in pairs]), expected)


def test_any_iterable_of_pairs() -> None:
    """torch walks over it four times, and a generator is empty the second time."""
    found = []
    for kind in (tuple, iter, lambda pairs: (pair for pair in pairs), lambda pairs: map(list, pairs)):
        model = net(0)
        ours.global_unstructured(kind(places(model, [True] * 9)), ours.L1Unstructured, amount=0.5)
        found.append(model.state_dict())
    for state in found[1:]:
        assert all(torch.equal(state[key], found[0][key]) for key in state)


@pytest.mark.parametrize("method", ["L1Unstructured", "RandomUnstructured"])
def test_mixed_dtypes(method: str) -> None:
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64]
    dtypes = dtypes if method == "L1Unstructured" else dtypes[:4]
    values = (torch.randperm(60) + 1).view(len(dtypes), 1, -1).float() / 64
    values[dtypes.index(torch.float8_e4m3fn) if method == "L1Unstructured" else 0] = 1 / 1024
    layers = []
    for dtype, value in zip(dtypes, values, strict=True):
        layer = nn.Linear(value.shape[1], 1, bias=False)
        layer.weight = nn.Parameter(value.to(dtype), requires_grad=dtype.itemsize > 1)
        layers.append(layer)
    exact = torch.cat([layer.weight.detach().to(torch.complex128).abs().flatten() for layer in layers])
    ours.global_unstructured([(layer, "weight") for layer in layers], getattr(ours, method), amount=25)
    mask = torch.cat([(layer.weight_mask.to(torch.complex64).real).flatten() for layer in layers])
    assert (mask == 0).sum() == 25
    if method == "L1Unstructured":
        expected = torch.ones(60)
        expected[exact.sort(stable=True).indices[:25]] = 0
        assert torch.equal(mask, expected)
    for layer, dtype in zip(layers, dtypes, strict=True):
        assert layer.weight_mask.dtype == dtype == layer.weight.dtype


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def test_a_tied_weight_counts_once() -> None:
    model = Tied()
    pool = [(model.a, "weight"), (model.c, "weight"), (model.b, "weight")]
    for round_, left in enumerate((16, 8)):
        ours.global_unstructured(pool, ours.L1Unstructured, amount=0.5)
        assert model.a.weight_mask.sum() + model.c.weight_mask.sum() == left
        assert torch.equal(model.a.weight_mask, model.b.weight_mask) and model.a.weight_orig is model.b.weight_orig
        assert round_ == 0 or all(len(h) == 2 for m in model.children() for h in m._forward_pre_hooks.values())
    expected = nn.Linear(8, 4)
    expected.weight = nn.Parameter(torch.cat([model.a.weight_orig, model.c.weight_orig]).detach())
    for _ in range(2):
        theirs.l1_unstructured(expected, "weight", 0.5)
    assert torch.equal(torch.cat([model.a.weight_mask, model.c.weight_mask]), expected.weight_mask)


def test_scores_of_tied_weights() -> None:
    scores = torch.arange(16.0).view(4, 4)
    for given_for in (["a"], ["b"], ["a", "b"]):
        model = Tied()
        pool = [(model.a, "weight"), (model.b, "weight")]
        ranked = {(getattr(model, name), "weight"): scores.clone() for name in given_for}
        ours.global_unstructured(pool, ours.L1Unstructured, ranked, amount=5)
        assert torch.equal(model.b.weight_mask, (scores >= 5).float())
    model = Tied()
    ranked = {(model.a, "weight"): scores, (model.b, "weight"): -scores.flip(0)}
    with pytest.raises(ValueError, match="different importance scores"):
        ours.global_unstructured([(model.a, "weight"), (model.b, "weight")], ours.L1Unstructured, ranked, amount=5)
    assert not ours.is_pruned(model)


def test_soft_masks_stay_and_are_not_ranked() -> None:
    model = nn.Linear(4, 2)
    soft = torch.tensor([[0.5, 1, 1, 0], [1, 0.25, 1, 1]])
    ours.custom_from_mask(model, "weight", soft)
    ours.global_unstructured([(model, "weight")], ours.L1Unstructured, amount=3)
    gone = (model.weight_mask == 0) & (soft == 1)
    assert gone.sum() == 3 and torch.equal(model.weight_mask[~gone], soft[~gone])


@pytest.mark.parametrize("rounds", [1, 3])
def test_hooks_hold_bits(rounds: int) -> None:
    """As torch's, the hooks are CustomFromMask in a container; their masks are tensors for who asks."""
    model = nn.Linear(64, 64)
    for _ in range(rounds):
        ours.global_unstructured([(model, "weight")], ours.L1Unstructured, amount=0.2)
    (hook,) = model._forward_pre_hooks.values()
    methods = list(hook) if rounds > 1 else [hook]
    product = torch.ones(64, 64)
    for method in methods:
        assert isinstance(method, theirs.CustomFromMask) and not any(
            isinstance(v, Tensor) for v in vars(method).values()
        )
        product *= method.mask
    assert len(methods) == rounds and torch.equal(product, model.weight_mask)
    assert sum(m._mask.bits.numel() for m in methods) == rounds * 64 * 64 // 8  # pyright: ignore


def test_counts_beyond_31_bits() -> None:
    """Three thousand million elements of magnitude 1 and ten of 2, as counts alone: nobody has to hold them."""

    class Many(Shard):
        def count(self, bracket: Bracket) -> Tensor:
            total = torch.zeros(1 << bracket.width, dtype=torch.int64)
            for value, times in ((1.0, 3 * 10**9), (2.0, 10)):
                key = int(keys(torch.tensor([value]), torch.float32))
                if bracket.left == 31 or key >> bracket.left == bracket.prefix:
                    total[(key >> (bracket.left - bracket.width)) & ((1 << bracket.width) - 1)] += times
            return total

    found = threshold([Many((torch.ones(1),), (None,))], 3 * 10**9 + 4)
    assert found.key == int(keys(torch.tensor([2.0]), torch.float32)) and found.ties == (4,)
    found = threshold([Many((torch.ones(1),), (None,))], 2**31 + 8)
    assert found.key == int(keys(torch.tensor([1.0]), torch.float32)) and found.ties == (2**31 + 8,)
