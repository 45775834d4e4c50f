"""Scores of units: each against its formula, over the slices of all members of a group."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.errors import InputError, PlanError
from fxprune.plan.patterns import Channels
from fxprune.plan.plan import Plan, Rule
from fxprune.plan.scores import Scores
from fxprune.select.score import magnitude
from fxprune.select.unit_score import UNIT_SCORES, Slices, has_scales, score_units

NORMS = [0.1, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf]
REDUCTIONS = ["sum", "mean", "max"]
SIZE = 6


def members(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Slices]:
    """Members of a group of six: by rows, by columns with two indices elsewhere, and two slices for each index."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.005).to(dtype)

    index = torch.arange(SIZE)
    elsewhere = torch.cat([index, index.new_full((2,), -1)])
    return [
        Slices("rows", drawn(6, 20), 0, index),
        Slices("columns", drawn(3, 8), 1, elsewhere),
        Slices("pairs", drawn(12, 2, 3), 0, index.repeat_interleave(2)),
        Slices("turned", drawn(2, 12), 1, index.repeat(2)),
        Slices("gamma", drawn(6), 0, index, True),
        Slices("other gamma", drawn(8), 0, elsewhere, True),
    ]


def parts(member: Slices, values: Tensor | None = None) -> list[Tensor]:
    """Every unit's elements, as one vector each."""
    rows = (member.tensor if values is None else values).movedim(member.dim, 0).double()
    return [rows[member.index == i].flatten() for i in range(SIZE)]


def reduced(of_members: list[Tensor], reduce: str) -> Tensor:
    stacked = torch.stack(of_members)
    return {"sum": stacked.sum(0), "mean": stacked.mean(0), "max": stacked.amax(0)}[reduce]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_all_slices(norm: float, reduce: str) -> None:
    norms = [torch.stack([torch.linalg.vector_norm(part, norm) for part in parts(m)]) for m in members()]
    torch.testing.assert_close(score_units(members(), Channels(0.5, norm=norm, reduce=reduce)), reduced(norms, reduce))


@pytest.mark.parametrize("scale", [1e-30, 0.005, 1.0, 1e30])
@pytest.mark.parametrize("norm", [300, 1e6])
def test_large_norms_rank_as_the_largest_magnitude_does(norm: float, scale: float) -> None:
    scaled = [Slices(m.name, m.tensor.double() * scale, m.dim, m.index) for m in members()]
    found = score_units(scaled, Channels(0.5, norm=norm))
    limit = score_units(scaled, Channels(0.5, norm=math.inf))
    torch.testing.assert_close(found, limit, rtol=0.02, atol=0)
    assert torch.equal(found.argsort(), limit.argsort())


ZEROS = torch.tensor([[0.0, 0.0], [1e-3, 2e-3]])


@pytest.mark.parametrize("norm", [1, 2, 300, math.inf])
def test_slices_of_zeros_have_no_norm(norm: float) -> None:
    found = score_units([Slices("w", ZEROS, 0, torch.arange(2))], Channels(0.5, norm=norm))
    assert found[0] == 0 and found[1] > 0


@pytest.mark.parametrize("score", ["norm", "bn_scale", "fpgm", "lamp", torch.abs, Scores({"w": torch.ones(2, 0)})])
def test_slices_without_elements_score_zero(score: Any) -> None:
    empty = Slices("w", ZEROS[:, :0], 0, torch.arange(2))
    assert score_units([empty], Channels(0.5, score=score)).tolist() == [0, 0]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_bn_scale_is_gammas_magnitude(reduce: str) -> None:
    found = score_units(members(), Channels(0.5, reduce=reduce, score="bn_scale"))
    gammas = [m.tensor[:SIZE].double().abs() for m in members() if m.scales]
    assert len(gammas) == 2 and has_scales(members())
    torch.testing.assert_close(found, reduced(gammas, reduce))


@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_without_a_batch_norm_the_norm_stands_in(norm: float) -> None:
    plain = members()[:4]
    assert not has_scales(plain)
    found = score_units(plain, Channels(0.5, norm=norm, score="bn_scale"))
    assert torch.equal(found, score_units(plain, Channels(0.5, norm=norm)))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_fpgm_is_the_sum_of_distances(reduce: str, scale: float) -> None:
    used = [Slices(m.name, m.tensor.double() * scale, m.dim, m.index) for m in members()]
    distances = []
    for member in used:
        vectors = parts(member)
        distances.append(torch.stack([sum((a - b).square().sum().sqrt() for b in vectors) for a in vectors]))
    found = score_units(used, Channels(0.5, reduce=reduce, score="fpgm"))
    torch.testing.assert_close(found, reduced(distances, reduce), rtol=1e-7, atol=0)


