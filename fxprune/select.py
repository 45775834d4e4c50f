"""Scores and amounts -> the decision which elements of which weights stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import InputError
from .mask import PackedMask, chunks
from .patterns import Existing, Unstructured
from .plan import Binding, Plan
from .score import PIECEWISE, SCORES, Scores, check_weight, scores
from .threshold import Shard, threshold


@dataclass
class Selection:
    """The decision, by parameter name: it can be saved, sent and replayed on the same model.

    keep    group -> indices that stay, where some leave (structured pruning)
    mask    weight -> one bit for each element, 1 = kept
    values  parameter -> the tensor that takes its place, where calibration changed it
    asked   weight or group -> fraction its rule asked for; None where no amount was asked
    drop    module paths of the residual blocks that leave
    dead    group -> indices that stay, where masks left others without any effect; found anew at every transform
    """

    keep: dict[str, Tensor] = field(default_factory=dict)
    mask: dict[str, PackedMask] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    asked: dict[str, float | None] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    dead: dict[str, Tensor] = field(default_factory=dict)

    @property
    def staying(self) -> dict[str, Tensor]:
        """Group -> indices that stay, whether others were asked to leave or were dead."""
        return {**self.keep, **self.dead}

    def reached(self, name: str) -> float:
        """The fraction of weight `name` that is masked: 0.0 without a mask or without elements."""
        mask = self.mask.get(name)
        if mask is None or mask.numel() == 0:
            return 0.0
        return 1.0 - mask.kept() / mask.numel()

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """weight (any shape) -> the same with its new values, and +0.0 where masked, whatever stood there."""
        value = self.values.get(name, weight)
        mask = self.mask.get(name)
        if mask is None:
            return value
        if not mask.shape == weight.shape == value.shape:
            raise InputError(
                "cannot apply a selection",
                where=f'"{name}" {list(weight.shape)}',
                why=f"its mask has shape {list(mask.shape)}",
                do="Apply it to the model that it was made for.",
            )
        return torch.where(mask.unpack().to(value.device), value, value.new_zeros(()))


@torch.no_grad()
def select(
    weights: Mapping[str, Tensor],
    existing: Mapping[str, PackedMask | Tensor],
    plan: Plan,
    binding: Binding,
) -> Selection:
    """Weights by name and the masks they already have (packed, or bool of the weight's shape) -> Selection.

    Masked elements are never revived: they are the first to count towards an amount, whatever stands there.
    Among equal scores the lowest flat index goes first, and in a pool the first weight's. A weight that no
    rule binds keeps its existing mask. Weights are only read; a tied weight must come under one name only.
    Raises InputError for weights and scores that are not finite, and for masks and given scores that do not fit.
    """
    _check_given(weights, plan, binding)
    masks = {name: _packed(name, mask, weights) for name, mask in existing.items()}
    asked: dict[str, float | None] = dict.fromkeys(masks)
    for index, rule in enumerate(plan.rules):
        bound = binding.names(index)
        pools = [bound] if rule.scope == "global" else [[name] for name in bound]
        for pool in pools:
            if isinstance(rule.sparsity, Unstructured):
                share = _mask_pool({name: weights[name] for name in pool}, masks, rule.sparsity)
                asked.update(dict.fromkeys(pool, share))
            elif isinstance(rule.sparsity, Existing):
                for name in pool:
                    if name not in masks:
                        masks[name] = _zeros(name, weights[name])
                    asked[name] = None
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
    found = threshold([shard], max(0, count - (size - alive)))
    masks.update(zip(pool, shard.masks(found, 0), strict=True))
    return count / size if size else 0.0


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


__all__ = ["PackedMask", "Selection", "select"]
