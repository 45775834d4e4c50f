"""Masks and values of one weight, fitted to what it should give. SOLVERS lists the ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .admm import admm
from .problem import Goal, Problem
from .sparsegpt import sparsegpt, sparsegpt_refit
from .wanda import wanda


class Solver(NamedTuple):
    """A method of calibration.

    solve   (problem, goal) -> (weight, keep), both [g, r, n]
    refits  whether it changes what stays of a weight, so that units, too, are chosen by what the others make up for
    """

    solve: Callable[[Problem, Goal], tuple[Tensor, Tensor]]
    refits: bool = True


SOLVERS = {
    "wanda": Solver(wanda, refits=False),
    "sparsegpt": Solver(sparsegpt),
    "refit": Solver(sparsegpt_refit),
    "admm": Solver(admm),
}
METHODS = ("magnitude", *SOLVERS)

__all__ = ["METHODS", "SOLVERS", "Solver"]