@settings(deadline=None, max_examples=20)
@given(copies=st.integers(2, 5), size=st.integers(30, 70), seed=st.integers(0, 99))
def test_fpgm_ranks_equal_filters_alike(copies: int, size: int, seed: int) -> None:
    """Above 25 filters torch takes distances by matrix product, which is not exact."""
    draw = torch.Generator().manual_seed(seed)
    filters = torch.randn(size, 9, generator=draw).double() + 1e6
    filters[-copies:] = filters[0]
    found = score_units([Slices("w", filters, 0, torch.arange(size))], Channels(0.5, score="fpgm"))
    exact = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=0)
    assert torch.equal(found[-copies:], found[:1].expand(copies))


def test_fpgm_takes_the_most_replaceable_filter_first() -> None:
    filters = torch.tensor([[0.0, 9.0], [9.0, 0.0], [-9.0, 0.0], [0.1, 0.0], [0.0, -9.0]])
    found = score_units([Slices("w", filters, 0, torch.arange(5))], Channels(0.5, score="fpgm"))
    assert int(found.argmin()) == 3
    same = score_units([Slices("w", torch.ones(5, 2), 0, torch.arange(5))], Channels(0.5, score="fpgm"))
    assert same.tolist() == [0] * 5


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("scale", [0.0, 1e-200, 1.0, 1e200])
def test_lamp_of_squared_norms(reduce: str, scale: float) -> None:
    norms = [torch.stack([part.square().sum() for part in parts(m)]) for m in members()]
    squares = reduced(norms, reduce).tolist()
    wanted = [s / sum(t for t in squares if t >= s) if scale else 0.0 for s in squares]
    used = [Slices(m.name, m.tensor.double() * scale, m.dim, m.index) for m in members()]
    found = score_units(used, Channels(0.5, reduce=reduce, score="lamp"))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=0)


def test_lamp_of_equal_units_goes_by_index() -> None:
    found = score_units([Slices("w", torch.ones(4, 3), 0, torch.arange(4))], Channels(0.5, score="lamp"))
    torch.testing.assert_close(found, torch.tensor([1 / 4, 1 / 3, 1 / 2, 1.0], dtype=torch.float64))


def test_random_units_follow_the_seed() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(SIZE, dtype=torch.float64)
    torch.manual_seed(5)
    assert torch.equal(score_units(members(), Channels(0.5, score="random")), wanted)
    assert not torch.equal(score_units(members(), Channels(0.5, score="random")), wanted)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_functions_scores_add_up(reduce: str) -> None:
    sums = [torch.stack([part.square().sum() for part in parts(m)]) for m in members()]
    found = score_units(members(), Channels(0.5, reduce=reduce, score=lambda w: w.double().square()))
    torch.testing.assert_close(found, reduced(sums, reduce))


def test_a_function_answers_for_every_member() -> None:
    with pytest.raises(InputError, match=r'"columns" \[3, 8\].*negative'):
        score_units(members(), Channels(0.5, score=lambda w: w.abs() - float(w.shape == (3, 8))))


def given_scores(signed: bool) -> Scores:
    values = {m.name: torch.randn(m.tensor.shape, generator=torch.Generator().manual_seed(7)) for m in members()}
    return Scores(values if signed else {name: v.abs() for name, v in values.items()}, signed=signed, method="mine")


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("signed", [True, False])
def test_given_scores_add_up_and_then_lose_their_sign(reduce: str, signed: bool) -> None:
    scores = given_scores(signed)
    sums = [torch.stack([part.sum() for part in parts(m, scores[m.name])]) for m in members()]
    wanted = reduced([s.abs() for s in sums], "max") if reduce == "max" else reduced(sums, reduce).abs()
    found = score_units(members(), Channels(0.5, reduce=reduce, score=scores))
    torch.testing.assert_close(found, wanted)
    if signed:
        assert bool((torch.stack(sums) < 0).any())


