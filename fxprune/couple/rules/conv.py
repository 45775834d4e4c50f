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


def _zero_of_conv(
    here: Here, out: Dims, input: Dims, weight: Dims, bias: Dims | None = None, groups: int = 1, **_: Any
) -> Atoms:
    if len(input) != len(weight):
        return set()
    try:
        each_in = split_groups(input[1], groups, here.name)[1]
        group, each_out = split_groups(out[1], groups, here.name)
    except Conflict as conflict:
        # a tie made since has broken the groups
        here.freeze_all([out, input, weight, bias], str(conflict))
        return set()
    here.sums(each_in, input.zero | weight.zero)
    verdict: dict[Axis, bool] = {}
    for axis, zero in (
        (out[0], input.zero if bias is None else set()),
        (group, input.zero | weight.zero),
        (each_out, weight.zero),
    ):
        for atom in atoms(axis):
            verdict[atom] = verdict.get(atom, True) and atom in zero
    return {atom for atom, zero in verdict.items() if zero and (bias is None or atom in bias.zero)}


def _resize_conv(sizes: Resize, out: Dims, input: Dims, groups: int = 1, **_: Any) -> dict[str, Any]:
    if groups == 1 or not (sizes.changed(input[1]) or sizes.changed(out[1])):
        return {}
    return {"groups": sizes.number(split_groups(input[1], groups, "")[0])}


def _conv(here: Here, out: Dims, input: Dims, weight: Dims, bias: Dims | None, groups: int, transposed: bool) -> None:
    values = [out, input, weight, bias]
    if len(input) != len(weight):
        here.freeze_all(values, "a convolution without a batch")
        return
    here.tie(input[0], out[0])
    for dims in (out, input, weight):
        here.freeze_each(dims.axes[2:], _WINDOW)
    w_in, w_out = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    try:
        _tie_channels(here, input[1], out[1], w_in, w_out, groups, transposed)
    except Conflict as conflict:
        here.freeze_all(values, str(conflict))
        return
    if bias is not None:
        here.tie(bias[0], out[1])
    here.writes(weight, out[1], channelwise=groups > 1 and input[1].root().size == Size(groups))


@relation("conv1d", "conv2d", "conv3d", zero=_zero_of_conv, resize=_resize_conv)
def conv(here: Here, out: Dims, input: Dims, weight: Dims, bias: Dims | None = None, groups: int = 1, **_: Any) -> None:
    """b (g i) ., (g o) i ., +(g o)? -> b (g o) ."""
    _conv(here, out, input, weight, bias, groups, transposed=False)


@relation("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", zero=_zero_of_conv, resize=_resize_conv)
def conv_transpose(
    here: Here, out: Dims, input: Dims, weight: Dims, bias: Dims | None = None, groups: int = 1, **_: Any
) -> None:
    """b (g i) ., (g i) o ., +(g o)? -> b (g o) ."""
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
