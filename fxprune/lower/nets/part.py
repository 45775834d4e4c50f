"""part: an op of the graph as a step of a net, and which tensors are maps."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.kernels.native.net import Finish, Taps

from .transposed import Transposed

_ONE, _AS_IT_IS = Taps(), Finish()
# Kinds whose weights are stored by their nonzeros.
WEIGHED = ("conv", "transposed conv", "linear")
# In bfloat16 a net computes as in float32, or multiplies by tiles, and rounds what it hands out.
DTYPES = (torch.float32, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of an attention: how many, channels of each in q and k and in v, the first channels of q, k and v."""

    count: int
    size: int
    v_size: int
    firsts: tuple[int, int, int]
    causal: bool
    scale: float


@dataclasses.dataclass(frozen=True)
class Part:
    """An op as a step of a net: its kind, the maps that it reads, and how a kernel lies or what is applied.

    `inside` are nodes before it that it stands for as well, such as the views around an attention. A `transposed`
    weight is [i, o]. A transposed convolution has the plain one, of so many groups, in `as_plain`.
    """

    # conv, depthwise, transposed conv, linear, max, mean, mean inside, add, multiply, activate, concat, global mean,
    # repeat, shuffle, layer norm, attention
    kind: str
    maps: tuple[Node, ...]
    taps: Taps = _ONE
    finish: Finish = _AS_IT_IS
    weight: Node | None = None
    bias: Node | None = None
    times: tuple[int, int] = (1, 1)
    transposed: bool = False
    as_plain: Transposed | None = None
    groups: int = 1
    epsilon: float = 0.0
    heads: Heads | None = None
    mask: Node | None = None
    inside: tuple[Node, ...] = ()

    @property
    def sources(self) -> tuple[Node, ...]:
        """What it reads of the graph, constants aside."""
        return self.maps if self.mask is None else (*self.maps, self.mask)


def is_map(node: Any) -> bool:
    """Whether the node has images [n, c, h, w] in one of DTYPES on the CPU, of known channels, and some places each."""
    return _is_float(node, 4) and isinstance(node.meta["val"].shape[1], int)


def is_tokens(node: Any) -> bool:
    """Whether the node has tokens [n, w, c] in one of DTYPES on the CPU, of known channels."""
    return _is_float(node, 3) and isinstance(node.meta["val"].shape[2], int)


def _is_float(node: Any, dims: int) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor) or value.dim() != dims or value.dtype not in DTYPES:
        return False
    return value.device.type == "cpu" and 0 not in value.shape[1:]


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of a node's tensor."""
    return node.meta["val"].dtype


def channels_of(node: Node) -> int:
    """Channels of a map or of tokens."""
    shape = node.meta["val"].shape
    return shape[1] if len(shape) == 4 else shape[2]
