"""project: the highest scores that a pattern lets stay, against oracles that sort lists of Python numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.errors import InputError, PlanError
from fxprune.plan.patterns import Blocks, SemiStructured, Unstructured
from fxprune.select import project as module
from fxprune.select.project import keep_highest, project, score_tiles
from tests.select.pattern_case import refused

INF = math.inf
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Few values, so that ties are everywhere, and elements that are masked already.
values = st.sampled_from([-INF, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])


def lowest(numbers: list[float], count: int) -> list[bool]:
    """The definition: put them in order by (number, index); the first `count` leave."""
    keep = [True] * len(numbers)
    for index in sorted(range(len(numbers)), key=lambda i: (numbers[i], i))[:count]:
        keep[index] = False
    return keep


@st.composite
def scores(draw: st.DrawFn, row: int = 1, column: int = 1) -> Tensor:
    """[g, r, n] whose r is a multiple of `row`, and n of `column`; any may be 0."""
    shape = [draw(st.integers(0, 2)), row * draw(st.integers(0, 4)), column * draw(st.integers(0, 5))]
    size = math.prod(shape)
    numbers = draw(st.lists(values, min_size=size, max_size=size))
    return torch.tensor(numbers, dtype=draw(st.sampled_from(FLOATS))).reshape(shape)


def same(found: Tensor, shape: Iterable[int], wanted: list[bool]) -> None:
    assert found.dtype is torch.bool and list(found.shape) == list(shape)
    assert found.flatten().tolist() == wanted


@settings(deadline=None, max_examples=150)
@given(given=scores(), share=st.floats(0, 1))
def test_unstructured(given: Tensor, share: float) -> None:
    count = round(share * given.numel())
    wanted = lowest(given.flatten().tolist(), count)
    same(project(given, Unstructured(share)), given.shape, wanted)
    same(project(given, Unstructured(count)), given.shape, wanted)
    same(project(given, Unstructured(0.5), count), given.shape, wanted)


@settings(deadline=None, max_examples=150)
@given(given=scores(), share=st.floats(0, 1))
def test_every_row_alike(given: Tensor, share: float) -> None:
    rows = given.flatten(0, 1).tolist()
    count = round(share * given.numel())
    wanted: list[bool] = []
    for index, row in enumerate(rows):
        wanted += lowest(row, count // len(rows) + (index < count % len(rows)))
    assert wanted.count(False) == count
    same(project(given, Unstructured(share, per_row=True)), given.shape, wanted)
    same(project(given, Unstructured(0.5, per_row=True), count), given.shape, wanted)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), m=st.integers(2, 16))
def test_n_of_every_m(data: st.DataObject, m: int) -> None:
    n = data.draw(st.integers(1, m - 1))
    given = data.draw(scores(column=m))
    numbers = given.flatten().tolist()
    wanted: list[bool] = []
    for start in range(0, len(numbers), m):
        wanted += lowest(numbers[start : start + m], m - n)
    same(project(given, SemiStructured(n, m)), given.shape, wanted)


def lp(numbers: list[float], p: float) -> float:
    alive = [number for number in numbers if number > -INF]
    if not alive:
        return -INF
    return max(alive) if p == INF else sum(number**p for number in alive) ** (1 / p)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), rows=st.integers(1, 3), columns=st.integers(1, 3), share=st.floats(0, 1))
@pytest.mark.parametrize("p", [1.0, INF])  # exact on these numbers, so that ties are ties
def test_tiles(data: st.DataObject, rows: int, columns: int, share: float, p: float) -> None:
    given = data.draw(scores(rows, columns))
    groups, outputs, inputs = given.shape
    corners = [
        (g, top, left) for g in range(groups) for top in range(0, outputs, rows) for left in range(0, inputs, columns)
    ]
    tiles = [given[g, top : top + rows, left : left + columns] for g, top, left in corners]
    count = round(share * len(tiles))
    wanted = torch.ones(given.shape, dtype=torch.bool)
    stays = lowest([lp(tile.flatten().tolist(), p) for tile in tiles], count)
    for (g, top, left), stay in zip(corners, stays, strict=True):
        wanted[g, top : top + rows, left : left + columns] = stay
    for how, override in ((Blocks(share, (rows, columns), p), None), (Blocks(1.0, (rows, columns), p), count)):
        same(project(given, how, override), given.shape, wanted.flatten().tolist())


@pytest.mark.parametrize("p", [0.5, 1, 2, 3, 40, INF])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_of_tiles(p: float, scale: float) -> None:
    given = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(0)) * scale
    given[0, :3, :4] = 0
    given[1, 0, :3] = -INF
    given[1, 3:, 4:] = -INF
    found = score_tiles(given, Blocks(0.5, (3, 4), p))
    assert found.shape == (2, 2, 2) and found[0, 0, 0] == 0 and found[1, 1, 1] == -INF
    for g, top, left in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0)]:
        tile = given[g, 3 * top : 3 * top + 3, 4 * left : 4 * left + 4].double().flatten() / scale
        # the rounding of 12 terms, their powers and the root
        assert float(found[g, top, left]) / scale == pytest.approx(lp(tile.tolist(), p), rel=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_are_at_least_single(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    ones = torch.ones(1, 32, 32, dtype=dtype)
    assert score_tiles(ones, Blocks(0.5)).dtype is wide
    # the squares of half precision end at 65504; two roots round
    assert score_tiles(ones * 256, Blocks(0.5)).item() == pytest.approx(256 * 32, rel=4 * torch.finfo(wide).eps)


def pieces(rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    """Large scores in which thresholds are easy, lie in or beside masses of ties, or differ from column to column."""
    noise = torch.rand(1, rows, columns, generator=torch.Generator().manual_seed(seed))
    other = torch.rand(1, rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    return {
        "distinct": noise,
        "columns": noise * torch.rand(columns, generator=torch.Generator().manual_seed(2)).pow(4),
        "half masked": noise.masked_fill(other < 0.5, -INF),
        "most zero": noise * (other < 0.2),
        "two masses": noise.masked_fill(other < 0.4, 0.0).masked_fill(other > 0.6, 0.5),
        "all alike": torch.zeros(1, rows, columns),
        "coarse": (noise * 7).floor(),
        "to infinity": noise.masked_fill(other < 0.3, INF),
        "rising": torch.arange(rows * columns, dtype=torch.float32).view(1, rows, columns),
        "falling": -torch.arange(rows * columns, dtype=torch.float32).view(1, rows, columns),
    }


@pytest.mark.parametrize("kind", pieces(1, 1, 0))
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (61, 67)])
def test_large_scores_are_sampled_and_exact(
    kind: str, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LARGE", 1)
    monkeypatch.setattr(module, "_SAMPLE", 256)
    monkeypatch.setattr(module, "_PIECE", 1000)
    given = pieces(rows, columns, 5)[kind]
    order = given.flatten().argsort(stable=True)
    size = given.numel()
    for leave in [0, 1, 2, size // 5, size // 2, int(0.8 * size), size - 1, size]:
        wanted = torch.ones(size, dtype=torch.bool)
        wanted[order[:leave]] = False
        assert torch.equal(keep_highest(given, leave).flatten(), wanted), leave


@pytest.mark.parametrize("columns", [64, 96, 1])
def test_a_sample_has_something_of_every_column(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where columns differ by orders of magnitude, hardly anything is left between the bounds to be ranked."""
    monkeypatch.setattr(module, "_LARGE", 1)
    monkeypatch.setattr(module, "_SAMPLE", 512)
    ranked = []
    settle = module._settle
    monkeypatch.setattr(module, "_settle", lambda flat, leave: ranked.append(len(flat)) or settle(flat, leave))
    given = torch.rand(64 * 96 // columns * 8, columns, generator=torch.Generator().manual_seed(0))
    given *= torch.logspace(0, 6, columns)
    for leave in (given.numel() // 5, given.numel() // 2, given.numel() * 4 // 5):
        assert int((~keep_highest(given, leave)).sum()) == leave
    assert len(ranked) == 3 and max(ranked) < given.numel() / 3


def test_a_sample_that_misleads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sample looks at is far from what it does not, so neither bound holds, and the answer is still exact."""
    monkeypatch.setattr(module, "_LARGE", 1)
    monkeypatch.setattr(module, "_SAMPLE", 16)
    size, step = 16 * 17, 17
    for sampled, rest in ((0.0, 1.0), (1.0, 0.0)):
        given = torch.rand(size, generator=torch.Generator().manual_seed(0)) + rest
        given[::step] += 10 * (sampled - rest)
        for leave in (8, 40, size // 2, size - 40):
            wanted = torch.ones(size, dtype=torch.bool)
            wanted[given.argsort(stable=True)[:leave]] = False
            assert torch.equal(keep_highest(given, leave), wanted)


def test_groups_of_a_large_matrix() -> None:
    given = torch.rand(1, 700, 768, generator=torch.Generator().manual_seed(0))
    assert given.numel() > module._PIECE
    given[0, 3] = 0.0
    lower = given.view(-1, 4).argsort(stable=True)[:, :2]
    wanted = torch.ones(given.numel() // 4, 4, dtype=torch.bool).scatter_(1, lower, False)
    assert torch.equal(project(given, SemiStructured()), wanted.view(given.shape))


def test_strided_scores() -> None:
    given = torch.rand(1, 8, 12, generator=torch.Generator().manual_seed(0)).mT
    for how in (Unstructured(0.3), Unstructured(0.3, per_row=True), SemiStructured(), Blocks(0.5, (3, 2))):
        assert torch.equal(project(given, how), project(given.contiguous(), how))


ALL = [Unstructured(0.5), Unstructured(0.5, per_row=True), SemiStructured(), Blocks(0.5, (2, 2))]


@pytest.mark.parametrize("how", ALL)
def test_nan_is_refused(how: Unstructured | SemiStructured | Blocks) -> None:
    given = torch.ones(1, 4, 8)
    given[0, 2, 3] = math.nan
    refused(InputError, lambda: project(given, how), "NaN", "1 of 32")


def test_what_cannot_be_met() -> None:
    given = torch.ones(1, 4, 6)
    refused(PlanError, lambda: project(given, SemiStructured(2, 4)), "groups of 4", "[1, 4, 6]")
    refused(PlanError, lambda: project(given, Blocks(0.5, (3, 2))), "3x2 tiles")
    refused(PlanError, lambda: project(given, Blocks(0.5, (2, 4))), "2x4 tiles")
    for per_row in (False, True):
        refused(PlanError, lambda row=per_row: project(given, Unstructured(25, per_row=row)), "25", "24 scores")
        refused(PlanError, lambda row=per_row: project(given, Unstructured(1, per_row=row), -1), "-1", "negative")
    refused(PlanError, lambda: project(given, Blocks(5, (2, 3))), "5", "4 scores")
    empty = torch.ones(1, 0, 6)
    refused(PlanError, lambda: project(empty, Unstructured(1, per_row=True)), "0 scores")
    with pytest.raises(ValueError, match="takes no count"):
        project(torch.ones(1, 2, 4), SemiStructured(), 4)
    with pytest.raises(ValueError, match=r"\[g, r, n\]"):
        project(torch.ones(2, 4), SemiStructured())


@pytest.mark.parametrize("how", ALL)
def test_scores_are_only_read(how: Unstructured | SemiStructured | Blocks) -> None:
    given = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).abs().requires_grad_()
    before = given.detach().clone()
    assert not project(given, how).requires_grad
    assert torch.equal(given.detach(), before)
