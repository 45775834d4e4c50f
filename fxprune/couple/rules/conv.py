"""Convolutions: plain, grouped, depthwise with a multiplier, transposed."""

from __future__ import annotations

from typing import Any

from fxprune.couple.axis import Axis, Conflict, Size, atoms

from .relation import Atoms, Dims, Here, Resize, relation, split_groups

_WINDOW = "windows slide over it"


def _tie_channels(here: Here, x: Axis, y: Axis, w_in: Axis, w_out: Axis, groups: int, transposed: bool) -> None:
    """x = (g i), y = (g o); a plain weight is [(g o), i, ...], a transposed one [(g i), o, ...]."""
    group_in, each_in = split_groups(x, groups, here.name)
    group_out, each_out = split_groups(y, groups, here.name)
    here.tie(group_in, group_out)
    here.tie(w_in, x if transposed else each_in)
    here.tie(w_out, each_out if transposed else y)


def _channels(dims: Dims, weight: Dims) -> Axis | None:
    """The channels of a convolution's input or output, which stand first where it has no batch."""
    place = 1 + len(dims) - len(weight)
    return dims[place] if place in (0, 1) else None


def _zero_of_conv(
    here: Here, out: Dims, input: Dims, weight: Dims, bias: Dims | None = None, groups: int = 1, **_: Any
) -> Atoms:
    x, y = _channels(input, weight), _channels(out, weight)
    if x is None or y is None:
        return set()
    try:
        each_in = split_groups(x, groups, here.name)[1]
        group, each_out = split_groups(y, groups, here.name)
    except Conflict as conflict:
        # a tie made since has broken the groups
        here.freeze_all([out, input, weight, bias], str(conflict))
        return set()
    here.sums(each_in, input.zero | weight.zero)
    verdict: dict[Axis, bool] = {}
    batch = [(out[0], input.zero if bias is None else set())] if len(out) == len(weight) else []
    for axis, zero in (*batch, (group, input.zero | weight.zero), (each_out, weight.zero)):
        for atom in atoms(axis):
            verdict[atom] = verdict.get(atom, True) and atom in zero
    return {atom for atom, zero in verdict.items() if zero and (bias is None or atom in bias.zero)}


def _resize_conv(sizes: Resize, out: Dims, input: Dims, weight: Dims, groups: int = 1, **_: Any) -> dict[str, Any]:
    x, y = _channels(input, weight), _channels(out, weight)
    if groups == 1 or x is None or y is None or not (sizes.changed(x) or sizes.changed(y)):
        return {}
    return {"groups": sizes.number(split_groups(x, groups, "")[0])}


def _conv(here: Here, out: Dims, input: Dims, weight: Dims, bias: Dims | None, groups: int, transposed: bool) -> None:
    values = [out, input, weight, bias]
    x, y = _channels(input, weight), _channels(out, weight)
    if x is None or y is None:
        here.freeze_all(values, "a convolution of other dimensions than its weight's")
        return
    if len(out) == len(weight):
        here.tie(input[0], out[0])
    for dims in (out, input, weight):
        here.freeze_each(dims.axes[2 + len(dims) - len(weight) :], _WINDOW)
    w_in, w_out = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    try:
        _tie_channels(here, x, y, w_in, w_out, groups, transposed)
    except Conflict as conflict:
        here.freeze_all(values, str(conflict))
        return
    if bias is not None:
        here.tie(bias[0], y)
    here.writes(weight, y, channelwise=groups > 1 and x.root().size == Size(groups))


@relation("conv1d", "conv2d", "conv3d", zero=_zero_of_conv, resize=_resize_conv)
def conv(here: Here, out: Dims, input: Dims, weight: Dims, bias: Dims | None = None, groups: int = 1, **_: Any) -> None:
    """b? (g i) ., (g o) i ., +(g o)? -> b? (g o) ."""
    _conv(here, out, input, weight, bias, groups, transposed=False)


@relation("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", zero=_zero_of_conv, resize=_resize_conv)
def conv_transpose(
    here: Here, out: Dims, input: Dims, weight: Dims, bias: Dims | None = None, groups: int = 1, **_: Any
) -> None:
    """b? (g i) ., (g i) o ., +(g o)? -> b? (g o) ."""
    _conv(here, out, input, weight, bias, groups, transposed=True)


@relation("convolution", zero=_zero_of_conv, resize=_resize_conv)
def convolution(
    here: Here,
    out: Dims,
    input: Dims,
    weight: Dims,
    bias: Dims | None = None,
    transposed: bool = False,
    groups: int = 1,
    **_: Any,
) -> None:
    """as conv or conv_transpose, by its argument"""
    _conv(here, out, input, weight, bias, groups, transposed)
