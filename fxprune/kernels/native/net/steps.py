"""steps: what a net is made of. Each step makes one value, and names those it reads by their steps' numbers.

A step's `tile` is the width of the tiles of its map.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from .taps import Finish, Taps

# Widths of tiles that there are kernels for (conv_rows.h).
TILES = (1, 2, 4, 7, 8)
AS_IT_IS = Finish()
POOLS = ("max", "mean", "mean inside")
# How an output stands in memory; "tokens" is [n, w, c] of a map of one row.
FORMS = ("channels first", "channels last", "tokens")


@dataclasses.dataclass(frozen=True)
class Enter:
    """Input number `input`, [n, c, h, w] or tokens [n, w, c], becomes a map; one image stands for all."""

    input: int
    tile: int = 7
    code: ClassVar[int] = 0


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution by nonzeros; `rows` and `channels` are those of its weight, the rest says where it is stored.

    `k_block` counts channels, and `values` nonzeros. `bias` is -1 where there is none, and so is `residual`.
    """

    x: int
    rows: int
    channels: int
    taps: Taps
    row_block: int
    k_block: int
    residual: int = -1
    first_value: int = 0
    values: int = 0
    first_segment: int = 0
    first_start: int = 0
    bias: int = -1
    finish: Finish = AS_IT_IS
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
    finish: Finish = AS_IT_IS
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
    finish: Finish = AS_IT_IS
    tile: int = 1
    code: ClassVar[int] = 4


@dataclasses.dataclass(frozen=True)
class Multiply:
    """x * other; `other` may be a map of one place."""

    x: int
    other: int
    finish: Finish = AS_IT_IS
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
    """A map becomes the next output, in one of FORMS: [n, c, h, w], [n, h, w, c] or [n, w, c]."""

    x: int
    form: str = FORMS[0]
    tile: int = 1
    code: ClassVar[int] = 9


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Each row and each column of a map that many times: what torch calls upsampling to the nearest."""

    x: int
    times: tuple[int, int]
    tile: int = 7
    code: ClassVar[int] = 10


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """Each place less its mean over the channels, by its deviation; `weight` and `bias` are -1 where there is none."""

    x: int
    weight: int = -1
    bias: int = -1
    epsilon: float = 1e-5
    tile: int = 1
    code: ClassVar[int] = 11


@dataclasses.dataclass(frozen=True)
class Attention:
    """softmax(scale * q k^T + mask) v over the tokens of maps of one row, head by head.

    A head is `size` channels of q and k and `v_size` of v; the first begins at channel `first_q`, `first_k`, `first_v`.
    `mask` is the number of an input [n or 1, heads or 1, queries or 1, keys or 1], -1 for none. `causal` hides later
    keys. Where it `rounds`, products may be of bfloat16 numbers.
    """

    q: int
    k: int
    v: int
    heads: int
    size: int
    v_size: int
    first_q: int = 0
    first_k: int = 0
    first_v: int = 0
    mask: int = -1
    causal: bool = False
    rounds: bool = False
    scale: float = 1.0
    tile: int = 1
    code: ClassVar[int] = 12


@dataclasses.dataclass(frozen=True)
class Shuffle:
    """Channels become places: (y, x) of channel c * th * tw + a * tw + b is (y * th + a, x * tw + b) of channel c.

    Of the last rows and columns `cut` are left out. It is torch's pixel_shuffle, and the end of a transposed
    convolution.
    """

    x: int
    times: tuple[int, int]
    cut: tuple[int, int] = (0, 0)
    tile: int = 7
    code: ClassVar[int] = 13


@dataclasses.dataclass(frozen=True)
class Product:
    """A linear, or a convolution of one tap, in bfloat16: what it reads is rounded, sums are in float32.

    Its weight is stored by bits and `values` bfloat16 values (weights.py); `bias` and `residual` are -1 for none.
    """

    x: int
    rows: int
    channels: int
    residual: int = -1
    first_value: int = 0
    values: int = 0
    first_word: int = 0
    first_start: int = 0
    bias: int = -1
    finish: Finish = AS_IT_IS
    tile: int = 1
    code: ClassVar[int] = 14


Step = (
    Enter
    | Conv
    | Depthwise
    | Pool
    | Add
    | Multiply
    | Activate
    | Concat
    | Mean
    | Exit
    | Repeat
    | LayerNorm
    | Attention
    | Shuffle
    | Product
)
