"""units: which units (channels, heads) leave, so that the others can make up for them best."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .cholesky import factor
from .problem import Problem

# Units leave in at most about this many rounds; after each, what the rest loses is known anew.
_ROUNDS = 128


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of a group at the inputs of a weight: index [i] int64, the unit of each input (-1: none).

    `staying` is how many stay. `group` is the group's name. Columns of a convolution repeat the inputs.
    """

    group: str
    index: Tensor
    staying: int

    def inputs_of(self, kept: Tensor) -> Tensor:
        """The inputs that stay where the units `kept` do, int64."""
        return ((self.index < 0) | torch.isin(self.index, kept.to(self.index.device))).nonzero().squeeze(1)


def choose_units(problem: Problem, units: Units) -> Tensor:
    """Problem (g = 1) -> the units that stay, ascending int64.

    In rounds, the units whose columns lose least when all other columns make up for them leave: the loss of columns S
    is tr(W_S (inverse_SS)^-1 W_S^T).

    Source: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993; in groups:
    Frantar and Alistarh, "Optimal Brain Compression", 2022; Kurtic et al., "ZipLM", 2023.
    """
    repeats = problem.target.shape[-1] // len(units.index)
    index = units.index.to(problem.target.device).repeat(repeats)
    count = int(index.max()) + 1
    order = torch.sort(index, stable=True).indices[int((index < 0).sum()) :]
    members = order.reshape(count, -1)  # every unit has equally many columns
    weight = problem.target[0].double() if problem.alive is None else (problem.target * problem.alive)[0].double()
    inverse = torch.cholesky_inverse(factor(problem.hessian[0].double()))
    alive = torch.ones(count, dtype=torch.bool, device=index.device)
    leaving = count - units.staying
    at_once = max(1, -(-leaving // _ROUNDS))
    while leaving > 0:
        losses = _losses(weight, inverse, members).masked_fill(~alive, torch.inf)
        gone = torch.sort(losses, stable=True).indices[: min(at_once, leaving)]
        columns = members[gone].reshape(-1)
        part = factor(inverse[columns][:, columns])
        weight = weight - torch.cholesky_solve(weight[:, columns].mT, part).mT @ inverse[columns]
        inverse = inverse - inverse[:, columns] @ torch.cholesky_solve(inverse[columns], part)
        # What has left is a unit matrix of its own, so that rounding cannot bring it back.
        weight[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse[columns, columns] = 1
        alive[gone] = False
        leaving -= len(gone)
    return alive.nonzero().squeeze(1).cpu()


def _losses(weight: Tensor, inverse: Tensor, members: Tensor) -> Tensor:
    """What each unit [units, width] of columns loses, [units]."""
    blocks = inverse[members.unsqueeze(-1), members.unsqueeze(-2)]
    columns = weight[:, members].movedim(1, 0)  # [units, r, width]
    if members.shape[1] == 1:
        return columns.square().sum((1, 2)) / blocks.reshape(-1)
    solved = torch.cholesky_solve(columns.mT, factor(blocks))
    return (columns.mT * solved).sum((1, 2))
