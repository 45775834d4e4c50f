"""Normalisation. A statistic over an axis changes when indices leave, so such an axis is mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxprune.couple.axis import Conflict, atoms

from .relation import Atoms, Dims, Here, Resize, relation, split_groups, tie_broadcast

# Ops whose mixed axes change what they compute when indices leave.
STATISTICS = {"layer_norm", "rms_norm", "group_norm"}


def _zero_by_channel(
    here: Here, out: Dims, input: Dims, weight: Dims | None = None, bias: Dims | None = None, **a: Any
) -> Atoms:
    """(x - mean) / std * weight + bias is zero where the last term is, and x and its mean or the weight are."""
    mean = a.get("running_mean")
    zero = input.zero & mean.zero if mean is not None else set(input.zero)
    if weight is not None:
        zero |= weight.zero
    if bias is not None:
        zero &= bias.zero
    return zero & set(atoms(out[1]))


def _standardises(input: Dims, running_mean: Dims | None, training: bool) -> bool:
    """Whether a batch-norm stands over a weight (weight standardisation, as in BiT and NFNets).

    Its statistic runs over all of the weight, whose indices are taken off afterwards.
    """
    return bool(input.source) and (running_mean is None or training)


def _resize_batch_norm(
    sizes: Resize, out: Dims, input: Dims, running_mean: Dims | None = None, training: bool = False, **_: Any
) -> dict[str, Any]:
    if not _standardises(input, running_mean, training):
        return {}
    cuts = [(i, sizes.indices(axis)) for i, axis in enumerate(out.axes) if i != 1 and sizes.changed(axis)]
    return {"select": cuts} if cuts else {}


@relation("batch_norm", zero=_zero_by_channel, resize=_resize_batch_norm)
def batch_norm(
    here: Here,
    out: Dims,
    input: Dims,
    weight: Dims | None = None,
    bias: Dims | None = None,
    running_mean: Dims | None = None,
    running_var: Dims | None = None,
    training: bool = False,
    **_: Any,
) -> None:
    """b c *, c?, c?, c?, c? -> b c *"""
    here.tie(input[1], out[1])
    for i, (a, b) in enumerate(zip(input.axes, out.axes)):
        if i != 1 and (running_mean is None or training):
            here.freeze(a, "a statistic runs over it")
        if not _standardises(input, running_mean, training):
            here.tie(a, b)
    for vector in (weight, bias, running_mean, running_var):
        if vector is not None:
            here.tie(vector[0], out[1])


@relation("instance_norm", zero=_zero_by_channel)
def instance_norm(
    here: Here, out: Dims, input: Dims, weight: Dims | None = None, bias: Dims | None = None, **a: Any
) -> None:
    """b c *, c?, c?, c?, c? -> b c *, with a statistic over *"""
    mean, variance = a.get("running_mean"), a.get("running_var")
    here.tie_rows(input.axes, out.axes)
    for vector in (weight, bias, mean, variance):
        if vector is not None:
            here.tie(vector[0], out[1])
    here.freeze_each(out.axes[2:], "a statistic runs over it")


def _resize_shape(sizes: Resize, out: Dims, normalized_shape: Sequence[Any], **_: Any) -> dict[str, Any]:
    last = out.axes[len(out) - len(normalized_shape) :]
    return {"normalized_shape": [sizes.literal(axis, value) for axis, value in zip(last, normalized_shape)]}


def _zero_of_layer_norm(
    here: Here, out: Dims, input: Dims, normalized_shape: Sequence[Any], bias: Dims | None = None, **_: Any
) -> Atoms:
    # The pruned model's statistic runs over the kept indices, and the removed ones are put back as zeros.
    width = len(normalized_shape)
    found = {atom for axis in out.axes[-width:] for atom in atoms(axis)}
    return found | (input.zero & out.atoms() if bias is None else set())


@relation("layer_norm", "rms_norm", zero=_zero_of_layer_norm, resize=_resize_shape)
def layer_norm(
    here: Here,
    out: Dims,
    input: Dims,
    normalized_shape: Sequence[Any],
    weight: Dims | None = None,
    bias: Dims | None = None,
    **_: Any,
) -> None:
    """* d, d?, d? -> * d, with a statistic over d"""
    here.tie_rows(input.axes, out.axes)
    last = out.axes[len(out) - len(normalized_shape) :]
    for vector in (weight, bias):
        if vector is not None:
            here.tie_rows(vector.axes, last)
    for axis in last:
        here.mix(axis, "a statistic runs over it")


def _resize_groups(sizes: Resize, out: Dims, num_groups: int, **_: Any) -> dict[str, Any]:
    if not sizes.changed(out[1]):
        return {}
    return {"num_groups": sizes.number(split_groups(out[1], num_groups, "")[0])}


def _zero_of_group_norm(
    here: Here, out: Dims, input: Dims, num_groups: int, weight: Dims | None = None, bias: Dims | None = None, **_: Any
) -> Atoms:
    try:
        inner = split_groups(out[1], num_groups, here.name)[1]
    except Conflict:
        return set()
    # Within a group the removed channels are put back as zeros, as in layer_norm.
    zero = input.zero | set(atoms(inner))
    if weight is not None:
        zero |= weight.zero
    if bias is not None:
        zero &= bias.zero
    return zero & set(atoms(out[1]))


@relation("group_norm", zero=_zero_of_group_norm, resize=_resize_groups)
def group_norm(
    here: Here, out: Dims, input: Dims, num_groups: int, weight: Dims | None = None, bias: Dims | None = None, **_: Any
) -> None:
    """b (g c) *, (g c)?, (g c)? -> b (g c) *, with a statistic over c and *"""
    here.tie_rows(input.axes, out.axes)
    for vector in (weight, bias):
        if vector is not None:
            here.tie(vector[0], out[1])
    here.freeze_each(out.axes[2:], "a statistic runs over it")
    try:
        here.mix(split_groups(out[1], num_groups, here.name)[1], "a statistic runs over it")
    except Conflict as conflict:
        here.freeze(out[1], str(conflict))


def _zero_of_weight_norm(here: Here, out: Dims, v: Dims, dim: int = 0, **_: Any) -> Atoms:
    for i, axis in enumerate(v.axes):
        if i != dim:
            here.sums(axis, v.zero, "a statistic that its removed indices change runs over it")
    return set(v.zero)


@relation("_weight_norm", zero=_zero_of_weight_norm)
def weight_norm(here: Here, out: Dims, v: Dims, g: Dims, dim: int = 0, **_: Any) -> None:
    """v / |v| * g, with the norm over all dimensions but one, which freezes"""
    tie_broadcast(here, out, [v, g])
    if dim >= 0:
        here.freeze(out[dim], "0 / 0 at its removed indices")
