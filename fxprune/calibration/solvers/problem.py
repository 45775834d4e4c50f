"""problem: the least squares that every solver of a weight works on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxprune.plan.patterns import Blocks, SemiStructured, Unstructured
from fxprune.select.project import project

from .cholesky import factor, solve

Masking = Unstructured | SemiStructured | Blocks

# The share of the mean of the Gram matrix's diagonal that is added to it: Frantar and Alistarh, "SparseGPT", 2023.
DAMPING = 0.01


@dataclasses.dataclass(frozen=True)
class Goal:
    """What must become zero: the pattern, and how many elements (Unstructured) or tiles (Blocks) of the weight.

    `count` is None for patterns that say it themselves. What is zero already is counted.
    """

    pattern: Masking
    count: int | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One weight as g matrices [r, n] of r outputs and n inputs: minimise tr((w - target) hessian (w - target)^T).

    g is 1 but for grouped convolutions. `hessian` [g, n, n] is the Gram matrix of the inputs with damping on its
    diagonal, so it is positive definite; `target` [g, r, n] the best weight if nothing had to be zero, and `linear`
    [g, r, n] is target @ hessian. `alive` [g, r, n] bool says which elements may be other than zero (None: all). All
    are of one dtype, float32 or float64.
    """

    hessian: Tensor
    target: Tensor
    linear: Tensor
    alive: Tensor | None = None

    @property
    def norms(self) -> Tensor:
        """The root of the diagonal [g, n]: how large each input is."""
        return self.hessian.diagonal(dim1=-2, dim2=-1).sqrt()

    def keep(self, scores: Tensor, goal: Goal) -> Tensor:
        """Scores [g, r, n] -> what stays under the goal's pattern, bool; what is zero already goes first."""
        if self.alive is None:
            return project(scores, goal.pattern, goal.count)
        return project(scores.masked_fill(~self.alive, -torch.inf), goal.pattern, goal.count) & self.alive

    def within(self, staying: Tensor) -> Problem:
        """The same for the inputs `staying` [k] int64 alone, where the weights of all others are zero."""
        hessian = self.hessian.index_select(-1, staying).index_select(-2, staying)
        linear = self.linear.index_select(-1, staying)
        target = solve(factor(hessian.double()), linear.double()).to(linear.dtype)
        return Problem(hessian, target, linear, None if self.alive is None else self.alive.index_select(-1, staying))

    def loss(self, weight: Tensor) -> float:
        """What `weight` [g, r, n] loses against the target, over what all zeros would lose."""
        off = weight - self.target
        whole = float((self.linear * self.target).sum(dtype=torch.float64))
        return float((off @ self.hessian * off).sum(dtype=torch.float64)) / whole if whole > 0 else 0.0


def damped(gram: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """gram [g, n, n] of `rows` rows of inputs -> (with something added to its diagonal, what was added [g, n]).

    That is DAMPING of the diagonal's mean; where the rows are so few that `shrinkage` asks for more, as much of each
    element of the diagonal as makes the matrix a multiple of the shrunken one. Inputs that were always zero get a
    matrix that is the identity in them, so that their weights stay as they are.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    least = (DAMPING * diagonal.mean(-1, keepdim=True)).expand_as(diagonal)
    share = shrinkage(gram, rows).unsqueeze(-1)
    ratio = share / (1 - share)
    added = torch.where(ratio > DAMPING, torch.maximum(ratio * diagonal, least), least)
    added = torch.where(added > 0, added, torch.ones_like(added))
    result = gram.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(added)
    return result, added


def shrinkage(gram: Tensor, rows: int) -> Tensor:
    """The share [g] of its own diagonal that makes gram [g, n, n] of `rows` rows resemble that of ever more rows.

    How much each input varies shows in few rows, what it has to do with each other only in many: what chance alone
    puts between n inputs is taken away from what is found there. At most n / (n + rows), for inputs that have nothing
    to do with each other would be shrunk however many rows there are. Source: the target "D" of Schäfer and Strimmer,
    "A Shrinkage Approach to Large-Scale Covariance Matrix Estimation", 2005, with the variances that products of
    normally distributed inputs have.
    """
    n = gram.shape[-1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1).double()
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt()
    varying = (diagonal > 0).sum(-1)
    pairs = varying * (varying - 1)
    squares = (gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)).square().sum((-2, -1)) - varying
    share = (pairs + squares) / (rows * squares).clamp(min=torch.finfo(torch.float64).tiny)
    return share.clamp(0, n / (n + rows)).to(gram.dtype)
