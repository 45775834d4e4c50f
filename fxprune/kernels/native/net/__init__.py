"""fxprune::net: a part of a graph around convolutions or linears, computed in one call on maps whose pixels, or tokens,
lie in lanes.

A net is a list of steps. `encode` writes it as the integers that the op takes, and the kernel (net.cpp) plans it for
the sizes of each call. `net_reference` says in plain torch what a net computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import register
from ..segments import Segments
from .program import VERSION, decode, encode
from .steps import (
    FORMS,
    POOLS,
    TILES,
    Activate,
    Add,
    Attention,
    Concat,
    Conv,
    Depthwise,
    Enter,
    Exit,
    LayerNorm,
    Mean,
    Multiply,
    Pool,
    Product,
    Repeat,
    Shuffle,
    Step,
)
from .taps import ACTIVATIONS, Finish, Taps
from .weights import SPARE, Panels, pack, pack_panels, panels_of, unpack, weight_of

__all__ = [
    "ACTIVATIONS", "FORMS", "POOLS", "SPARE", "TILES", "VERSION", "Activate", "Add", "Attention", "Concat",
    "Conv", "Depthwise", "Enter", "Exit", "Finish", "LayerNorm", "Mean", "Multiply", "Panels", "Pool", "Product",
    "Repeat", "Shuffle", "Step", "Taps", "decode", "encode", "net_reference", "pack", "pack_panels", "panels_of",
    "unpack", "weight_of",
]  # fmt: skip


def net_reference(
    inputs: Sequence[Tensor], values: Tensor, columns: Tensor, order: Tensor, counts: Tensor, starts: Tensor,
    dense: Tensor, words: Tensor, brains: Tensor, program: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """What a net computes, in plain torch: the definition, and the fallback."""
    packed = Segments(values, columns, order, counts, starts)
    made: list[Tensor] = []
    results: list[Tensor] = []

    def vector(at: int, size: int) -> Tensor | None:
        return None if at < 0 else dense[at : at + size]

    for step in decode(program):
        match step:
            case Enter():
                y = inputs[step.input]
                y = y.expand(len(inputs[0]), *y.shape[1:]) if len(y) == 1 else y
                y = y.transpose(1, 2).unsqueeze(2) if y.dim() == 3 else y
            case Conv():
                y = F.conv2d(
                    F.pad(made[step.x], _around(step.taps)),
                    weight_of(step, packed),
                    vector(step.bias, step.rows),
                    step.taps.stride,
                    0,
                    step.taps.dilation,
                )
                y = step.finish.apply(y, made[step.residual] if step.residual >= 0 else None)
            case Product():
                weight = panels_of(step, words, brains, starts)[:, :, None, None].float()
                y = F.conv2d(made[step.x].bfloat16().float(), weight, vector(step.bias, step.rows))
                y = step.finish.apply(y, made[step.residual] if step.residual >= 0 else None)
            case Depthwise():
                per = math.prod(step.taps.kernel)
                weight = dense[step.weight : step.weight + step.channels * per].view(-1, 1, *step.taps.kernel)
                x, bias = F.pad(made[step.x], _around(step.taps)), vector(step.bias, step.channels)
                y = F.conv2d(x, weight, bias, step.taps.stride, 0, step.taps.dilation, step.channels)
                y = step.finish.apply(y, made[step.residual] if step.residual >= 0 else None)
            case Pool():
                y = _pool(step, made[step.x])
            case Add():
                y = step.finish.apply(made[step.x] + made[step.other])
            case Multiply():
                y = step.finish.apply(made[step.x] * made[step.other])
            case Activate():
                y = step.finish.apply(made[step.x])
            case Concat():
                y = torch.cat([made[part] for part in step.parts], 1)
            case Mean():
                y = made[step.x].mean((2, 3), keepdim=True)
            case Repeat():
                y = made[step.x].repeat_interleave(step.times[0], 2).repeat_interleave(step.times[1], 3)
            case Shuffle():
                y = _shuffle(step, made[step.x])
            case LayerNorm():
                channels = made[step.x].shape[1]
                weight, bias = vector(step.weight, channels), vector(step.bias, channels)
                y = F.layer_norm(made[step.x].permute(0, 2, 3, 1), (channels,), weight, bias, step.epsilon)
                y = y.permute(0, 3, 1, 2)
            case Attention():
                y = _attention(step, made, inputs)
            case Exit():
                y = made[step.x]
                results.append(_formed(y, step.form).clone(memory_format=torch.contiguous_format))
        made.append(y)
    return results


def _shuffle(step: Shuffle, x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    (th, tw), (rows, columns) = step.times, step.cut
    y = x.view(n, channels // (th * tw), th, tw, height, width).permute(0, 1, 4, 2, 5, 3)
    y = y.reshape(n, channels // (th * tw), height * th, width * tw)
    return y[:, :, : height * th - rows, : width * tw - columns]


def _formed(y: Tensor, form: str) -> Tensor:
    match form:
        case "channels last":
            return y.permute(0, 2, 3, 1)
        case "tokens":
            return y.squeeze(2).transpose(1, 2)
    return y


def _attention(step: Attention, made: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    def heads(x: Tensor, first: int, size: int) -> Tensor:
        return x[:, first : first + step.heads * size, 0].unflatten(1, (step.heads, size)).transpose(2, 3)

    q = heads(made[step.q], step.first_q, step.size)
    k = heads(made[step.k], step.first_k, step.size)
    v = heads(made[step.v], step.first_v, step.v_size)
    scores = q @ k.transpose(2, 3) * step.scale
    if step.mask >= 0:
        scores = scores + inputs[step.mask]
    if step.causal:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    # Of a query that sees no key the result is zero, as torch's own attention has it.
    shares = scores.softmax(3).masked_fill((scores == -math.inf).all(3, keepdim=True), 0.0)
    return (shares @ v).transpose(2, 3).flatten(1, 2).unsqueeze(2)


def _around(taps: Taps) -> tuple[int, int, int, int]:
    above, below, left, right = taps.padding
    return left, right, above, below


def _pool(step: Pool, x: Tensor) -> Tensor:
    taps = step.taps
    if step.kind == "max":
        x = F.pad(x, _around(taps), value=-math.inf)
        return F.max_pool2d(x, taps.kernel, taps.stride, 0, taps.dilation)
    total = F.avg_pool2d(F.pad(x, _around(taps)), taps.kernel, taps.stride)
    if step.kind == "mean":
        return total
    inside = F.pad(torch.ones_like(x[:1, :1]), _around(taps))
    return total / F.avg_pool2d(inside, taps.kernel, taps.stride)


def _shapes(inputs: Sequence[Tensor], *packed_and_program: Any) -> list[Tensor]:
    """The outputs' shapes, for sizes that may be symbols."""
    shapes: list[tuple[Any, ...]] = []
    results: list[Tensor] = []
    images = inputs[0].shape[0]
    for step in decode(packed_and_program[-1]):
        match step:
            case Enter():
                given = inputs[step.input].shape
                shape = (given[2], 1, given[1]) if len(given) == 3 else tuple(given[1:])
            case Conv():
                shape = (step.rows, *step.taps.out(shapes[step.x][1:]))
            case Product():
                shape = (step.rows, *shapes[step.x][1:])
            case Depthwise() | Pool():
                channels, *size = shapes[step.x]
                shape = (channels, *step.taps.out(size))
            case Add() | Multiply() | Activate() | LayerNorm():
                shape = shapes[step.x]
            case Attention():
                shape = (step.heads * step.v_size, *shapes[step.q][1:])
            case Concat():
                shape = (sum(shapes[part][0] for part in step.parts), *shapes[step.parts[0]][1:])
            case Mean():
                shape = (shapes[step.x][0], 1, 1)
            case Repeat():
                channels, height, width = shapes[step.x]
                shape = (channels, height * step.times[0], width * step.times[1])
            case Shuffle():
                channels, height, width = shapes[step.x]
                (th, tw), (rows, columns) = step.times, step.cut
                shape = (channels // (th * tw), height * th - rows, width * tw - columns)
            case Exit():
                shape = channels, height, width = shapes[step.x]
                size = {"tokens": (width, channels), "channels last": (height, width, channels)}.get(step.form, shape)
                results.append(inputs[0].new_empty(images, *size))
        shapes.append(shape)
    return results


register(
    "net",
    "Tensor[] inputs, Tensor values, Tensor columns, Tensor order, Tensor counts, Tensor starts, Tensor dense, "
    "Tensor words, Tensor brains, int[] program",
    "Tensor[]",
    net_reference,
    _shapes,
)
