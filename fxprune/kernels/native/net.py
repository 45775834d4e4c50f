"""fxprune::conv_net: a part of a graph around convolutions, computed in one call on maps whose pixels lie in lanes.

A net is a list of steps; each makes one value, and names the values it reads by their steps' numbers. `encode` writes
it as the integers that the op takes, and the kernel (net.cpp) plans it for the sizes of each call. `conv_net_reference`
says in plain torch what a net computes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.errors import InputError

from . import register, segments
from .segments import Segments

VERSION = 1
# Widths of tiles that there are kernels for (conv_rows.h).
TILES = (1, 2, 4, 7, 8)
# In the order of activations.h; relu is a clamp to [low, high].
ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "hardsigmoid", "hardswish")
POOLS = ("max", "mean", "mean inside")


@dataclasses.dataclass(frozen=True)
class Taps:
    """How a kernel lies over a map: its size, strides, zeros around the map, and steps between its taps."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # above, below, left, right
    dilation: tuple[int, int] = (1, 1)

    def columns(self, tile: int) -> list[int]:
        """The columns of the input, from the first output's, that a tile reads, in the order of its block."""
        result: list[int] = []
        (_, width), (_, stride), (_, step) = self.kernel, self.stride, self.dilation
        for phase in range(stride):
            most = max((k * step // stride for k in range(width) if k * step % stride == phase), default=None)
            if most is not None:
                result += [q * stride + phase for q in range(tile + most)]
        return result

    def offsets(self, tile: int) -> list[int]:
        """The vector of each tap in a channel's block."""
        columns = self.columns(tile)
        at = [columns.index(b * self.dilation[1]) for b in range(self.kernel[1])]
        return [a * len(columns) + b for a in range(self.kernel[0]) for b in at]

    def places(self, tile: int) -> int:
        """Vectors of a channel's block."""
        return self.kernel[0] * len(self.columns(tile))

    def out(self, size: Sequence[Any]) -> tuple[Any, Any]:
        """Height and width of what a map of this height and width becomes."""
        above, below, left, right = self.padding
        reach = [step * (k - 1) + 1 for step, k in zip(self.dilation, self.kernel, strict=True)]
        rows, columns = size[0] + above + below - reach[0], size[1] + left + right - reach[1]
        return rows // self.stride[0] + 1, columns // self.stride[1] + 1

    def integers(self) -> list[int]:
        """As a program has them."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Taps:
        """From a program's."""
        kh, kw, sh, sw, above, below, left, right, dh, dw = numbers
        return cls((kh, kw), (sh, sw), (above, below, left, right), (dh, dw))


@dataclasses.dataclass(frozen=True)
class Finish:
    """An activation; relu clamps to [low, high]. `adds_last` says that a residual comes after it."""

    activation: str = ""
    low: float = 0.0
    high: float = math.inf
    adds_last: bool = False

    def integers(self) -> list[int]:
        """As a program has them."""
        return [ACTIVATIONS.index(self.activation), _bits(self.low), _bits(self.high)]

    @classmethod
    def of(cls, numbers: Sequence[int], *, adds_last: int = 0) -> Finish:
        """From a program's."""
        activation, low, high = numbers
        return cls(ACTIVATIONS[activation], _float(low), _float(high), bool(adds_last))

    def apply(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """The activation and the residual, in their order."""
        if residual is not None and not self.adds_last:
            y = y + residual
        y = y.clamp(self.low, self.high) if self.activation == "relu" else _FUNCTIONS[self.activation](y)
        return y + residual if residual is not None and self.adds_last else y


_FUNCTIONS: dict[str, Any] = {
    "": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
}


def _bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


@dataclasses.dataclass(frozen=True)
class Enter:
    """Input number `input` [n, c, h, w] becomes a map."""

    input: int
    tile: int = 7
    code: ClassVar[int] = 0


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution by nonzeros; `rows` and `channels` are those of its weight, the rest says where it is stored.

    `k_block` counts channels. `bias` is -1 where there is none, and so is `residual`.
    """

    x: int
    rows: int
    channels: int
    taps: Taps
    row_block: int
    k_block: int
    residual: int = -1
    first_value: int = 0
    first_segment: int = 0
    first_start: int = 0
    bias: int = -1
    finish: Finish = Finish()
    tile: int = 7
    code: ClassVar[int] = 1


@dataclasses.dataclass(frozen=True)
class Depthwise:
    """A convolution of each channel by its own taps, which stand densely at `weight`."""

    x: int
    channels: int
    taps: Taps
    residual: int = -1
    weight: int = 0
    bias: int = -1
    finish: Finish = Finish()
    tile: int = 7
    code: ClassVar[int] = 2


@dataclasses.dataclass(frozen=True)
class Pool:
    """The greatest or the mean; "mean inside" counts no zeros around the map."""

    kind: str
    x: int
    taps: Taps
    tile: int = 7
    code: ClassVar[int] = 3


@dataclasses.dataclass(frozen=True)
class Add:
    """x + other; `other` may be a map of one place."""

    x: int
    other: int
    finish: Finish = Finish()
    tile: int = 1
    code: ClassVar[int] = 4


@dataclasses.dataclass(frozen=True)
class Multiply:
    """x * other; `other` may be a map of one place."""

    x: int
    other: int
    finish: Finish = Finish()
    tile: int = 1
    code: ClassVar[int] = 5


@dataclasses.dataclass(frozen=True)
class Activate:
    """An activation alone."""

    x: int
    finish: Finish
    tile: int = 1
    code: ClassVar[int] = 6


@dataclasses.dataclass(frozen=True)
class Concat:
    """Maps joined along their channels."""

    parts: tuple[int, ...]
    tile: int = 1
    code: ClassVar[int] = 7


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean over all places, as a map of one."""

    x: int
    tile: int = 1
    code: ClassVar[int] = 8


@dataclasses.dataclass(frozen=True)
class Exit:
    """A map becomes the next output: [n, c, h, w], or [n, h, w, c] where `channels_last`."""

    x: int
    channels_last: bool = False
    tile: int = 1
    code: ClassVar[int] = 9


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Each row and each column of a map that many times: what torch calls upsampling to the nearest."""

    x: int
    times: tuple[int, int]
    tile: int = 7
    code: ClassVar[int] = 10


Step = Enter | Conv | Depthwise | Pool | Add | Multiply | Activate | Concat | Mean | Exit | Repeat


def _arguments(step: Step) -> list[int]:
    match step:
        case Enter():
            return [step.input]
        case Conv():
            where = [step.row_block, step.k_block, step.first_value, step.first_segment, step.first_start, step.bias]
            finish = [*step.finish.integers(), int(step.finish.adds_last)]
            return [step.x, step.residual, step.rows, step.channels, *step.taps.integers(), *where, *finish]
        case Depthwise():
            finish = [*step.finish.integers(), int(step.finish.adds_last)]
            return [step.x, step.residual, step.channels, *step.taps.integers(), step.weight, step.bias, *finish]
        case Pool():
            return [POOLS.index(step.kind), step.x, *step.taps.integers()]
        case Add() | Multiply():
            return [step.x, step.other, *step.finish.integers()]
        case Activate():
            return [step.x, *step.finish.integers()]
        case Concat():
            return list(step.parts)
        case Mean():
            return [step.x]
        case Exit():
            return [step.x, int(step.channels_last)]
        case Repeat():
            return [step.x, *step.times]


def encode(steps: Sequence[Step]) -> list[int]:
    """The program of these steps."""
    program = [VERSION, len(steps)]
    for step in steps:
        arguments = _arguments(step)
        program += [step.code, step.tile, len(arguments), *arguments]
    return program


def decode(program: Sequence[int]) -> list[Step]:
    """The steps of a program. Raises InputError where it is none."""
    steps: list[Step] = []
    try:
        version, count, *rest = program
        if version != VERSION:
            raise ValueError(f"version {version}")
        numbers = iter(rest)
        for _ in range(count):
            code, tile, many = itertools.islice(numbers, 3)
            arguments = list(itertools.islice(numbers, many))
            if len(arguments) < many:
                raise ValueError("it ends too early")
            steps.append(_step(code, tile, arguments))
        if next(numbers, None) is not None:
            raise ValueError("it goes on after its last step")
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise InputError("conv_net got a program that it cannot read", why=str(error)) from error
    return steps


def _step(code: int, tile: int, a: list[int]) -> Step:
    match code:
        case Enter.code:
            (source,) = a
            return Enter(source, tile)
        case Conv.code:
            taps, where, finish = Taps.of(a[4:14]), a[14:20], Finish.of(a[20:23], adds_last=a[23])
            rows, channels, value, segment, start, bias = where
            blocks = (rows, channels, a[1], value, segment, start, bias)
            return Conv(a[0], a[2], a[3], taps, *blocks, finish, tile)
        case Depthwise.code:
            finish = Finish.of(a[15:18], adds_last=a[18])
            return Depthwise(a[0], a[2], Taps.of(a[3:13]), a[1], a[13], a[14], finish, tile)
        case Pool.code:
            return Pool(POOLS[a[0]], a[1], Taps.of(a[2:]), tile)
        case Add.code:
            return Add(a[0], a[1], Finish.of(a[2:]), tile)
        case Multiply.code:
            return Multiply(a[0], a[1], Finish.of(a[2:]), tile)
        case Activate.code:
            return Activate(a[0], Finish.of(a[1:]), tile)
        case Concat.code:
            return Concat(tuple(a), tile)
        case Mean.code:
            (x,) = a
            return Mean(x, tile)
        case Exit.code:
            x, last = a
            return Exit(x, bool(last), tile)
        case Repeat.code:
            x, down, right = a
            return Repeat(x, (down, right), tile)
    raise ValueError(f"there is no step {code}")


def pack(weight: Tensor, taps: Taps, tile: int, row_block: int, k_block: int) -> Segments:
    """The nonzeros of a weight [o, i, kh, kw], for tiles of this width; `columns` are vectors of the block."""
    o, i, kh, kw = weight.shape
    packed = segments.pack(weight.reshape(o, i * kh * kw), row_block, k_block * kh * kw)
    return packed._replace(columns=_table(taps, tile, k_block)[packed.columns.long()])


def unpack(packed: Segments, shape: Sequence[int], taps: Taps, tile: int, row_block: int, k_block: int) -> Tensor:
    """The weight [o, i, kh, kw], bit for bit as it was packed."""
    o, i = shape
    table = _table(taps, tile, k_block).long() & 0xFFFF
    column = torch.full((k_block * taps.places(tile),), -1, dtype=torch.int16)
    column[table] = torch.arange(len(table), dtype=torch.int16)
    columns = column[packed.columns.long() & 0xFFFF]
    per = math.prod(taps.kernel)
    dense = segments.unpack(packed._replace(columns=columns), (o, i * per), row_block, k_block * per)
    return dense.view(o, i, *taps.kernel)


def _table(taps: Taps, tile: int, k_block: int) -> Tensor:
    """The vector of each (channel, tap) of a K-block, as the bits of a 16-bit integer without sign."""
    offsets, places = torch.tensor(taps.offsets(tile)), taps.places(tile)
    table = torch.arange(k_block).unsqueeze(1) * places + offsets
    if int(table.max()) > 0xFFFF or table.numel() > 0x7FFF:
        why = f"{k_block} channels of {places} vectors and {len(offsets)} taps do not fit 16-bit numbers"
        raise InputError("a K-block is too large", why=why)
    return table.flatten().to(torch.int16)


def weight_of(step: Conv, packed: Segments) -> Tensor:
    """The weight [o, i, kh, kw] of one convolution of a net, from the packed tensors of all."""
    row_blocks, k_blocks = -(-step.rows // step.row_block), -(-step.channels // step.k_block)
    starts = packed.starts[step.first_start :][: row_blocks * k_blocks + 1]
    values = slice(step.first_value, step.first_value + int(starts[-1]))
    ranks = slice(step.first_segment, step.first_segment + step.rows * k_blocks)
    own = Segments(packed.values[values], packed.columns[values], packed.order[ranks], packed.counts[ranks], starts)
    return unpack(own, (step.rows, step.channels), step.taps, step.tile, step.row_block, step.k_block)


def conv_net_reference(
    inputs: Sequence[Tensor], values: Tensor, columns: Tensor, order: Tensor, counts: Tensor, starts: Tensor,
    dense: Tensor, program: Sequence[int],
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
            case Exit():
                y = made[step.x]
                results.append(
                    (y.permute(0, 2, 3, 1) if step.channels_last else y).clone(memory_format=torch.contiguous_format)
                )
        made.append(y)
    return results


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
                shape = tuple(inputs[step.input].shape[1:])
            case Conv():
                shape = (step.rows, *step.taps.out(shapes[step.x][1:]))
            case Depthwise() | Pool():
                channels, *size = shapes[step.x]
                shape = (channels, *step.taps.out(size))
            case Add() | Multiply() | Activate():
                shape = shapes[step.x]
            case Concat():
                shape = (sum(shapes[part][0] for part in step.parts), *shapes[step.parts[0]][1:])
            case Mean():
                shape = (shapes[step.x][0], 1, 1)
            case Repeat():
                channels, height, width = shapes[step.x]
                shape = (channels, height * step.times[0], width * step.times[1])
            case Exit():
                shape = channels, height, width = shapes[step.x]
                size = (height, width, channels) if step.channels_last else shape
                results.append(inputs[0].new_empty(images, *size))
        shapes.append(shape)
    return results


register(
    "conv_net",
    "Tensor[] inputs, Tensor values, Tensor columns, Tensor order, Tensor counts, Tensor starts, Tensor dense, "
    "int[] program",
    "Tensor[]",
    conv_net_reference,
    _shapes,
)
