"""Units leave one by one, each time the one that the others make up for best: held against exhaustive search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.calibration.solvers.problem import Problem
from fxprune.calibration.solvers.units import Units, choose_units
from tests.calibration.calibrate_problem import correlated, normal_equations, problem_of


def cost_without(problem: Problem, gone: Tensor) -> float:
    keep = (~gone).expand_as(problem.target)
    wide = Problem(problem.hessian.double(), problem.target.double(), problem.linear.double())
    return wide.loss(normal_equations(problem, keep))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("repeats", [1, 2])
def test_units_leave_one_by_one_each_time_the_cheapest(width: int, repeats: int) -> None:
    units, outputs = 7, 5
    index = torch.cat([torch.arange(units).repeat_interleave(width), torch.tensor([-1, -1])])
    problem = problem_of(correlated(150, repeats * len(index)), outputs)
    columns = index.repeat(repeats)
    alive = list(range(units))
    for staying in range(units - 1, 0, -1):
        costs = {
            u: cost_without(
                problem, torch.isin(columns, torch.tensor([v for v in range(units) if v not in alive] + [u]))
            )
            for u in alive
        }
        alive.remove(min(alive, key=costs.__getitem__))
        units_left = Units("g", index, staying)
        kept = choose_units(problem, units_left)
        assert kept.tolist() == alive
        assert units_left.inputs_of(kept).tolist() == [i for i, u in enumerate(index.tolist()) if u < 0 or u in alive]


def test_units_see_zeros_that_are_there() -> None:
    alive = torch.ones(1, 4, 6, dtype=torch.bool)
    alive[..., 2] = False
    problem = problem_of(torch.randn(1, 100, 6), 4, alive)
    kept = choose_units(problem, Units("g", torch.arange(6), 5))
    assert kept.tolist() == [0, 1, 3, 4, 5]


def test_many_units_leave_in_rounds() -> None:
    problem = problem_of(correlated(600, 300), 4)
    kept = choose_units(problem, Units("g", torch.arange(300), 17))
    assert len(kept) == 17 and torch.equal(kept, kept.unique())
