"""project: element scores of a matrix -> which elements a sparsity pattern keeps. The nearest mask, in other words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxprune.errors import InputError, PlanError
from fxprune.plan.patterns import Blocks, SemiStructured, Unstructured

# Elements looked at together: what they need besides stays in the processor's cache.
_PIECE = 1 << 18
# How many scores say roughly where a threshold lies, and from how many on asking them pays.
_SAMPLE = 1 << 16
_LARGE = 1 << 19


@torch.no_grad()
def project(scores: Tensor, how: Unstructured | SemiStructured | Blocks, count: int | None = None) -> Tensor:
    """scores [g, r, n], any float -> keep [g, r, n] bool: the highest that the pattern lets stay.

    g matrices are one weight: the groups of a grouped convolution, otherwise 1. An unstructured amount is of all of
    them together, `per_row` of each of the g r rows, and no tile of Blocks reaches from one into the next. `count`
    takes the place of the number of elements (Unstructured) or tiles (Blocks) that leave, which otherwise comes from
    `how`.

    Exactly that many leave. Among equal scores those of the lowest flat index leave first. A score of -inf, an element
    that is masked already, leaves before all others and counts; in the norm of a tile it is 0, and a tile of nothing
    else leaves first. Scores for Blocks are otherwise not negative. Raises InputError for NaN, and PlanError for scores
    that the pattern does not divide and for more to leave than there are.
    """
    if scores.dim() != 3:
        raise ValueError(f"scores to project are [g, r, n], not {list(scores.shape)}")
    if scores.numel() and bool(torch.aminmax(scores).max.isnan()):  # the largest is NaN where any is
        raise InputError(
            "cannot choose among scores that hold NaN",
            where=f"project(scores {list(scores.shape)})",
            why=f"{int(scores.isnan().sum())} of {scores.numel()} are NaN",
            do="Repair the weight or the inputs that they were computed from.",
        )
    if isinstance(how, SemiStructured):
        if count is not None:
            raise ValueError(f"{how.n}:{how.m} settles how many leave, and takes no count")
        return _keep_of_each(scores, how)
    if isinstance(how, Blocks):
        tiles = score_tiles(scores, how)
        return spread_tiles(keep_highest(tiles, how.count(tiles.numel()) if count is None else count), how)
    leave = how.count(scores.numel()) if count is None else count
    return _keep_by_row(scores, leave) if how.per_row else keep_highest(scores, leave)


def keep_highest(scores: Tensor, leave: int) -> Tensor:
    """scores of any shape, no NaN -> keep, bool: all but the `leave` lowest, ties by lowest flat index.

    Raises PlanError where there are not so many.
    """
    _check_leave(leave, scores.numel())
    flat = scores.reshape(-1)
    found = _keep_by_sample(flat, leave, scores.shape[-1]) if flat.numel() >= _LARGE else None
    return (_settle(flat, leave) if found is None else found).view(scores.shape)


def score_tiles(scores: Tensor, how: Blocks) -> Tensor:
    """scores [g, r, n], not negative but for -inf -> Lp norms [g, r / rows, n / columns] of their tiles.

    They are float64 for float64 and float32 for all others. A tile of nothing but -inf has -inf. Raises PlanError for
    sides that the tile does not divide.
    """
    groups, outputs, inputs = scores.shape
    rows, columns = how.shape
    if outputs % rows or inputs % columns:
        raise _undivided(scores, f"{rows}x{columns} tiles")
    wide = scores if scores.dtype.itemsize >= 4 else scores.float()
    tiles = wide.reshape(groups, outputs // rows, rows, inputs // columns, columns)
    if not tiles.numel():
        return tiles.new_zeros(groups, outputs // rows, inputs // columns)
    largest = tiles.amax(4).amax(2)
    if how.norm == math.inf:
        return largest
    if float(tiles.amin()) < 0:
        tiles = tiles.clamp(min=0)
    if how.norm == 1:
        return tiles.sum(4).sum(2).where(largest > -torch.inf, largest)
    # Shares of a tile's largest neither overflow nor vanish when they are raised to a power.
    unit = largest.where((largest > 0) & largest.isfinite(), 1.0)
    shares = tiles / unit[:, :, None, :, None]
    norms = unit * torch.linalg.vector_norm(torch.linalg.vector_norm(shares, how.norm, dim=4), how.norm, dim=2)
    return norms.where(largest > -torch.inf, largest)


def spread_tiles(keep: Tensor, how: Blocks) -> Tensor:
    """keep [g, tiles down, tiles across] bool -> [g, r, n] bool, every element as its tile."""
    groups, down, across = keep.shape
    rows, columns = how.shape
    spread = keep[:, :, None, :, None].expand(groups, down, rows, across, columns)
    return spread.reshape(groups, down * rows, across * columns)


def _keep_by_sample(flat: Tensor, leave: int, row: int) -> Tensor | None:
    """flat [n] -> keep [n], by comparing all to two bounds and ranking only what lies between them.

    The bounds are order statistics of a sample, four standard deviations to either side of the threshold's place in it
    (Floyd and Rivest, "Expected time bounds for selection", 1975). None where the sample misled.
    """
    size = flat.numel()
    step = size // _SAMPLE
    # Scores of one column resemble each other: a step that shares a factor with the row would miss most columns.
    while math.gcd(step, row) > 1:
        step += 1
    sample = flat[::step].sort().values
    place, reach = leave / size * len(sample), 4 * math.sqrt(leave / size * (1 - leave / size) * len(sample)) + 1
    low = sample[int(place - reach)] if place >= reach else sample.new_tensor(-torch.inf)
    high = sample[int(place + reach)] if place + reach < len(sample) else sample.new_tensor(torch.inf)
    keep = torch.empty(size, dtype=torch.bool, device=flat.device)
    between = []
    for start in range(0, size, _PIECE):
        piece, above = flat[start : start + _PIECE], keep[start : start + _PIECE]
        torch.ge(piece, high, out=above)
        between.append(torch.nonzero((piece > low).logical_and_(~above)).squeeze(1).add_(start))
    unsettled = torch.cat(between)
    end = size - int(torch.count_nonzero(keep))  # where in ascending order those from `high` on begin
    rest = leave - (end - len(unsettled))
    # Many scores may equal a bound, all zeros or all -inf, so what equals one is not ranked.
    if rest <= 0:
        return _keep_above(flat, leave, low)
    if leave > end:
        return _keep_above(flat, leave, high)
    keep[unsettled] = _settle(flat[unsettled], rest)
    return keep


def _settle(flat: Tensor, leave: int) -> Tensor:
    """flat [n] -> keep [n]: all but the `leave` lowest, ties by lowest index."""
    if leave == 0 or leave == flat.numel():
        return torch.full(flat.shape, leave == 0, dtype=torch.bool, device=flat.device)
    keep = _keep_above(flat, leave, flat.kthvalue(leave).values)
    if keep is None:
        raise RuntimeError(f"kthvalue answered no {leave}th lowest of {flat.numel()} scores")
    return keep


def _keep_above(flat: Tensor, leave: int, threshold: Tensor) -> Tensor | None:
    """flat [n] -> keep [n]: what is above the threshold, and the last of what equals it, so that `leave` leave.

    None where the threshold is not the `leave`th lowest.
    """
    keep = flat > threshold
    stay = flat.numel() - leave - int(torch.count_nonzero(keep))
    if stay < 0:
        return None
    for start in reversed(range(0, flat.numel(), _PIECE)):
        if not stay:
            break
        tied = torch.nonzero(flat[start : start + _PIECE] == threshold).squeeze(1)[-stay:]
        keep[start + tied] = True
        stay -= len(tied)
    return None if stay else keep


def _keep_by_row(scores: Tensor, leave: int) -> Tensor:
    """scores [g, r, n] -> keep: `leave` in all, spread evenly over the rows, the first of which lose one more."""
    _check_leave(leave, scores.numel())
    if not scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    rows = scores.reshape(-1, scores.shape[-1])
    each, more = divmod(leave, len(rows))
    parts = [_settle_rows(rows[:more], each + 1), _settle_rows(rows[more:], each)]
    return torch.cat(parts).view(scores.shape)


def _settle_rows(rows: Tensor, leave: int) -> Tensor:
    """rows [r, n] -> keep [r, n]: in every row all but the `leave` lowest, ties by lowest index."""
    width = rows.shape[1]
    if leave == 0 or leave >= width or not len(rows):
        return torch.full(rows.shape, leave == 0, dtype=torch.bool, device=rows.device)
    threshold = rows.kthvalue(leave, dim=1, keepdim=True).values
    keep = rows > threshold
    stay = width - leave - keep.sum(1)
    tied = torch.nonzero(stay).squeeze(1)
    if len(tied):
        equal = rows[tied] == threshold[tied]
        from_the_end = equal.flip(1).cumsum(1, dtype=torch.int32).flip(1)
        keep[tied] |= equal & (from_the_end <= stay[tied, None])
    return keep


def _keep_of_each(scores: Tensor, how: SemiStructured) -> Tensor:
    """scores [g, r, n] -> keep: how.n of every how.m along a row.

    Every pair in a group is compared, and each element counts how many leave before it: for groups this small that
    takes less time than sorting them.
    """
    n, m = how.n, how.m
    if scores.shape[-1] % m:
        raise _undivided(scores, f"groups of {m}")
    groups = scores.reshape(-1, m)
    keep = torch.empty(groups.shape, dtype=torch.bool, device=scores.device)
    step = _PIECE // m
    for start in range(0, len(groups), step):
        members = groups[start : start + step].t().contiguous()  # [m, groups], so that comparisons run along memory
        sooner = torch.zeros(members.shape, dtype=torch.int8, device=scores.device)
        for later in range(1, m):
            first = members[:later] <= members[later]  # of two equal ones the earlier leaves first
            sooner[later] += first.sum(0, dtype=torch.int8)
            sooner[:later] += ~first
        keep[start : start + step] = (sooner >= m - n).t()
    return keep.view(scores.shape)


def _check_leave(leave: int, size: int) -> None:
    if not 0 <= leave <= size:
        raise PlanError(
            f"cannot take away {leave}",
            where=f"{size} scores",
            why="there are not so many" if leave > size else "it is negative",
            do=f"Ask for 0 to {size}, or for a fraction.",
        )


def _undivided(scores: Tensor, into: str) -> PlanError:
    return PlanError(
        f"cannot divide into {into}",
        where=f"scores {list(scores.shape)}",
        why="a side is no multiple of theirs",
        do="Use a pattern whose sides divide the weight's.",
    )
