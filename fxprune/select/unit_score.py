"""How important each unit of a group (a channel, a head) is, from the slices of all parameters that leave with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.plan.channels import Channels
from fxprune.plan.scores import Scores

from .score import scores, shares_of_the_rest


@dataclass(frozen=True, eq=False)
class Slices:
    """One member of a group: a parameter, and the unit that each of its slices along `dim` belongs to.

    `index` [tensor.shape[dim]] holds the unit's number, -1 for none; every unit has equally many slices. `scales` says
    that a batch-norm multiplies its channels by this parameter.
    """

    name: str
    tensor: Tensor
    dim: int
    index: Tensor
    scales: bool = False


def score_units(members: Sequence[Slices], how: Channels) -> Tensor:
    """The importance of each unit of a group, from its members (one or more): float64 [size], on the CPU.

    By name: see UNIT_SCORES. By a function or given scores: the sum of each slice's element scores, reduced over the
    members; where given scores are signed, the magnitude of that. Members that given scores lack do not count. Raises
    InputError for element scores that do not fit.
    """
    if isinstance(how.score, str):
        return UNIT_SCORES[how.score](members, how)
    if isinstance(how.score, Scores):
        given = how.score
        members = [member for member in members if member.name in given] or members
        values = [scores(member.name, member.tensor, given) for member in members]
        if given.signed:
            values = [given.of(member.name, member.tensor) for member in members]
    else:
        values = [scores(member.name, member.tensor, how.score) for member in members]
    sums = [_sums(value, member.dim, member.index).cpu() for value, member in zip(values, members)]
    if how.reduce == "max":
        return _reduced([s.abs() for s in sums], how)
    return _reduced(sums, how).abs()


def norm(members: Sequence[Slices], how: Channels) -> Tensor:
    """The Lp norms (p = how.norm) of each unit's slices, reduced over the members: float64 [size].

    Source: Li et al., "Pruning Filters for Efficient ConvNets", 2017 (norms of filters); Fang et al., "DepGraph:
    Towards Any Structural Pruning", 2023 (over all coupled members).
    """
    return _reduced([_norms(m.tensor.detach(), m.dim, m.index, how.norm).cpu() for m in members], how)


def random(members: Sequence[Slices], how: Channels) -> Tensor:
    """Drawn evenly from [0, 1), float64 [size], from torch's own generator: torch.manual_seed decides.

    Source: Mittal et al., "Recovering from Random Pruning: On the Plasticity of Deep Convolutional Neural Networks",
    2018 (random filters as the baseline).
    """
    return torch.rand(int(members[0].index.max()) + 1, dtype=torch.float64, device="cpu")


def bn_scale(members: Sequence[Slices], how: Channels) -> Tensor:
    """|gamma| of the batch-norms over a group's channels, reduced over them: float64 [size].

    A group that no batch-norm scales gets its `norm` instead; `has_scales` tells.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017.
    """
    scaling = [member for member in members if member.scales]
    if not scaling:
        return norm(members, how)
    return _reduced([_sums(m.tensor.detach().abs(), m.dim, m.index).cpu() for m in scaling], how)


def has_scales(members: Sequence[Slices]) -> bool:
    """Whether a batch-norm scales the channels of a group, which `bn_scale` needs."""
    return any(member.scales for member in members)


def fpgm(members: Sequence[Slices], how: Channels) -> Tensor:
    """The sum of each unit's Euclidean distances to all others, reduced over the members: float64 [size].

    The units nearest to the geometric median of all can be replaced best by the others. A member [n, k] takes n^2 k
    steps.

    Source: He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", 2019.
    """
    return _reduced([_distances(m.tensor.detach(), m.dim, m.index).cpu() for m in members], how)


def lamp(members: Sequence[Slices], how: Channels) -> Tensor:
    """Each unit's squared L2 norm, reduced over the members, over the sum of those not smaller: float64 [size].

    Source: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021, units in place of elements.
    """
    norms = torch.stack([_norms(m.tensor.detach(), m.dim, m.index, 2.0).cpu() for m in members])
    largest = norms.max() if norms.numel() else norms.new_ones(())
    squares = (norms / largest.where(largest > 0, 1.0)).square()
    return shares_of_the_rest(_reduced(list(squares), how).sqrt())


_Named = Callable[[Sequence[Slices], Channels], Tensor]
# Scores of units that a plan can name and save.
UNIT_SCORES: dict[str, _Named] = {"norm": norm, "random": random, "bn_scale": bn_scale, "fpgm": fpgm, "lamp": lamp}
# Those of them that a group's width and scale decide, so that a pool must compare each with its group's mean.
RELATIVE = frozenset({"norm", "fpgm"})


def _reduced(of_members: Sequence[Tensor], how: Channels) -> Tensor:
    stacked = torch.stack(list(of_members))
    return stacked.amax(0) if how.reduce == "max" else stacked.mean(0) if how.reduce == "mean" else stacked.sum(0)


def _rows(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)


def _norms(tensor: Tensor, dim: int, index: Tensor, p: float) -> Tensor:
    """The Lp norm of all slices along `dim` that belong to each unit, float64 [size]."""
    rows = _rows(tensor, dim)
    index = index.to(rows.device)
    mine = index >= 0
    owner = index[mine]
    empty = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device=rows.device)
    if not rows.numel():
        return empty
    largest = empty.scatter_reduce(0, owner, _by_row(rows, lambda piece, _: piece.abs().amax(1))[mine], "amax")
    if math.isinf(p):
        return largest
    # A power of a magnitude underflows or overflows where p is large; one of its share of the largest does not matter.
    scale = largest.where(largest > 0, 1.0)[index.clamp(min=0)].unsqueeze(1)
    powers = _by_row(rows, lambda piece, at: (piece.abs() / scale[at]).pow(p).sum(1))
    return empty.index_add(0, owner, powers[mine]).pow(1 / p) * largest


def _sums(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """The sum over all slices along `dim` that belong to each unit, float64 [size]."""
    rows = _rows(tensor, dim)
    index = index.to(rows.device)
    mine = index >= 0
    empty = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device=rows.device)
    if not rows.numel():
        return empty
    return empty.index_add(0, index[mine], _by_row(rows, lambda piece, _: piece.sum(1))[mine])


def _distances(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """The sum of each unit's distances to the others, all its slices taken as one vector, float64 [size]."""
    rows = _rows(tensor, dim)
    index = index.to(rows.device)
    size = int(index.max()) + 1
    order = torch.sort(index, stable=True).indices[int((index < 0).sum()) :]
    vectors = rows.double()[order].reshape(size, -1)
    if not vectors.numel():
        return vectors.new_zeros(size)
    # Distances by matrix product end in noise: less of it around the mean, and the same for units that are equal.
    vectors, place, copies = torch.unique(vectors - vectors.mean(0), dim=0, return_inverse=True, return_counts=True)
    step = max(1, (1 << 22) // size)
    pieces = [vectors[start : start + step] for start in range(0, len(vectors), step)]
    return torch.cat([torch.cdist(piece, vectors) @ copies.double() for piece in pieces])[place]


def _by_row(rows: Tensor, reduce: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """What `reduce` makes of rows (float64) and their place, a piece at a time."""
    step = max(1, (1 << 22) // max(1, rows.shape[1]))
    places = [slice(start, start + step) for start in range(0, len(rows), step)]
    return torch.cat([reduce(rows[at].double(), at) for at in places])