def test_members_that_given_scores_lack_do_not_count() -> None:
    scores = given_scores(False)
    fewer = Scores({name: scores[name] for name in ("rows", "gamma")})
    found = score_units(members(), Channels(0.5, score=fewer))
    assert torch.equal(found, score_units([members()[0], members()[4]], Channels(0.5, score=scores)))
    with pytest.raises(InputError, match=r'"rows".*none of this name'):
        score_units(members(), Channels(0.5, score=Scores({})))
    with pytest.raises(InputError, match=r'"gamma" \[6\].*shape \[5\]'):
        score_units(members(), Channels(0.5, score=Scores({"gamma": torch.ones(5)})))


@pytest.mark.parametrize("score", [*UNIT_SCORES, magnitude, given_scores(True)])
def test_scores_are_finite_float64_on_the_cpu(score: Any) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        found = score_units(members(dtype=dtype), Channels(0.5, score=score))
        assert found.dtype == torch.float64 and found.shape == (SIZE,) and found.device.type == "cpu"
        assert bool((found >= 0).all()) and bool(found.isfinite().all())


def test_every_named_score_states_its_source() -> None:
    assert list(UNIT_SCORES) == ["norm", "random", "bn_scale", "fpgm", "lamp"]
    assert all("Source:" in (score.__doc__ or "") for score in UNIT_SCORES.values())


def refused(make: Any, *words: str) -> None:
    with pytest.raises(PlanError) as error:
        make()
    assert error.value.what and error.value.where and error.value.why and error.value.do
    for word in words:
        assert word in str(error.value), str(error.value)


def test_bad_scores_of_channels() -> None:
    anything: Any = None
    refused(lambda: Channels(0.5, score="l2"), '"l2"', "Channels(score=...)", "norm, random, bn_scale, fpgm, lamp")
    refused(lambda: Channels(0.5, score=anything), "NoneType", "Scores")
    anything = {"w": torch.ones(2)}
    refused(lambda: Channels(0.5, score=anything), "dict", "Scores")
    refused(lambda: Channels(0.5, norm=1, score="fpgm"), "norm 1", "fpgm")
    refused(lambda: Channels(0.5, norm=1, score=given_scores(True)), "mine")
    assert Channels(0.5, norm=1, score="bn_scale").norm == 1


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        (Channels(0.5, score="fpgm"), "50% of channels by fpgm"),
        (Channels(2, score="bn_scale", norm=1, reduce="max"), "2 channels by bn_scale, norm 1.0, reduce max"),
        (Channels(0.5, score=magnitude, align=1), "50% of channels by magnitude, align 1"),
        (Channels(0.5, score=given_scores(True)), "50% of channels by mine"),
    ],
)
def test_scores_in_words(channels: Channels, words: str) -> None:
    assert channels.describe() == words
    assert words in str(Plan([Rule("*", channels)]))


def test_plans_save_names_only() -> None:
    plan = Plan([Rule("a", Channels(0.5, norm=1, score="bn_scale")), Rule("b", Channels(0.5, score="random"))])
    assert Plan.from_json(plan.to_json()) == plan
    old = plan.to_json().replace(',\n    "score": "bn_scale"', "").replace(',\n    "score": "random"', "")
    rules = [Rule("a", Channels(0.5, norm=1)), Rule("b", Channels(0.5))]
    assert "score" not in old and Plan.from_json(old) == Plan(rules)
    refused(lambda: Plan([Rule("a", Channels(0.5, score=magnitude))]).to_json(), '"a"', "a function", "bn_scale")
    refused(lambda: Plan([Rule("a", Channels(0.5, score=given_scores(True)))]).to_json(), '"a"', "Scores", "fpgm")
    refused(lambda: Plan.from_json(plan.to_json().replace("random", "rnadom")), '"rnadom"')


def test_rules_with_scores_are_values() -> None:
    scores, function = given_scores(True), magnitude
    assert Channels(0.5, score=scores) == Channels(0.5, score=scores) != Channels(0.5, score=given_scores(True))
    assert Channels(0.5, score=function) == Channels(0.5, score=function) != Channels(0.5)
    assert hash(Plan([Rule("*", Channels(0.5, score=scores))])) == hash(Plan([Rule("*", Channels(0.5, score=scores))]))
