"""Scores and amounts -> the decision which elements of which weights stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxprune.errors import InputError
from fxprune.plan.matrix import from_matrix, to_matrix
from fxprune.plan.patterns import Blocks, Existing, SemiStructured, Unstructured
from fxprune.plan.plan import Binding, Plan
from fxprune.plan.scores import Score, Scores

from .mask import PackedMask, chunks
from .project import keep_highest, project, score_tiles, spread_tiles
from .score import PIECEWISE, SCORES, check_weight, scores
from .selection import Selection
from .threshold import Shard


@torch.no_grad()
def select(
    weights: Mapping[str, Tensor],
    existing: Mapping[str, PackedMask | Tensor],
    plan: Plan,
    binding: Binding,
    inputs: Mapping[str, int] | None = None,
) -> Selection:
    """Weights by name and the masks they already have (packed, or bool of the weight's shape) -> Selection.

    `inputs` names the dimension of a weight that products sum over, where it is not 1: its rows, groups and tiles are
    those of `fxprune.plan.matrix`.

    Masked elements are never revived: they are the first to count towards an amount, whatever stands there.
    Among equal scores the lowest flat index goes first (with rows, groups or tiles: in the weight's matrix), and in a
    pool the first weight's. A weight that no rule binds keeps its existing mask. Weights are only read; a tied weight
    must come under one name only.
    Raises InputError for weights and scores that are not finite, and for masks and given scores that do not fit.
    """
    _check_given(weights, plan, binding)
    masks = {name: _packed(name, mask, weights) for name, mask in existing.items()}
    asked: dict[str, float | None] = dict.fromkeys(masks)
    for index, rule in enumerate(plan.rules):
        bound = binding.names(index)
        pools = [bound] if rule.scope == "global" else [[name] for name in bound]
        for pool in pools:
            how, pooled = rule.sparsity, {name: weights[name] for name in pool}
            if isinstance(how, Existing):
                masks.update({name: _zeros(name, weight) for name, weight in pooled.items() if name not in masks})
                asked.update(dict.fromkeys(pool))
            elif isinstance(how, Blocks):
                asked.update(dict.fromkeys(pool, _mask_tiles(pooled, masks, how, inputs or {})))
            elif isinstance(how, SemiStructured) or (isinstance(how, Unstructured) and how.per_row):
                for name, weight in pooled.items():
                    asked[name] = _mask_rows(name, weight, masks, how, (inputs or {}).get(name, 1))
            elif isinstance(how, Unstructured):
                asked.update(dict.fromkeys(pool, _mask_pool(pooled, masks, how)))
    order = [name for name in weights if name in masks]
    return Selection(mask={name: masks[name] for name in order}, asked={name: asked[name] for name in order})


def _mask_pool(pool: Mapping[str, Tensor], masks: dict[str, PackedMask], how: Unstructured) -> float:
    """Put the masks of a pool of weights into `masks`; answers the fraction that was asked for."""
    for name, weight in pool.items():
        check_weight(name, weight)
    size = sum(weight.numel() for weight in pool.values())
    count = how.count(size)
    kept = tuple(masks.get(name) for name in pool)
    if isinstance(how.score, str) and how.score in PIECEWISE:
        shard = Shard(tuple(pool.values()), kept, SCORES[how.score])
    else:
        scored = tuple(scores(name, weight, how.score) for name, weight in pool.items())
        shard = Shard(scored, kept)
    alive = shard.alive()
    # what is masked already is the first part of the count; where it is more than was asked, it stays so
    masks.update(zip(pool, shard.keep_all_but(max(0, count - (size - alive))), strict=True))
    return count / size if size else 0.0


def _mask_rows(
    name: str, weight: Tensor, masks: dict[str, PackedMask], how: Unstructured | SemiStructured, inputs: int
) -> float:
    """Put the mask of a weight whose rows are chosen from one by one into `masks`; answers the fraction asked for."""
    keep = project(_matrix_scores(name, weight, masks.get(name), how.score, inputs), how)
    _put(masks, name, weight, keep, inputs)
    if isinstance(how, SemiStructured):
        return 1 - how.n / how.m
    return how.count(weight.numel()) / weight.numel() if weight.numel() else 0.0


def _mask_tiles(
    pool: Mapping[str, Tensor], masks: dict[str, PackedMask], how: Blocks, inputs: Mapping[str, int]
) -> float:
    """Put the masks of a pool of weights by tiles into `masks`; answers the fraction that was asked for."""
    tiles = []
    for name, weight in pool.items():
        scored = _matrix_scores(name, weight, masks.get(name), how.score, inputs.get(name, 1))
        tiles.append(score_tiles(scored, how).cpu())  # few; a pool may lie on several devices
    if not tiles:
        return 0.0
    flat = torch.cat([norms.flatten() for norms in tiles])
    count = how.count(flat.numel())
    parts = keep_highest(flat, count).split([norms.numel() for norms in tiles])
    for (name, weight), norms, part in zip(pool.items(), tiles, parts, strict=True):
        keep = spread_tiles(part.view(norms.shape).to(weight.device), how)
        _put(masks, name, weight, keep, inputs.get(name, 1))
    return count / flat.numel() if flat.numel() else 0.0


def _matrix_scores(
    name: str, weight: Tensor, kept: PackedMask | None, score: str | Score | Scores, inputs: int
) -> Tensor:
    """The scores of a weight as one matrix [1, o, n], float32 or wider, with -inf where it is masked already."""
    check_weight(name, weight)
    if isinstance(score, str) and score in PIECEWISE:
        found = to_matrix(SCORES[score](weight), inputs)  # a magnitude is as finite as the weight, which was checked
    else:
        found = to_matrix(scores(name, weight, score), inputs)
    found = found if found.dtype.itemsize >= 4 else found.float()
    if kept is not None:
        found = found.masked_fill(~to_matrix(kept.unpack(), inputs), -torch.inf)
    return found[None]


def _put(masks: dict[str, PackedMask], name: str, weight: Tensor, keep: Tensor, inputs: int) -> None:
    """keep [1, o, n] becomes the mask of a weight, together with the one that it has."""
    kept = from_matrix(keep[0], weight.shape, inputs)
    if name in masks:
        kept = kept & masks[name].unpack()
    masks[name] = PackedMask.pack(kept.contiguous())


def _check_given(weights: Mapping[str, Tensor], plan: Plan, binding: Binding) -> None:
    """Raise InputError where the scores given with a rule lack a weight that it binds, units or elements alike."""
    for index, rule in enumerate(plan.rules):
        given = None if isinstance(rule.sparsity, Existing) else rule.sparsity.score
        if isinstance(given, Scores):
            for name in binding.names(index):
                given.of(name, weights[name])


def _packed(name: str, mask: PackedMask | Tensor, weights: Mapping[str, Tensor]) -> PackedMask:
    where = f'"{name}"'
    if name not in weights:
        do = "Give masks for weights of the model."
        raise InputError("cannot use a mask", where=where, why="no weight has this name", do=do)
    shape = tuple(weights[name].shape)
    if tuple(mask.shape) != shape:
        why = f"it has shape {list(mask.shape)}, the weight {list(shape)}"
        raise InputError("cannot use a mask", where=where, why=why, do="Give a mask of the weight's shape.")
    if isinstance(mask, PackedMask):
        return PackedMask(mask.shape, mask.bits.to(weights[name].device))
    if mask.dtype is not torch.bool:
        why = f"it is {mask.dtype}, which need not be 0 or 1"
        raise InputError("cannot use a mask", where=where, why=why, do="Give a bool tensor, True = kept.")
    return PackedMask.pack(mask.to(weights[name].device))


def _zeros(name: str, weight: Tensor) -> PackedMask:
    check_weight(name, weight)
    return PackedMask.from_chunks(weight.shape, weight.device, (piece != 0 for piece in chunks(weight)))
