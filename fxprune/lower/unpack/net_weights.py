"""net_weights: what a weight of a net was before it was laid out as that of one plain convolution.

A convolution by groups has zeros between its groups there, and a transposed one where a place of the result reads no
tap. Both are found by these zeros, so that a dense kernel need not multiply them.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fxprune.kernels.native import net
from fxprune.kernels.native.net import Taps


def by_groups(weight: Tensor) -> tuple[Tensor, int]:
    """A weight [o, i, kh, kw] as [o, i / groups, kh, kw], of the most groups between which nothing is stored."""
    o, i = weight.shape[:2]
    stored = weight.contiguous().view(torch.int32) != 0
    least = int(stored.sum())
    for groups in range(math.gcd(o, i), 1, -1):
        if o % groups == 0 and i % groups == 0 and int(_blocks(stored, groups).sum()) == least:
            return _blocks(weight, groups).reshape(o, i // groups, *weight.shape[2:]), groups
    return weight, 1


def _blocks(weight: Tensor, groups: int) -> Tensor:
    """Of [o, i, kh, kw] the block of each group, [groups, o / groups, i / groups, kh, kw]."""
    o, i = weight.shape[:2]
    apart = weight.reshape(groups, o // groups, groups, i // groups, *weight.shape[2:])
    each = torch.arange(groups)
    return apart[each, :, each]


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A transposed convolution: its weight [i, o / groups, kh, kw] and bias [o], and how it lies."""

    weight: Tensor
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    output_padding: list[int]
    groups: int


def as_transposed(weight: Tensor, bias: Tensor | None, taps: Taps, after: net.Shuffle) -> Transposed | None:
    """A plain convolution [o * th * tw, i, kh, kw] and the shuffle after it as one transposed convolution.

    Row y * s + a of the result reads the inputs y - above + d by tap a + (kh - 1 - d) * s of the transposed one, if
    that is padded by (kh - 1 - above) * s. None where no tap is saved, or there is no such convolution.
    """
    (th, tw), (kh, kw) = after.times, taps.kernel
    rows, i = weight.shape[:2]
    places = th * tw
    if taps.stride != (1, 1) or taps.dilation != (1, 1) or rows % places:
        return None
    parts = weight.view(rows // places, th, tw, i, kh, kw).flip(4, 5)
    # [i, o, (down, a), (right, b)]
    whole = parts.permute(3, 0, 4, 1, 5, 2).reshape(i, rows // places, kh * th, kw * tw)
    own_bias = None if bias is None else bias.view(-1, places)
    if own_bias is not None and not torch.equal(own_bias, own_bias[:, :1].expand_as(own_bias)):
        return None
    padding, more = [], []
    for dim, (size, step) in enumerate(zip((kh, kw), (th, tw), strict=True)):
        before, after_it = taps.padding[2 * dim], taps.padding[2 * dim + 1]
        first, last = _span(whole, dim)
        whole = whole.narrow(2 + dim, first, last - first)
        around = (size - 1 - before) * step - first
        longer = (before + after_it - size + 2) * step - after.cut[dim] + 2 * around - (last - first)
        padding.append(around)
        more.append(longer)
    if any(each < 0 for each in padding) or not all(0 <= each < step for each, step in zip(more, (th, tw))):
        return None
    if whole[0, 0].numel() >= places * kh * kw:
        return None
    turned, groups = by_groups(whole.transpose(0, 1))
    o, each = turned.shape[:2]
    own = turned.view(groups, o // groups, each, *turned.shape[2:]).transpose(1, 2).reshape(i, -1, *turned.shape[2:])
    return Transposed(own, None if own_bias is None else own_bias[:, 0], [th, tw], padding, more, groups)


def _span(weight: Tensor, dim: int) -> tuple[int, int]:
    """The first and the end of the taps [i, o, kh, kw] along rows or columns that are not zero; one at least."""
    used = (weight != 0).flatten(0, 1).any(0).any(1 - dim).nonzero().flatten()
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
