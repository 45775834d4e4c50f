"""wanda: what each weight contributes to its output, which no other weight makes up for."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxprune.plan.patterns import Unstructured

from .by_row import keep_rows, spread
from .problem import Goal, Problem


def wanda(problem: Problem, goal: Goal) -> tuple[Tensor, Tensor]:
    """Problem -> (weight, keep), both [g, r, n]: |w| times the norm of its input decides what stays, as it is.

    The weights are the problem's target, which already makes up for the layers before; the paper takes the model's own.

    Elements of one output are compared with each other, as in the paper, and every output loses the same share of what
    is not zero already.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024.
    """
    scores = problem.target.abs() * problem.norms.unsqueeze(-2)
    alive = problem.alive
    if not isinstance(goal.pattern, Unstructured):
        keep = problem.keep(scores, goal)
    elif alive is None or goal.pattern.per_row:
        keep = problem.keep(scores, dataclasses.replace(goal, pattern=dataclasses.replace(goal.pattern, per_row=True)))
    else:
        dead = ~alive
        living = alive.sum(-1)
        count = goal.count if goal.count is not None else goal.pattern.count(alive.numel())
        leave = spread(max(0, count - int(dead.sum())), living.flatten()).view_as(living)
        keep = keep_rows(scores.masked_fill(dead, -torch.inf), leave + dead.sum(-1)) & alive
    return problem.target * keep, keep
