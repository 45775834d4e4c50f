"""admm: the mask and the weights together, alternating between the best weight and the best zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from .least_squares import refit
from .problem import Goal, Problem

_ITERATIONS = 50
_RHO = 0.03
_GROWTH = 1.12


def admm(problem: Problem, goal: Goal) -> tuple[Tensor, Tensor]:
    """Problem -> (weight, keep), both [g, r, n]: 50 rounds, then least squares on what stays.

    Inputs are scaled to length one. Takes an eigendecomposition [n, n] and two products [r, n] x [n, n] a round.

    Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
    2024; Boyd et al., "Distributed Optimization and Statistical Learning via the ADMM", 2011.
    """
    norms = problem.norms.unsqueeze(-2)
    scaled = problem.hessian / norms / norms.mT
    values, vectors = torch.linalg.eigh(scaled)
    values = values.clamp(min=0).unsqueeze(-2)
    target = problem.target * norms
    linear = (target @ vectors) * values

    def zeroed(weight: Tensor) -> tuple[Tensor, Tensor]:
        keep = problem.keep(weight.abs(), goal)
        return weight * keep, keep

    rho, dual = _RHO, torch.zeros_like(target)
    sparse, keep = zeroed(target)
    for _ in range(_ITERATIONS):
        full = ((linear + (rho * sparse - dual) @ vectors) / (values + rho)) @ vectors.mT
        sparse, keep = zeroed(full + dual / rho)
        dual += rho * (full - sparse)
        rho *= _GROWTH
    return refit(problem, keep, sparse / norms), keep
