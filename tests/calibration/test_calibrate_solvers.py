"""The solvers of calibration, each held against a float64 computation that follows its definition word by word."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune import Blocks, SemiStructured, Unstructured
from fxprune.calibration.solvers import SOLVERS, cholesky, least_squares
from fxprune.calibration.solvers.admm import admm
from fxprune.calibration.solvers.least_squares import refit
from fxprune.calibration.solvers.problem import Goal, Problem, damped, shrinkage
from fxprune.calibration.solvers.sparsegpt import WIDTH, sparsegpt, sparsegpt_refit
from fxprune.calibration.solvers.units import Units, choose_units
from fxprune.calibration.solvers.wanda import wanda
from fxprune.select.project import keep_highest
from tests.calibration.calibrate_problem import MANY, correlated, excess, normal_equations, problem_of

# --- least squares -----------------------------------------------------------------------------------------------


@pytest.fixture
def directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "_iterate", lambda *_: None)


@pytest.fixture
def iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("conjugate gradients did not converge")

    monkeypatch.setattr(least_squares, "_RATE", 1e9)
    monkeypatch.setattr(least_squares, "_direct", refuse)


@pytest.mark.usefixtures("directly")
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_least_squares_directly(groups: int, share: float) -> None:
    problem = problem_of(correlated(200, 24, groups), 10)
    keep = torch.rand(groups, 10, 24) < share
    keep[:, 3] = False
    found = refit(problem, keep)
    best = normal_equations(problem, keep)
    assert not bool(found[~keep].any()) and not bool(found[:, 3].any())
    torch.testing.assert_close(found.double(), best, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("directly")
@pytest.mark.parametrize("small, chunk", [(1, 1), (10, 100), (10, 1000), (100, 1 << 23)])
def test_rows_of_many_lengths(small: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "_SMALL", small)
    monkeypatch.setattr(least_squares, "_CHUNK", chunk)
    problem = problem_of(correlated(100, 20), 21)
    order = torch.randperm(21)
    keep = (torch.arange(20) < torch.arange(21).unsqueeze(1))[order][None]  # 0 to 20 of each row, in any order
    torch.testing.assert_close(refit(problem, keep).double(), normal_equations(problem, keep), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("iterated")
@pytest.mark.parametrize("start", ["none", "masked", "far"])
def test_least_squares_by_conjugate_gradients(start: str) -> None:
    problem = problem_of(correlated(300, 40), 12)
    keep = torch.rand(1, 12, 40) < 0.5
    keep[0, 5] = False
    first = {"none": None, "masked": problem.target * keep, "far": torch.randn(1, 12, 40) * 100}[start]
    given = None if first is None else first.clone()
    found = refit(problem, keep, first)
    assert not bool(found[~keep].any())
    assert abs(excess(problem, found, normal_equations(problem, keep))) < 1e-8
    assert first is None or (given is not None and torch.equal(first, given))


def test_where_conjugate_gradients_take_too_long_the_direct_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(correlated(300, 40), 12)
    keep = torch.rand(1, 12, 40) < 0.5
    for rate in (0, 0.3):
        monkeypatch.setattr(least_squares, "_RATE", rate)
        torch.testing.assert_close(refit(problem, keep).double(), normal_equations(problem, keep), rtol=1e-5, atol=1e-5)


def test_least_squares_on_shared_columns_and_by_either_way() -> None:
    problem = problem_of(correlated(100, 16, 2), 6)
    columns = torch.rand(2, 1, 16) < 0.5
    keep = columns.expand(2, 6, 16)
    assert least_squares._shared(keep)
    torch.testing.assert_close(refit(problem, keep).double(), normal_equations(problem, keep), rtol=1e-5, atol=1e-5)
    other = keep.clone()
    other[0, 0] = ~other[0, 0]
    assert not least_squares._shared(other)
    assert abs(excess(problem, refit(problem, other), normal_equations(problem, other))) < 1e-8


def test_nothing_kept_and_nothing_to_fit() -> None:
    problem = problem_of(correlated(50, 8), 4)
    assert not bool(refit(problem, torch.zeros(1, 4, 8, dtype=torch.bool)).any())
    everything = refit(problem, torch.ones(1, 4, 8, dtype=torch.bool))
    torch.testing.assert_close(everything, problem.target, rtol=1e-4, atol=1e-4)
    empty = Problem(torch.zeros(1, 8, 8), torch.zeros(1, 0, 8), torch.zeros(1, 0, 8))
    assert refit(empty, torch.zeros(1, 0, 8, dtype=torch.bool)).shape == (1, 0, 8)


# --- SparseGPT ---------------------------------------------------------------------------------------------------


def by_the_paper(problem: Problem, leave: list[int] | None, m: int = 0, n: int = 0) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper in float64, with one matrix: `leave` elements of each block of columns, or n:m."""
    weight = problem.target[0].double().clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(problem.hessian[0].double())).mT
    keep = torch.ones(weight.shape, dtype=torch.bool)
    columns = weight.shape[1]
    width = WIDTH - WIDTH % m if m else WIDTH
    for j in range(columns):
        if m == 0 and j % width == 0:
            stop = min(j + width, columns)
            scores = weight[:, j:stop].square() / upper.diagonal()[j:stop].square()
            assert leave is not None
            keep[:, j:stop] = keep_highest(scores, leave[j // width])
        if m and j % m == 0:
            scores = weight[:, j : j + m].square() / upper.diagonal()[j : j + m].square()
            gone = scores.sort(dim=1, stable=True).indices[:, : m - n]
            keep[:, j : j + m] = torch.ones_like(scores, dtype=torch.bool).scatter(1, gone, False)
        error = (weight[:, j] * ~keep[:, j]) / upper[j, j]
        weight[:, j:] -= error.unsqueeze(1) * upper[j, j:]
    return (weight * keep)[None], keep[None]


@pytest.mark.parametrize("columns", [40, WIDTH + 32])
def test_sparsegpt_is_the_papers_loop(columns: int) -> None:
    problem = problem_of(correlated(3 * columns, columns), 8)
    count = columns * 4
    weight, keep = sparsegpt(problem, Goal(Unstructured(0.5), count))
    sizes = [8 * min(WIDTH, columns - start) for start in range(0, columns, WIDTH)]
    expected, mask = by_the_paper(problem, [size // 2 for size in sizes])
    assert torch.equal(keep, mask) and int((~keep).sum()) == count
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, m, columns", [(2, 4, WIDTH + 8), (1, 3, 2 * WIDTH - WIDTH % 3), (3, 7, 140)])
def test_sparsegpt_in_groups(n: int, m: int, columns: int) -> None:
    columns -= columns % m
    problem = problem_of(correlated(3 * columns, columns), 6)
    weight, keep = sparsegpt(problem, Goal(SemiStructured(n, m)))
    expected, mask = by_the_paper(problem, None, m, n)
    assert torch.equal(keep, mask)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-4)


def test_sparsegpt_chooses_tiles_by_what_they_lose() -> None:
    problem = problem_of(correlated(100, 16), 8)
    how = Blocks(0.5, (4, 4))
    _, keep = sparsegpt(problem, Goal(how, 4))
    inverse = torch.linalg.inv(problem.hessian[0].double()).diagonal()
    losses = (problem.target[0].double().square() / inverse).reshape(2, 4, 4, 4)
    norms = losses.square().sum((1, 3)).sqrt()
    expected = keep_highest(norms, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(keep[0], expected)


# --- all of them -------------------------------------------------------------------------------------------------

PATTERNS = {
    "whole": Goal(Unstructured(0.6), 230),
    "by row": Goal(Unstructured(0.6, per_row=True), 230),
    "2:4": Goal(SemiStructured(2, 4)),
    "1:8": Goal(SemiStructured(1, 8)),
    "3:6": Goal(SemiStructured(3, 6)),
    "tiles": Goal(Blocks(0.5, (4, 4)), 12),
}


def wanted(goal: Goal, shape: tuple[int, ...]) -> int:
    if isinstance(goal.pattern, SemiStructured):
        return torch.Size(shape).numel() * (goal.pattern.m - goal.pattern.n) // goal.pattern.m
    assert goal.count is not None
    return goal.count * (16 if isinstance(goal.pattern, Blocks) else 1)


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_pattern_gets_its_count(method: str, pattern: str, groups: int) -> None:
    goal = PATTERNS[pattern]
    problem = problem_of(correlated(60, 24, groups), 16 // groups)
    weight, keep = SOLVERS[method].solve(problem, goal)
    assert weight.shape == keep.shape == problem.target.shape and keep.dtype is torch.bool
    assert int((~keep).sum()) == wanted(goal, tuple(keep.shape))
    assert not bool(weight[~keep].any()) and bool(weight[keep].all())
    if pattern == "by row":
        each = (~keep).sum(-1).flatten()
        assert each.tolist() == [15] * 6 + [14] * 10


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_zeros_that_are_there_stay_and_count_first(method: str, pattern: str) -> None:
    goal = PATTERNS[pattern]
    alive = torch.rand(1, 16, 24) < 0.8
    alive[0, 2] = False
    alive[0, :, 7] = False
    if isinstance(goal.pattern, Blocks):
        alive = torch.ones(1, 16, 24, dtype=torch.bool)
        alive[0, :4, 4:12] = False
    problem = problem_of(correlated(60, 24), 16, alive)
    weight, keep = SOLVERS[method].solve(problem, goal)
    assert not bool((keep & ~alive).any()) and not bool(weight[~keep].any())
    gone = int((~keep).sum())
    if pattern in ("whole", "tiles"):
        assert gone == wanted(goal, tuple(keep.shape))
    elif pattern == "by row":
        quota = torch.tensor([15] * 6 + [14] * 10)
        assert torch.equal((~keep[0]).sum(-1), torch.maximum(quota, (~alive[0]).sum(-1)))
    else:
        assert isinstance(goal.pattern, SemiStructured)
        left = goal.pattern.n
        groups = alive.reshape(-1, goal.pattern.m).sum(-1)
        assert torch.equal(keep.reshape(-1, goal.pattern.m).sum(-1), groups.clamp(max=left))


@pytest.mark.parametrize("columns", [WIDTH + 50, 3 * WIDTH])
@pytest.mark.parametrize("per_row", [False, True])
def test_blocks_of_columns_share_a_count(columns: int, per_row: bool) -> None:
    alive = torch.rand(2, 5, columns) < 0.9
    alive[1, 2, :WIDTH] = False
    problem = problem_of(correlated(columns, columns, 2), 5, alive)
    count = columns * 5 + 3
    _, keep = sparsegpt(problem, Goal(Unstructured(count, per_row=per_row), count))
    if per_row:
        quota = torch.full((10,), count // 10)
        quota[: count % 10] += 1
        assert torch.equal((~keep).sum(-1).flatten(), torch.maximum(quota, (~alive).sum(-1).flatten()))
    else:
        assert int((~keep).sum()) == count
    _, keep = sparsegpt(problem, Goal(Unstructured(1, per_row=per_row), 1))
    assert torch.equal(keep, alive) or (per_row and int((alive & ~keep).sum()) <= 1)


def test_wanda_ranks_weight_times_norm_in_every_row() -> None:
    problem = problem_of(correlated(80, 12), 7)
    weight, keep = wanda(problem, Goal(Unstructured(0.5), 42))
    scores = problem.target[0].double().abs() * problem.hessian[0].diagonal().double().sqrt()
    for r in range(7):
        assert set(keep[0, r].nonzero().flatten().tolist()) == set(scores[r].topk(6).indices.tolist())
    assert torch.equal(weight, problem.target * keep)


def test_wanda_takes_the_same_share_of_what_every_row_has_left() -> None:
    alive = torch.ones(1, 4, 12, dtype=torch.bool)
    alive[0, 0] = False
    alive[0, 1, :6] = False
    problem = problem_of(correlated(80, 12), 4, alive)
    _, keep = wanda(problem, Goal(Unstructured(0.5), 33))  # 18 are zero, 15 of the other 30 leave
    assert (~keep[0]).sum(-1).tolist() == [12, 6 + 3, 6, 6]


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_admm_loses_no_more_than_magnitude_with_least_squares(share: float) -> None:
    losses: dict[str, list[float]] = {"admm": [], "refit": [], "sparsegpt": [], "wanda": []}
    for seed in range(4):
        torch.manual_seed(seed)
        problem = problem_of(correlated(200, 48), 24)
        goal = Goal(Unstructured(share), round(share * 24 * 48))
        by_magnitude = problem.loss(refit(problem, problem.keep(problem.target.abs(), goal)))
        for method in losses:
            losses[method].append(problem.loss(SOLVERS[method].solve(problem, goal)[0]))
        assert losses["admm"][-1] <= by_magnitude
        # Least squares on a mask never loses more than other values on this mask.
        assert losses["refit"][-1] <= losses["sparsegpt"][-1] + 1e-6
    mean = {method: sum(found) / len(found) for method, found in losses.items()}
    assert mean["admm"] < mean["refit"] < mean["sparsegpt"] < mean["wanda"]


# --- hard matrices -----------------------------------------------------------------------------------------------


def hard_inputs() -> dict[str, Tensor]:
    dead = correlated(60, 16)
    dead[..., [0, 5, 15]] = 0
    line = torch.randn(1, 40, 1) * torch.randn(1, 1, 16)
    return {
        "dead inputs": dead,
        "fewer rows than inputs": correlated(5, 16),
        "one row": correlated(1, 16),
        "nothing but zeros": torch.zeros(1, 30, 16),
        "rank one": line,
        "twins": torch.cat([dead[..., :8], dead[..., :8]], -1),
        "tiny": correlated(60, 16) * 1e-15,
        "large": correlated(60, 16) * 1e15,
        "very unequal": correlated(60, 16) * torch.logspace(-6, 3, 16),
    }


@pytest.mark.parametrize("kind", hard_inputs())
@pytest.mark.parametrize("method", SOLVERS)
def test_hard_matrices(kind: str, method: str) -> None:
    x = hard_inputs()[kind]
    problem = problem_of(x, 8)
    for goal in (PATTERNS["2:4"], Goal(Unstructured(0.5), 64), Goal(Blocks(0.5, (4, 4)), 4)):
        weight, keep = SOLVERS[method].solve(problem, goal)
        assert bool(weight.isfinite().all()) and int((~keep).sum()) == 64
        if method in ("refit", "admm") and isinstance(goal.pattern, Unstructured):
            assert abs(excess(problem, weight, normal_equations(problem, keep))) < 1e-6


def test_inputs_that_are_always_zero_leave_weights_as_they_are() -> None:
    x = hard_inputs()["dead inputs"]
    problem = problem_of(x, 8)
    keep = torch.rand(1, 8, 16) < 0.7
    weight = refit(problem, keep)
    assert torch.allclose(weight[..., [0, 5, 15]], (problem.target * keep)[..., [0, 5, 15]], rtol=1e-5)


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    gram = torch.diag_embed(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
    result, added = damped(gram, MANY)
    torch.testing.assert_close(added, torch.tensor([[0.02] * 3, [1.0] * 3]))
    torch.testing.assert_close(result[0].diagonal(), torch.tensor([1.02, 2.02, 3.02]))
    assert torch.equal(result[1], torch.eye(3)) and float(gram[0, 0, 0]) == 1.0


def test_few_rows_are_shrunk_to_what_many_rows_show() -> None:
    n, draws = 48, 30
    mixing = torch.randn(n, n, dtype=torch.float64) * torch.logspace(0, -1.5, n, dtype=torch.float64)
    mixing *= torch.logspace(0, -1, n, dtype=torch.float64).unsqueeze(1)
    shares: list[float] = []
    for rows in (4, 16, 64, 512, 2**15):
        x = torch.randn(draws, rows, n, dtype=torch.float64) @ mixing.T
        gram = x.mT @ x / rows
        share = shrinkage(gram, rows)[:, None, None]
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        nearer = torch.lerp(gram, diagonal.diag_embed(), share)
        off, nearer_off = ((each - mixing @ mixing.T).square().sum() for each in (gram, nearer))
        assert nearer_off < off
        hessian, added = damped(gram, rows)
        assert bool((added >= 0.01 * diagonal.mean(-1, keepdim=True)).all())
        if float((share / (1 - share)).min()) > 0.1:
            assert bool((added >= 0.1 * diagonal).all())
            torch.testing.assert_close((hessian * (1 - share))[:, :24, :24], nearer[:, :24, :24])
        shares.append(float(share.mean()))
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.5 and shares[-1] < 0.01


def test_an_input_that_hardly_varies_stays_so_however_few_the_rows() -> None:
    x = torch.randn(1, 12, 8) * torch.tensor([1.0] * 7 + [1e-3])
    hessian, added = damped(x.mT @ x, 12)
    assert float(hessian[0, 7, 7]) < 0.02 * float(hessian[0, :7, :7].diagonal().min())
    assert float(added[0, 0]) > 0.1 * float((x.mT @ x)[0, 0, 0])


@pytest.mark.parametrize(
    ("gram", "rows", "most"),
    [
        (torch.eye(6).unsqueeze(0), 6, 0.5),
        (torch.eye(6).unsqueeze(0), 600, 0.01),
        (torch.ones(1, 1, 1), 5, 0.0),
        (torch.zeros(2, 3, 3), 7, 0.0),
        (torch.ones(1, 4, 4), 1, 0.8),
    ],
)
def test_shrinkage_stays_within_what_so_many_inputs_may_ask(gram: Tensor, rows: int, most: float) -> None:
    share = shrinkage(gram, rows)
    assert share.shape == gram.shape[:1] and share.dtype is gram.dtype
    assert bool(((share >= 0) & (share <= most * (1 + 1e-6))).all())


def test_factors_where_rounding_took_definiteness_away() -> None:
    line = torch.randn(2, 12, 1)
    matrices = line @ line.mT - 1e-4 * torch.eye(12)
    assert bool(torch.linalg.cholesky_ex(matrices)[1].any())
    factors = cholesky.factor(matrices)
    assert factors.dtype is torch.float32 and bool(factors.isfinite().all())
    torch.testing.assert_close(factors @ factors.mT, matrices, rtol=0, atol=1e-2 * float(matrices.abs().max()))
    assert bool(cholesky.factor(torch.zeros(1, 3, 3)).isfinite().all())
    healthy = torch.eye(4, dtype=torch.float64) * 4
    assert torch.equal(cholesky.factor(healthy), torch.eye(4, dtype=torch.float64) * 2)
    right = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(cholesky.solve(torch.linalg.cholesky(healthy), right), right / 4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_factors_of_what_is_not_finite(value: float) -> None:
    matrix = torch.eye(3)
    matrix[1, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        cholesky.factor(matrix)


def test_solvers_leave_the_problem_alone() -> None:
    problem = problem_of(correlated(60, 24), 16, torch.rand(1, 16, 24) < 0.9)
    before = [t.clone() for t in dataclasses.astuple(problem)]
    for method in (wanda, sparsegpt, sparsegpt_refit, admm):
        first: Any = method(problem, PATTERNS["whole"])
        again = method(problem, PATTERNS["whole"])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    choose_units(problem, Units("g", torch.arange(24), 10))
    assert all(torch.equal(a, b) for a, b in zip(before, dataclasses.astuple(problem), strict=True))
