"""Rows, groups and tiles by magnitude and other scores: masks against their definitions, existing masks first."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.errors import InputError
from fxprune.plan.matrix import to_matrix
from fxprune.plan.patterns import Blocks, SemiStructured, Unstructured
from fxprune.plan.plan import Candidate, Plan, Rule, Sparsity
from fxprune.plan.scores import Scores
from fxprune.select.elements import select
from fxprune.select.mask import PackedMask
from fxprune.select.selection import Selection
from tests.select.pattern_case import random, refused

ROWS = Unstructured(0.5, per_row=True)


def choose(
    weights: Mapping[str, Tensor],
    sparsity: Sparsity,
    scope: str = "local",
    existing: Mapping[str, PackedMask | Tensor] | None = None,
    inputs: Mapping[str, int] | None = None,
) -> Selection:
    plan = Plan([Rule("*", sparsity, scope)])
    dims = inputs or {}
    known = {n: Candidate(tuple(w.shape), w.dtype, True, inputs=dims.get(n, 1)) for n, w in weights.items()}
    return select(weights, existing or {}, plan, plan.bind(known), inputs)


def kept(weight: Tensor, sparsity: Sparsity, existing: Tensor | None = None, inputs: int = 1) -> Tensor:
    """The mask of one weight as a matrix [o, n]."""
    masks = {} if existing is None else {"w": existing}
    keep = choose({"w": weight}, sparsity, "local", masks, {"w": inputs}).mask["w"].unpack()
    assert keep.shape == weight.shape
    return to_matrix(keep, inputs)


def of_rows(matrix: Tensor, counts: list[int]) -> Tensor:
    """The definition: of row r the counts[r] smallest magnitudes leave, those of lowest index first."""
    keep = torch.ones(matrix.shape, dtype=torch.bool)
    for row, count in enumerate(counts):
        keep[row, matrix[row].abs().argsort(stable=True)[:count]] = False
    return keep


@pytest.mark.parametrize("inputs", [0, 1])
@pytest.mark.parametrize("shape", [(6, 10), (7, 3), (4, 6, 3, 2), (1, 9), (5, 8, 1)])
def test_every_row_loses_the_same(shape: tuple[int, ...], inputs: int) -> None:
    weight = random(*shape)
    matrix = to_matrix(weight, inputs)
    for amount in (0.0, 0.3, 0.5, 1.0, 7, weight.numel()):
        keep = kept(weight, Unstructured(amount, per_row=True), inputs=inputs)
        count = amount if isinstance(amount, int) else round(amount * weight.numel())
        each, more = divmod(count, len(matrix))
        assert torch.equal(keep, of_rows(matrix, [each + (row < more) for row in range(len(matrix))]))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (5, 16)])
def test_n_of_m_along_the_input_channels(n: int, m: int) -> None:
    for weight, inputs in ((random(6, 32), 1), (random(32, 5), 0), (random(4, 16, 3, 3), 1), (random(16, 4, 3), 0)):
        groups = to_matrix(weight, inputs).reshape(-1, m)
        keep = kept(weight, SemiStructured(n, m), inputs=inputs).reshape(-1, m)
        assert torch.equal(keep, of_rows(groups, [m - n] * len(groups)))
    # the channels of one position of the kernel, and not neighbours in memory
    weight = random(2, 16, 3, 3)
    keep = choose({"w": weight}, SemiStructured(n, m)).mask["w"].unpack()
    assert bool((keep.view(2, 16 // m, m, 3, 3).sum(2) == n).all())


def tiles_of(weight: Tensor, r: int, c: int, inputs: int = 1) -> Tensor:
    """[tiles, r c] in flat order of the tiles."""
    matrix = to_matrix(weight, inputs)
    blocks = [tile for band in matrix.split(r) for tile in band.split(c, dim=1)]
    return torch.stack([block.flatten() for block in blocks])


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("amount", [0.0, 0.5, 0.8, 1.0, 3])
def test_whole_tiles_leave(amount: int | float, norm: float) -> None:
    for weight, inputs in ((random(8, 12), 1), (random(12, 8), 0), (random(4, 6, 3, 3), 1)):
        how = Blocks(amount, (4, 3) if inputs or weight.dim() == 2 else (2, 3), norm)
        keep = choose({"w": weight}, how, inputs={"w": inputs})
        found = tiles_of(keep.mask["w"].unpack(), *how.shape, inputs)
        norms = torch.linalg.vector_norm(tiles_of(weight, *how.shape, inputs).double(), norm, dim=1)
        wanted = torch.ones(len(norms), dtype=torch.bool)
        wanted[norms.argsort(stable=True)[: how.count(len(norms))]] = False
        assert torch.equal(found, wanted[:, None].expand_as(found))
        assert keep.asked["w"] == pytest.approx(how.count(len(norms)) / len(norms), abs=0)


def test_tiles_are_pooled_by_norm() -> None:
    weights = {"small": random(8, 8) * 0.1, "large": random(4, 8, 3, 3, seed=1).double(), "turned": random(8, 12)}
    inputs = {"turned": 0}
    found = choose(weights, Blocks(0.5, (4, 4)), "global", inputs=inputs)
    norms = {n: tiles_of(w, 4, 4, inputs.get(n, 1)).double().norm(dim=1) for n, w in weights.items()}
    flat = torch.cat(list(norms.values()))
    wanted = torch.ones(len(flat), dtype=torch.bool)
    wanted[flat.argsort(stable=True)[: round(0.5 * len(flat))]] = False
    for (name, own), stays in zip(norms.items(), wanted.split([len(n) for n in norms.values()]), strict=True):
        tiles = tiles_of(found.mask[name].unpack(), 4, 4, inputs.get(name, 1))
        assert torch.equal(tiles, stays[:, None].expand(len(own), 16))
    assert not found.mask["small"].kept() and found.asked == dict.fromkeys(weights, 14 / 28)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_ties_go_by_lowest_index(fill: float) -> None:
    weight = torch.full((4, 8), fill)
    assert torch.equal(kept(weight, ROWS), (torch.arange(8) >= 4).expand(4, 8))
    assert torch.equal(kept(weight, Unstructured(6, per_row=True))[:, :2].sum(1), torch.tensor([0, 0, 1, 1]))
    assert torch.equal(kept(weight, SemiStructured()), (torch.arange(8) % 4 >= 2).expand(4, 8))
    tiles = tiles_of(kept(weight, Blocks(0.5, (2, 2))), 2, 2)
    assert torch.equal(tiles, (torch.arange(8) >= 4)[:, None].expand(8, 4))
    pooled = choose({"a": weight, "b": weight}, Blocks(0.5, (2, 2)), "global")
    assert pooled.mask["a"].kept() == 0 and pooled.mask["b"].kept() == 32


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (0, 4, 3), (4, 8, 0)])
def test_weights_without_elements(shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    for how in (ROWS, SemiStructured(), Blocks(0.5, (4, 4))):
        found = choose({"w": weight}, how)
        assert found.mask["w"].unpack().shape == weight.shape and found.reached("w") == 0.0
    pooled = choose({"w": weight, "v": random(4, 4)}, Blocks(1.0, (4, 4)), "global")
    assert pooled.reached("v") == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_dtypes(dtype: torch.dtype) -> None:
    weight = random(8, 16).to(dtype)
    wide = weight.double()
    for how in (ROWS, SemiStructured(), Blocks(0.5, (4, 4), norm=1)):
        before = torch.zeros(8, 16, dtype=torch.bool)
        before[:, ::3] = True
        assert torch.equal(kept(weight, how), kept(wide, how))
        assert torch.equal(kept(weight, how, before), kept(wide, how, before))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
def test_existing_masks_come_first(seed: int, density: float) -> None:
    weight = random(6, 16, seed=seed)
    before = torch.rand(6, 16, generator=torch.Generator().manual_seed(seed)) < density
    alive = weight.abs().masked_fill(~before, -1.0)

    rows = kept(weight, ROWS, before)
    gone = (~before).sum(1).clamp(min=8)
    assert torch.equal(rows, before & of_rows(alive + 1, gone.tolist()))

    groups = kept(weight, SemiStructured(), before).reshape(-1, 4)
    gone = (~before).reshape(-1, 4).sum(1).clamp(min=2)
    assert torch.equal((~groups).sum(1), gone)  # no more than is needed
    assert torch.equal(groups, before.reshape(-1, 4) & of_rows(alive.reshape(-1, 4) + 1, gone.tolist()))

    tiles = tiles_of(kept(weight, Blocks(0.5, (3, 4), norm=math.inf), before), 3, 4)
    old = tiles_of(before, 3, 4)
    order = tiles_of(alive, 3, 4).amax(1).argsort(stable=True)  # a tile of nothing but masked elements has -1
    stays = torch.ones(8, dtype=torch.bool)
    stays[order[:4]] = False
    assert torch.equal(tiles, old & stays[:, None])


@pytest.mark.parametrize("how", [ROWS, SemiStructured(), Blocks(0.5, (2, 4))])
def test_existing_masks_of_turned_weights(how: Sparsity) -> None:
    weight = random(8, 8)
    before = torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    turned = kept(weight.t().contiguous(), how, before.t().contiguous(), inputs=0)
    assert torch.equal(turned, kept(weight, how, before))


def test_masked_values_count_for_nothing() -> None:
    weight = torch.ones(2, 8)
    weight[:, 0] = 100.0
    before = torch.ones(2, 8, dtype=torch.bool)
    before[:, 0] = False
    assert not kept(weight, SemiStructured(), before)[:, 0].any()
    tiles = kept(weight, Blocks(0.5, (2, 4)), before)
    assert not tiles[:, :4].any() and tiles[:, 4:].all()  # three ones against four


def test_other_scores() -> None:
    weight = random(4, 8)
    back = Scores({"w": -weight.abs() + 10.0})
    inverse = weight.abs().reciprocal()
    for score in (back, lambda w: w.abs().reciprocal()):
        assert torch.equal(kept(weight, Unstructured(0.5, score, True)), kept(inverse, ROWS))
        assert torch.equal(kept(weight, SemiStructured(score=score)), kept(inverse, SemiStructured()))
        assert torch.equal(kept(weight, Blocks(0.5, (1, 1), score=score)), kept(inverse, Blocks(0.5, (1, 1))))
    signed = Scores({"w": weight}, signed=True)
    assert torch.equal(kept(weight, SemiStructured(score=signed)), kept(weight, SemiStructured()))
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(kept(weight, SemiStructured(score="random")))
    assert torch.equal(*drawn) and not torch.equal(drawn[0], kept(weight, SemiStructured()))


def test_what_is_not_finite_or_does_not_fit() -> None:
    for how in (ROWS, SemiStructured(), Blocks(0.5, (2, 2))):
        for bad in (math.nan, math.inf):
            weight = random(4, 8)
            weight[1, 2] = bad
            refused(InputError, lambda w=weight, how=how: choose({"w": w}, how), '"w" [4, 8]', "NaN or infinity")

    def negative(weight: Tensor) -> Tensor:
        return weight.abs() - 1

    for how in (Unstructured(0.5, negative, True), SemiStructured(score=negative), Blocks(0.5, (2, 2), score=negative)):
        refused(InputError, lambda how=how: choose({"w": random(4, 8)}, how), "negative")
    missing = Scores({"other": random(4, 8)})
    refused(InputError, lambda: choose({"w": random(4, 8)}, SemiStructured(score=missing)), '"w"')
