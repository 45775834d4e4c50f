"""What the tests of the solvers share: problems on correlated inputs, and their solution in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fxprune.calibration.solvers.problem import Problem, damped


def correlated(rows: int, columns: int, groups: int = 1) -> Tensor:
    """Inputs [g, rows, columns] that resemble each other, and differ in size."""
    mixed = torch.randn(groups, rows, columns) @ torch.randn(groups, columns, columns) / columns**0.5
    return mixed * torch.rand(groups, 1, columns).add(0.2)


# So many rows that no more than the least is added to a Gram matrix, which is hardest for the solvers.
MANY = 2**40


def problem_of(x: Tensor, rows: int, alive: Tensor | None = None) -> Problem:
    """A problem of `rows` outputs on inputs x [g, s, n]."""
    hessian = damped((x.mT @ x).double(), MANY)[0].float()
    target = torch.randn(x.shape[0], rows, x.shape[-1])
    return Problem(hessian, target, target @ hessian, alive)


def normal_equations(problem: Problem, keep: Tensor) -> Tensor:
    """The least squares on a mask in float64, one row at a time."""
    hessian, linear = problem.hessian.double(), problem.linear.double()
    weight = torch.zeros_like(linear)
    for g, r in itertools.product(range(keep.shape[0]), range(keep.shape[1])):
        at = keep[g, r].nonzero().squeeze(1)
        if len(at):
            weight[g, r, at] = torch.linalg.solve(hessian[g][at][:, at], linear[g, r, at])
    return weight


def excess(problem: Problem, found: Tensor, best: Tensor) -> float:
    """By how much `found` loses more than `best`, as a share of what all zeros lose."""
    wide = Problem(problem.hessian.double(), problem.target.double(), problem.linear.double())
    return wide.loss(found.double()) - wide.loss(best)
