"""sparsegpt: columns in turn; what one loses, those after it make up for."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.plan.patterns import Blocks, SemiStructured, Unstructured
from fxprune.select.project import project

from .by_row import even_quotas, keep_rows, spread
from .cholesky import factor
from .least_squares import refit
from .problem import Goal, Problem

# Columns whose masks are decided together, as in the paper.
WIDTH = 128


def sparsegpt(problem: Problem, goal: Goal) -> tuple[Tensor, Tensor]:
    """Problem -> (weight, keep), both [g, r, n].

    Tiles (Blocks) are chosen all at once, by what each loses if the others make up for it.

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023.
    """
    upper = _inverse_factor(problem.hessian)
    pattern = goal.pattern
    given = None
    if isinstance(pattern, Blocks):
        inverse = upper.square().sum(-2).unsqueeze(-2)
        given = problem.keep(problem.target.square() / inverse, goal)
    weight, keep = problem.target.clone(), torch.ones_like(problem.target, dtype=torch.bool)
    columns = weight.shape[-1]
    width = WIDTH - WIDTH % pattern.m if isinstance(pattern, SemiStructured) else WIDTH
    counts = _counts(problem, goal, width) if isinstance(pattern, Unstructured) else []
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block, corner = weight[..., start:stop].clone(), upper[..., start:stop, start:stop]
        roots = corner.diagonal(dim1=-2, dim2=-1)
        dead = None if problem.alive is None else ~problem.alive[..., start:stop]

        def scores(a: int, b: int, block: Tensor = block, roots: Tensor = roots, dead: Tensor | None = dead) -> Tensor:
            found = _losses(block[..., a:b], roots[..., a:b])
            return found if dead is None else found.masked_fill(dead[..., a:b], -torch.inf)

        if given is not None:
            mask = given[..., start:stop]
        elif isinstance(pattern, Unstructured):
            found, leave = scores(0, stop - start), counts[start // width]
            mask = keep_rows(found, leave) if pattern.per_row else project(found, pattern, int(leave))
        else:
            mask = torch.ones_like(block, dtype=torch.bool)
        errors = torch.zeros_like(block)
        for i in range(stop - start):
            if isinstance(pattern, SemiStructured) and i % pattern.m == 0:
                mask[..., i : i + pattern.m] = project(scores(i, i + pattern.m).contiguous(), pattern)
            if dead is not None:
                mask[..., i] &= ~dead[..., i]
            column = block[..., i]
            kept = column * mask[..., i]
            error = (column - kept) / roots[..., i : i + 1]
            block[..., i:] -= error.unsqueeze(-1) * corner[..., i, i:].unsqueeze(-2)
            block[..., i] = kept
            errors[..., i] = error
        weight[..., start:stop], keep[..., start:stop] = block, mask
        weight[..., stop:] -= errors @ upper[..., start:stop, stop:]
    return weight * keep, keep


def _losses(weight: Tensor, roots: Tensor) -> Tensor:
    """weight [g, r, n], roots [g, n] -> what each element loses."""
    return (weight / roots.unsqueeze(-2)).square()


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper factor of the inverse [g, n, n]; its rows say how later columns make up for earlier ones."""
    return factor(torch.cholesky_inverse(factor(hessian.double()))).mT.to(hessian.dtype)


def _counts(problem: Problem, goal: Goal, width: int) -> list[Tensor]:
    """How many elements of each block of columns leave, what is zero already included: so many as the goal says.

    One number for each block; for patterns by row, one for each row [g, r].
    """
    assert isinstance(goal.pattern, Unstructured)
    target = problem.target
    alive = torch.ones_like(target, dtype=torch.bool) if problem.alive is None else problem.alive
    count = goal.pattern.count(target.numel()) if goal.count is None else goal.count
    living = torch.stack([part.sum(-1) for part in alive.split(width, dim=-1)], dim=-1)
    sizes = torch.tensor([part.shape[-1] for part in alive.split(width, dim=-1)], device=alive.device).expand_as(living)
    if goal.pattern.per_row:
        left: int | Tensor = even_quotas(alive, count)
    else:
        left = max(0, count - int((~alive).sum()))
        living, sizes = living.sum((0, 1)), sizes.sum((0, 1))
    return list((sizes - living + spread(left, living)).unbind(-1))


def sparsegpt_refit(problem: Problem, goal: Goal) -> tuple[Tensor, Tensor]:
    """The mask of SparseGPT, then least squares on it: (weight, keep), both [g, r, n]."""
    start, keep = sparsegpt(problem, goal)
    return refit(problem, keep, start), keep
