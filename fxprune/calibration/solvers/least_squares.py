"""least_squares: the best values for the weights that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from .cholesky import factor, solve
from .problem import Problem

# Rows that keep fewer elements than this are solved in batches, of this many numbers at a time; larger ones singly.
_SMALL = 64
_CHUNK = 1 << 22
# Conjugate gradients end where a row's residual is this small a share of its right side: the loss is then right to six
# digits or more.
_TOLERANCE = 1e-4
# How many times as many operations a second a large product does as the factorisation of single rows, as measured.
_RATE = 3.5
# Iterations are only begun where the time that the direct solution takes is enough for so many.
_ENOUGH = 60
# After so many iterations the rows that are done leave the others alone.
_ROUND = 8


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
    if keep.shape[0] > 1:
        return _direct(problem, keep)
    _, rows, columns = keep.shape
    counts = keep.sum(-1).double()
    direct = float((counts**3 / 3 + 50 * counts**2).sum()) * _RATE
    iterations = int(direct / (2 * rows * columns**2))
    found = _iterate(problem, keep[0], start, iterations) if iterations >= _ENOUGH else None
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
            weight[g, :, at] = solve(part, right).to(weight.dtype)
    return weight


def _direct(problem: Problem, keep: Tensor) -> Tensor:
    weight = torch.zeros_like(problem.target)
    for g in range(keep.shape[0]):
        hessian, linear, counts = problem.hessian[g], problem.linear[g], keep[g].sum(-1).tolist()
        small = [row for row, count in enumerate(counts) if 0 < count < _SMALL]
        small.sort(key=counts.__getitem__)
        size = max(1, _CHUNK // _SMALL**2)
        for start in range(0, len(small), size):
            rows = torch.tensor(small[start : start + size], device=keep.device)
            weight[g, rows] = _solve_batch(
                hessian, linear[rows], keep[g, rows], counts[small[start : start + size][-1]]
            )
        for row, count in enumerate(counts):
            if count >= _SMALL:
                at = keep[g, row].nonzero().squeeze(1)
                part = factor(hessian.index_select(0, at).index_select(1, at).double())
                found = torch.cholesky_solve(linear[row, at].double().unsqueeze(1), part).squeeze(1)
                weight[g, row, at] = found.to(weight.dtype)
    return weight


def _solve_batch(hessian: Tensor, linear: Tensor, keep: Tensor, most: int) -> Tensor:
    """Rows [b, n] that keep at most `most` elements each -> their weights [b, n]; what a row lacks is an identity."""
    at = torch.sort(keep, dim=-1, descending=True, stable=True).indices[:, :most]
    used = keep.gather(1, at)
    part = hessian[at.unsqueeze(-1), at.unsqueeze(-2)].double()
    part *= used.unsqueeze(-1) & used.unsqueeze(-2)
    part.diagonal(dim1=-2, dim2=-1).add_(~used)
    right = (linear.gather(1, at) * used).double()
    found = torch.cholesky_solve(right.unsqueeze(-1), factor(part)).squeeze(-1)
    return torch.zeros_like(linear).scatter_(1, at, (found * used).to(linear.dtype))


def _iterate(problem: Problem, keep: Tensor, start: Tensor | None, iterations: int) -> Tensor | None:
    """Conjugate gradients on all rows [r, n] at once, scaled by the diagonal; None where they do not converge."""
    # Squares of what is as large as the squares of inputs would leave the range of float32.
    unit = problem.hessian[0].diagonal().mean()
    hessian, linear = problem.hessian[0] / unit, problem.linear[0] / unit * keep
    scale = hessian.diagonal()
    result = (problem.target if start is None else start)[0] * keep
    rows, weight = torch.arange(len(keep), device=keep.device), result.clone()
    limit = _TOLERANCE**2 * linear.square().sum(-1)
    residual = linear - (weight @ hessian) * keep
    step = residual / scale
    direction, old = step, (residual * step).sum(-1)
    for iteration in range(iterations):
        if iteration % _ROUND == 0:
            going = residual.square().sum(-1) > limit
            result[rows] = weight
            if not bool(going.any()):
                return result.unsqueeze(0)
            state = (rows, keep, limit, weight, residual, direction, old)
            rows, keep, limit, weight, residual, direction, old = (part[going] for part in state)
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
