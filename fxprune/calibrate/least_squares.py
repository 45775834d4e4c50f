"""least_squares: the best values for the weights that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from .cholesky import factor
from .problem import Problem

# Numbers that one batch of the direct solution holds at a time.
_CHUNK = 1 << 23
# Conjugate gradients end where each row's residual is this small a share of its right side: the loss is then right to
# nine digits.
_TOLERANCE = 1e-5
# How many times as many operations a second a product of large matrices runs at as a batch of small factorisations.
_RATE = 8


def refit(problem: Problem, keep: Tensor, start: Tensor | None = None) -> Tensor:
    """Problem and keep [g, r, n] bool -> the weight [g, r, n] that loses least, zero where not kept.

    Each row solves its own normal equations, w_S = (target hessian)_S (hessian_SS)^-1: all rows together by conjugate
    gradients from `start` on, or, where these take longer than that, directly.

    Source: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993 (all at
    once); Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning", 2024 (conjugate gradients).
    """
    if not problem.target.numel():
        return problem.target.clone()
    if _shared(keep):
        return _columns(problem, keep[:, 0])
    groups, rows, columns = keep.shape
    counts = keep.sum(-1).double()
    direct = float((counts**3 / 3 + 20 * counts**2).sum()) * _RATE
    found = _iterate(problem, keep, start, int(direct / (2 * groups * rows * columns**2)))
    return _direct(problem, keep) if found is None else found


def _shared(keep: Tensor) -> bool:
    """Whether all rows keep the same elements."""
    return bool((keep == keep[:, :1]).all())


def _columns(problem: Problem, keep: Tensor) -> Tensor:
    """The same elements [g, n] in every row: one factorisation for each g."""
    weight = torch.zeros_like(problem.target)
    for g, kept in enumerate(keep):
        at = kept.nonzero().squeeze(1)
        if len(at):
            part = factor(problem.hessian[g].index_select(0, at).index_select(1, at).double())
            right = problem.linear[g].index_select(1, at).double()
            weight[g, :, at] = torch.cholesky_solve(right.mT, part).mT.to(weight.dtype)
    return weight


def _direct(problem: Problem, keep: Tensor) -> Tensor:
    weight = torch.zeros_like(problem.target)
    for g in range(keep.shape[0]):
        counts = keep[g].sum(-1)
        order = torch.sort(counts, stable=True).indices
        start = 0
        while start < len(order):
            # Rows of about the same size share a batch; shorter ones are filled up with an identity.
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * int(counts[order[stop]]) ** 2 <= _CHUNK:
                stop += 1
            rows, most = order[start:stop], int(counts[order[stop - 1]])
            start = stop
            if most:
                weight[g, rows] = _solved(problem.hessian[g], problem.linear[g, rows], keep[g, rows], most)
    return weight


def _solved(hessian: Tensor, linear: Tensor, keep: Tensor, most: int) -> Tensor:
    """Rows [b, n] that keep at most `most` elements each -> their weights [b, n]."""
    at = torch.sort(keep, dim=-1, descending=True, stable=True).indices[:, :most]
    used = keep.gather(1, at)
    part = hessian[at.unsqueeze(-1), at.unsqueeze(-2)].double()
    part *= used.unsqueeze(-1) & used.unsqueeze(-2)
    part.diagonal(dim1=-2, dim2=-1).add_(~used)
    right = (linear.gather(1, at) * used).double()
    found = torch.cholesky_solve(right.unsqueeze(-1), factor(part)).squeeze(-1)
    return torch.zeros_like(linear).scatter_(1, at, (found * used).to(linear.dtype))


def _iterate(problem: Problem, keep: Tensor, start: Tensor | None, iterations: int) -> Tensor | None:
    """Conjugate gradients on all rows at once, scaled by the diagonal; None where they do not converge."""
    # Squares of what is as large as the squares of inputs would leave the range of float32.
    unit = problem.hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    hessian, linear = problem.hessian / unit, problem.linear / unit * keep
    scale = hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    weight = (problem.target if start is None else start) * keep
    residual = linear - (weight @ hessian) * keep
    limit = _TOLERANCE**2 * linear.square().sum(-1)
    step = residual / scale
    direction, old = step, (residual * step).sum(-1)
    for _ in range(iterations):
        if bool((residual.square().sum(-1) <= limit).all()):
            return weight
        moved = (direction @ hessian).mul_(keep)
        curve = (direction * moved).sum(-1)
        length = torch.where(curve > 0, old / curve, 0.0).unsqueeze(-1)
        weight = weight + length * direction
        residual = residual - length * moved
        step = residual / scale
        new = (residual * step).sum(-1)
        direction = step + torch.where(old > 0, new / old, 0.0).unsqueeze(-1) * direction
        old = new
    return None
