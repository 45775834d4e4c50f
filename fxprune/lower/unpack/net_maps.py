"""net_maps: the steps of a net that lie over maps [n, c, h, w], by sizes of any kind."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from fxprune.kernels.native import net
from fxprune.kernels.native.net import Taps

from .store import Writer

aten = torch.ops.aten


def pad(
    w: Writer, x: Node, taps: Taps, value: float = 0.0, *, most: tuple[int, int] | None = None
) -> tuple[Node, list[int]]:
    """x, and the padding that an op is to add on both sides of rows and columns.

    Where the two sides differ, or are more than the op takes (`most`), x is padded itself.
    """
    above, below, left, right = taps.padding
    if above == below and left == right and (most is None or (above <= most[0] and left <= most[1])):
        return x, [above, left]
    return w.call(aten.constant_pad_nd.default, x, [left, right, above, below], value), [0, 0]


def pool(w: Writer, step: net.Pool, x: Node) -> Node:
    """The greatest or the mean of each window; "mean inside" counts no zeros around the map."""
    taps = step.taps
    kernel, stride = list(taps.kernel), list(taps.stride)
    half = (taps.kernel[0] // 2, taps.kernel[1] // 2)
    if step.kind == "max":
        x, around = pad(w, x, taps, -math.inf, most=half)
        return w.call(aten.max_pool2d.default, x, kernel, stride, around, list(taps.dilation))
    padded, around = pad(w, x, taps, most=half)
    counts_all = step.kind == "mean" or padded is not x
    total = w.call(aten.avg_pool2d.default, padded, kernel, stride, around, False, counts_all)
    if step.kind == "mean" or padded is x:
        return total
    # The share of each window that lies inside the map.
    one = w.call(aten.slice.Tensor, w.call(aten.slice.Tensor, x, 0, 0, 1), 1, 0, 1)
    inside, _ = pad(w, w.call(aten.ones_like.default, one), taps, most=half)
    share = w.call(aten.avg_pool2d.default, inside, kernel, stride)
    return w.call(aten.div.Tensor, total, share)


def shuffle(w: Writer, step: net.Shuffle, x: Node) -> Node:
    """Channels become places, of which the last rows and columns may be cut off."""
    (th, tw), (rows, columns) = step.times, step.cut
    y = x
    if th == tw > 1:
        y = w.call(aten.pixel_shuffle.default, x, th)
    elif (th, tw) != (1, 1):
        y = w.call(aten.unflatten.int, x, 1, [-1, th, tw])
        y = w.call(aten.permute.default, y, [0, 1, 4, 2, 5, 3])
        y = w.call(aten.flatten.using_ints, w.call(aten.flatten.using_ints, y, 4, 5), 2, 3)
    for dim, cut in ((2, rows), (3, columns)):
        y = w.call(aten.slice.Tensor, y, dim, 0, -cut) if cut else y
    return y
