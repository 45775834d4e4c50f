"""by_row: how many elements of each row leave, and which."""

from __future__ import annotations

import torch
from torch import Tensor


def even_quotas(alive: Tensor, count: int) -> Tensor:
    """alive [g, r, n] bool -> how many living elements of each row leave [g, r], int64.

    `count` are to be zero in all, equally many in every row; where it does not divide the first rows have one more.
    What is zero already counts, and a row that has more zeros than its share loses nothing.
    """
    groups, rows, columns = alive.shape
    each, more = divmod(count, max(1, groups * rows))
    quota = torch.full((groups * rows,), each, device=alive.device)
    quota[:more] += 1
    dead = columns - alive.sum(-1)
    return (quota.view(groups, rows) - dead).clamp(min=0)


def spread(count: int | Tensor, living: Tensor) -> Tensor:
    """living [..., k] int -> the parts [..., k] of `count` [...] in proportion to it: whole, and exact in their sum."""
    passed = living.cumsum(-1)
    total = passed[..., -1:].clamp(min=1)
    whole = torch.as_tensor(count, device=living.device).unsqueeze(-1)
    reached = whole * passed // total
    return torch.diff(reached, dim=-1, prepend=torch.zeros_like(reached[..., :1]))


def keep_rows(scores: Tensor, leave: Tensor) -> Tensor:
    """scores [g, r, n], leave [g, r] -> keep, bool: all but so many lowest of each row, ties by lowest index."""
    order = torch.sort(scores, dim=-1, stable=True).indices
    stays = torch.arange(scores.shape[-1], device=scores.device) >= leave.unsqueeze(-1)
    return torch.zeros_like(stays).scatter_(-1, order, stays)
