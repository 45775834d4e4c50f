"""Scores, packed masks, and what is refused before anything is ranked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from fxprune.errors import InputError
from fxprune.plan.patterns import Unstructured
from fxprune.plan.plan import Candidate, Plan, Rule
from fxprune.plan.scores import Scores, score_name
from fxprune.select import mask as mask_module
from fxprune.select.elements import select
from fxprune.select.mask import PackedMask, chunks
from fxprune.select.score import PIECEWISE, SCORES, check_weight, lamp, magnitude, scores
from fxprune.select.selection import Selection

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
    assert list(SCORES) == ["l1", "l2", "random", "lamp"]
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


def lamp_as_written(weight: Tensor) -> Tensor:
    """Element by element: the square over the sum of its own and of all that come after it in ascending order."""
    flat = weight.double().flatten().tolist()
    ranked = sorted(range(len(flat)), key=lambda i: (abs(flat[i]), i))
    found = torch.zeros(len(flat), dtype=torch.float64)
    for place, i in enumerate(ranked):
        rest = sum(flat[j] ** 2 for j in ranked[place:])
        found[i] = flat[i] ** 2 / rest if rest else 0.0
    return found.view(weight.shape)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 6), max_size=3),
    levels=st.sampled_from([0, 1, 3, 1000]),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_lamp_is_its_formula(shape: list[int], levels: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = (torch.randint(-levels, levels + 1, shape, generator=draw) * scale).to(dtype)
    found = lamp(weight)
    assert found.dtype == torch.float64 and found.shape == weight.shape
    torch.testing.assert_close(found, lamp_as_written(weight), rtol=1e-12, atol=0)


def test_lamp_neither_underflows_nor_overflows() -> None:
    ladder = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    for scale in (1e-300, 1e300):
        torch.testing.assert_close(lamp(ladder * scale), lamp(ladder), rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=40)
@given(levels=st.integers(1, 5), size=st.integers(1, 60), seed=st.integers(0, 9))
def test_lamp_orders_one_weight_by_magnitude_then_index(levels: int, size: int, seed: int) -> None:
    weight = torch.randint(-levels, levels + 1, (size,), generator=torch.Generator().manual_seed(seed)).double()
    assert torch.equal(lamp(weight).argsort(stable=True), weight.abs().argsort(stable=True))


def choose(weights: dict[str, Tensor], how: Unstructured, scope: str = "local") -> Selection:
    plan = Plan([Rule("*", how, scope)])
    return select(
        weights, {}, plan, plan.bind({n: Candidate(tuple(w.shape), w.dtype, True) for n, w in weights.items()})
    )


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_l2_is_the_order_of_l1() -> None:
    weights = {"a": drawn(9, 7) * 1e-4, "b": drawn(5, 5, seed=1).half() * 1e-4}
    for scope in ("local", "global"):
        one, two = (choose(weights, Unstructured(0.6, score), scope) for score in ("l1", "l2"))
        assert all(torch.equal(one.mask[name].bits, two.mask[name].bits) for name in weights)


def test_lamp_pools_weights_of_unlike_scale() -> None:
    weights = {"large": drawn(20, 20) * 100, "small": drawn(10, 10, seed=1)}
    found = choose(weights, Unstructured(0.5, "lamp"), "global")
    pooled = torch.cat([lamp_as_written(weight).flatten() for weight in weights.values()])
    keep = torch.ones(500, dtype=torch.bool)
    keep[pooled.argsort(stable=True)[:250]] = False
    assert torch.equal(torch.cat([mask.unpack().flatten() for mask in found.mask.values()]), keep)
    assert choose(weights, Unstructured(0.2, "l1"), "global").reached("small") > 0.9
    assert found.reached("small") < 0.6


def test_random_follows_the_seed_and_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_module, "CHUNK", 16)
    weights = {"a": drawn(12, 10), "b": drawn(9, 20, seed=1)}
    for scope in ("local", "global"):
        torch.manual_seed(3)
        scored = [torch.rand(w.shape) for w in weights.values()]
        after = torch.rand(1)
        torch.manual_seed(3)
        found = choose(weights, Unstructured(0.7, "random"), scope)
        assert torch.equal(torch.rand(1), after)
        pools = [torch.cat([s.flatten() for s in scored])] if scope == "global" else [s.flatten() for s in scored]
        wanted = []
        for pool in pools:
            keep = torch.ones(len(pool), dtype=torch.bool)
            keep[pool.argsort(stable=True)[: round(0.7 * len(pool))]] = False
            wanted.append(keep)
        assert torch.equal(torch.cat([m.unpack().flatten() for m in found.mask.values()]), torch.cat(wanted))
    other = choose(weights, Unstructured(0.7, "random"))
    assert not torch.equal(other.mask["a"].bits, choose(weights, Unstructured(0.7, "random")).mask["a"].bits)


def test_random_does_not_hang_on_the_default_dtype() -> None:
    assert SCORES["random"](torch.ones(3, dtype=torch.float8_e5m2)).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert SCORES["random"](torch.ones(3)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", list(SCORES))
def test_only_whole_weight_scores_see_more_than_a_piece(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watched(weight: Tensor) -> Tensor:
        sizes.append(weight.numel())
        return score(weight)

    score = SCORES[name]
    monkeypatch.setitem(SCORES, name, watched)
    monkeypatch.setattr(mask_module, "CHUNK", 16)
    choose({"w": drawn(10, 10)}, Unstructured(0.5, name))
    if name in PIECEWISE:
        assert max(sizes) == 16
    else:
        assert sizes == [100]


def test_given_scores_order_elements() -> None:
    weight = drawn(6, 5)
    given = Scores({"w": drawn(6, 5, seed=1), "other": torch.ones(2)}, signed=True, method="mine")
    keep = torch.ones(30, dtype=torch.bool)
    keep[given["w"].abs().flatten().argsort(stable=True)[:12]] = False
    assert torch.equal(choose({"w": weight}, Unstructured(0.4, given)).mask["w"].unpack().flatten(), keep)
    unsigned = Scores({"w": given["w"].abs()})
    assert torch.equal(choose({"w": weight}, Unstructured(0.4, unsigned)).mask["w"].unpack().flatten(), keep)


def test_given_scores_that_do_not_fit_are_refused_before_anything_is_selected() -> None:
    called: list[Tensor] = []

    def spy(weight: Tensor) -> Tensor:
        called.append(weight)
        return weight.abs()

    weights = {"a": drawn(3, 4), "enc.b": drawn(4, 3)}
    for offered, words in (
        (Scores({"a": torch.ones(3, 4)}, method="taylor"), ['"enc.b" [4, 3]', "taylor", "none of this name"]),
        (Scores({"enc.b": torch.ones(3, 4)}), ['"enc.b" [4, 3]', "shape [3, 4]", "given scores"]),
    ):
        plan = Plan([Rule("a", Unstructured(0.5, spy)), Rule("enc.b", Unstructured(0.5, offered))])
        binding = plan.bind({n: Candidate(tuple(w.shape), w.dtype, True) for n, w in weights.items()})
        refused(lambda plan=plan, binding=binding: select(weights, {}, plan, binding), *words)
    assert not called


@pytest.mark.parametrize(
    ("value", "signed", "word"),
    [(-1.0, False, "negative"), (float("nan"), False, "NaN"), (float("inf"), True, "infinite")],
)
def test_given_scores_must_be_importances(value: float, signed: bool, word: str) -> None:
    given = torch.ones(3, 4)
    given[1, 1] = value
    how = Unstructured(0.5, Scores({"w": given}, signed=signed, method="mine"))
    refused(lambda: choose({"w": drawn(3, 4)}, how), '"w" [3, 4]', "mine", word)
    choose({"w": drawn(3, 4)}, Unstructured(0.5, Scores({"w": -torch.ones(3, 4)}, signed=True)))


def test_scores_are_a_mapping_and_a_value() -> None:
    tensors = {"a": torch.ones(2, 3), "b.c": torch.zeros(4)}
    given = Scores(tensors, method="mine")
    assert list(given) == ["a", "b.c"] and len(given) == 2 and torch.equal(given["a"], tensors["a"])
    assert "a" in given and "x" not in given and given.get("x") is None
    twin = Scores(tensors, method="mine")
    assert given == given and given != twin and hash(given) != hash(twin)
    assert (
        Rule("*", Unstructured(0.5, given)) == Rule("*", Unstructured(0.5, given)) != Rule("*", Unstructured(0.5, twin))
    )
    assert repr(given) == "Scores(mine, 2 parameters)"
    assert (score_name(given), score_name("l1"), score_name(magnitude)) == ("mine", "l1", "magnitude")


def test_scores_hold_float_tensors_by_name() -> None:
    anything: Any = [("a", torch.ones(2))]
    refused(lambda: Scores(anything), "list", "mapping")
    refused(lambda: Scores({"a": anything}), "'a'", "list")
    refused(lambda: Scores({"a": torch.ones(2, dtype=torch.int64)}), "'a'", "int64")
    anything = {3: torch.ones(2)}
    refused(lambda: Scores(anything), "3")


@pytest.mark.parametrize("signed", [True, False])
def test_scores_by_module_are_global_unstructureds(signed: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 3)))
    values = {name: drawn(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())}
    given = Scores(values if signed else {n: v.abs() for n, v in values.items()}, signed=signed)
    found = given.by_module(model)
    assert set(found) == {(m, n) for m in (model[0], model[1][0]) for n in ("weight", "bias")}
    assert bool((values["1.0.weight"] < 0).any())
    assert torch.equal(found[model[1][0], "weight"], values["1.0.weight"].abs())
    pairs = [(model[0], "weight"), (model[1][0], "weight")]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, importance_scores=found, amount=0.4)
    weights = {"0.weight": model[0].weight_orig, "1.0.weight": model[1][0].weight_orig}
    ours = choose(weights, Unstructured(0.4, given), "global")
    for (module, _), name in zip(pairs, weights, strict=True):
        assert torch.equal(ours.mask[name].unpack(), module.weight_mask != 0)
    refused(lambda: Scores({"9.weight": torch.ones(2)}).by_module(model), '"9.weight" [2]', '"9"')
