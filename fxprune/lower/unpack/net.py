"""net: the steps of a net as ATen ops, one after another.

Tokens stay tokens [n, w, c] as long as their steps are linears and what is applied to each number; a map of them
[n, c, 1, w] is made where a step asks for one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.errors import InputError
from fxprune.graph.program import arguments
from fxprune.kernels.native import net
from fxprune.kernels.native.net import Finish, Step, Taps
from fxprune.kernels.native.segments import Segments

from .net_attention import write_heads
from .net_channels import channels_of
from .net_maps import pad, pool, shuffle
from .net_weights import as_transposed, by_groups
from .store import Writer

aten = torch.ops.aten
OP = torch.ops.fxprune.net.default
_PACKED = ("values", "columns", "order", "counts", "starts", "dense", "words", "brains")


@dataclasses.dataclass(frozen=True)
class _Value:
    """What a step makes: tokens or a map. `is_whole` says that it surely has all images, and not one for all."""

    node: Node
    is_tokens: bool
    is_whole: bool


def write_net(w: Writer) -> list[Node]:
    """The outputs of a net, each contiguous in its form."""
    return _Net(w).write()


class _Net:
    """One net on its way; `values` are those of the steps so far."""

    def __init__(self, w: Writer) -> None:
        given = arguments(w.node)
        packed = [given[name] for name in _PACKED]
        self.w, self.inputs = w, list(given["inputs"])
        self.tensors = {name: w.store.fetch(node) for name, node in zip(_PACKED, packed, strict=True)}
        self.steps = net.decode(given["program"])
        self.channels = channels_of(self.steps)
        self.holder = w.store.vacate(packed) or "net"
        self.values: list[_Value] = []
        self.transposed: set[int] = set()
        self.handed_out = set(self.inputs)
        self.outputs: list[Node] = []

    def write(self) -> list[Node]:
        for number, step in enumerate(self.steps):
            self.values.append(self._value(number, step))
        return self.outputs

    def _value(self, number: int, step: Step) -> _Value:
        match step:
            case net.Enter():
                node = self.inputs[step.input]
                return _Value(node, self._rank(node) == 3, step.input == 0 or self._is_whole(node))
            case net.Conv() | net.Product() | net.Depthwise():
                return self._convolve(number, step)
            case net.Pool():
                return self._of_map(step.x, lambda x: pool(self.w, step, x))
            case net.Add() | net.Multiply():
                return self._combine(step)
            case net.Activate():
                x = self.values[step.x]
                return dataclasses.replace(x, node=self._finish(x.node, step.finish))
            case net.Concat():
                parts = [self._map(self._whole(part)) for part in step.parts]
                return _Value(self.w.call(aten.cat.default, parts, 1), False, True)
            case net.Mean():
                return self._of_map(step.x, lambda x: self.w.call(aten.mean.dim, x, [2, 3], True))
            case net.Repeat():
                scales = [float(times) for times in step.times]
                return self._of_map(step.x, lambda x: self.w.call(aten.upsample_nearest2d.vec, x, None, scales))
            case net.Shuffle():
                # It is part of the transposed convolution that was written for the one before it.
                if step.x in self.transposed:
                    return self.values[step.x]
                return self._of_map(step.x, lambda x: shuffle(self.w, step, x))
            case net.LayerNorm():
                return self._layer_norm(number, step)
            case net.Attention():
                q, k, v = (self._tokens(self._whole(x)) for x in (step.q, step.k, step.v))
                mask = self.inputs[step.mask] if step.mask >= 0 else None
                return _Value(write_heads(self.w, step, (q, k, v), mask), True, True)
            case net.Exit():
                self.outputs.append(self._exit(step))
                return self.values[step.x]

    def _exit(self, step: net.Exit) -> Node:
        value = self._whole(step.x)
        if step.form == "tokens":
            y = self._tokens(value)
        else:
            y = self._map(value)
            y = self.w.call(aten.permute.default, y, [0, 2, 3, 1]) if step.form == "channels last" else y
        # Whoever writes to one output must not write to another, or to an input.
        made = self.values[step.x].node
        if made in self.handed_out:
            return self.w.call(aten.clone.default, y, memory_format=torch.contiguous_format)
        self.handed_out.add(made)
        return self.w.call(aten.contiguous.default, y)

    def _rank(self, node: Node) -> int:
        """Dimensions of an input. lower makes nets of tokens alone or of maps alone, which their outputs tell apart."""
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return value.dim()
        if node.op == "get_attr":
            return self.w.store.fetch(node).dim()
        return 3 if any(isinstance(step, net.Exit) and step.form == "tokens" for step in self.steps) else 4

    def _is_whole(self, node: Node) -> bool:
        return node.op == "get_attr" and len(self.w.store.fetch(node)) != 1

    def _whole(self, x: int) -> _Value:
        """The value of a step with all images."""
        value = self.values[x]
        if value.is_whole:
            return value
        images = self.w.call(aten.sym_size.int, self.inputs[0], 0)
        rest = [-1] * (2 if value.is_tokens else 3)
        return _Value(self.w.call(aten.expand.default, value.node, [images, *rest]), value.is_tokens, True)

    def _map(self, value: _Value) -> Node:
        if not value.is_tokens:
            return value.node
        lines = self.w.call(aten.transpose.int, value.node, 1, 2)
        return self.w.call(aten.unsqueeze.default, lines, 2)

    def _tokens(self, value: _Value) -> Node:
        if value.is_tokens:
            return value.node
        return self.w.call(aten.transpose.int, self.w.call(aten.squeeze.dim, value.node, 2), 1, 2)

    def _of_map(self, x: int, make: Callable[[Node], Node]) -> _Value:
        value = self.values[x]
        return _Value(make(self._map(value)), False, value.is_whole)

    def _alike(self, *steps: int) -> tuple[list[Node], bool]:
        """The values of these steps, as tokens if all are, else as maps; and whether as tokens."""
        values = [self.values[x] for x in steps]
        as_tokens = all(value.is_tokens for value in values)
        return [value.node if as_tokens else self._map(value) for value in values], as_tokens

    def _combine(self, step: net.Add | net.Multiply) -> _Value:
        nodes, as_tokens = self._alike(step.x, step.other)
        op = aten.add.Tensor if isinstance(step, net.Add) else aten.mul.Tensor
        y = self._finish(self.w.call(op, *nodes), step.finish)
        return _Value(y, as_tokens, self._any_whole(step.x, step.other))

    def _any_whole(self, *steps: int) -> bool:
        return any(self.values[x].is_whole for x in steps if x >= 0)

    def _convolve(self, number: int, step: net.Conv | net.Product | net.Depthwise) -> _Value:
        others = [step.residual] if step.residual >= 0 else []
        (x, *added), as_tokens = self._alike(step.x, *others)
        if isinstance(step, net.Product):
            # What it reads is rounded.
            narrow = self.w.call(aten._to_copy.default, x, dtype=torch.bfloat16)
            x = self.w.call(aten._to_copy.default, narrow, dtype=torch.float32)
        weight, taps = self._weight(step)
        bias = self._vector(step.bias, len(weight))
        if as_tokens and taps == Taps() and not isinstance(step, net.Depthwise):
            held = self._hold(number, "linear", weight[:, :, 0, 0], bias)
            y = self.w.call(aten.linear.default, x, *held)
        else:
            if as_tokens:
                (x, *added) = [self._map(_Value(each, True, True)) for each in (x, *added)]
            y, as_tokens = self._on_map(number, step, x, weight, bias, taps), False
        y = self._finish(y, step.finish, added[0] if added else None)
        return _Value(y, as_tokens, self._any_whole(step.x, step.residual))

    def _on_map(
        self, number: int, step: Step, x: Node, weight: Tensor, bias: Tensor | None, taps: Taps
    ) -> Node:  # fmt: skip
        after = self._shuffle_after(number)
        found = as_transposed(weight, bias, taps, after) if after is not None else None
        if found is not None:
            self.transposed.add(number)
            held = self._hold(number, "conv_transpose", found.weight, found.bias)
            how = (found.stride, found.padding, found.output_padding, found.groups)
            return self.w.call(aten.conv_transpose2d.input, x, *held, *how)
        kind, groups = "conv", 1
        if isinstance(step, net.Depthwise):
            kind, groups = "depthwise", step.channels
        else:
            weight, groups = by_groups(weight)
        held = self._hold(number, kind, weight, bias)
        x, around = pad(self.w, x, taps)
        return self.w.call(aten.conv2d.default, x, *held, list(taps.stride), around, list(taps.dilation), groups)

    def _weight(self, step: net.Conv | net.Product | net.Depthwise) -> tuple[Tensor, Taps]:
        """The weight [o, i, kh, kw] in float32, and how it lies."""
        t = self.tensors
        if isinstance(step, net.Depthwise):
            size = step.channels * math.prod(step.taps.kernel)
            return t["dense"][step.weight :][:size].view(-1, 1, *step.taps.kernel), step.taps
        if isinstance(step, net.Product):
            weight = net.panels_of(step, t["words"], t["brains"], t["starts"])
            return weight.float()[:, :, None, None], Taps()
        packed = Segments(*(t[name] for name in Segments._fields))
        return net.weight_of(step, packed), step.taps

    def _vector(self, at: int, size: int) -> Tensor | None:
        return None if at < 0 else self.tensors["dense"][at : at + size]

    def _hold(self, number: int, kind: str, weight: Tensor | None, bias: Tensor | None) -> list[Node | None]:
        """Nodes that read what is put into the program for a step; None for what there is not."""
        name = f"{self.holder}.{kind}_{number}"
        given = (("weight", weight), ("bias", bias))
        return [
            None if value is None else self.w.read(self.w.store.put(f"{name}.{leaf}", value.clone().contiguous()))
            for leaf, value in given
        ]

    def _shuffle_after(self, number: int) -> net.Shuffle | None:
        """The step that alone reads a convolution's map, if it is a shuffle and nothing is added before."""
        conv = self.steps[number]
        if not isinstance(conv, (net.Conv, net.Product)) or conv.residual >= 0:
            return None
        step, *more = [step for step in self.steps if number in _read_by(step)] or [None]
        return step if isinstance(step, net.Shuffle) and not more else None

    def _layer_norm(self, number: int, step: net.LayerNorm) -> _Value:
        channels, value = self.channels[number], self.values[step.x]
        if channels is None:
            raise InputError(
                "cannot unpack a net",
                where=f"node {self.w.node.name}, step {number}",
                why="nothing in it says how many channels are normalised",
                do="Transform the model again.",
            )
        held = self._hold(number, "layer_norm", self._vector(step.weight, channels), self._vector(step.bias, channels))
        last = value.node if value.is_tokens else self.w.call(aten.permute.default, value.node, [0, 2, 3, 1])
        y = self.w.call(aten.layer_norm.default, last, [channels], *held, step.epsilon)
        y = y if value.is_tokens else self.w.call(aten.permute.default, y, [0, 3, 1, 2])
        return dataclasses.replace(value, node=y)

    def _finish(self, y: Node, finish: Finish, residual: Node | None = None) -> Node:
        """The activation and the residual, in their order."""
        if residual is not None and not finish.adds_last:
            y = self.w.call(aten.add.Tensor, y, residual)
        bounds = [bound if math.isfinite(bound) else None for bound in (finish.low, finish.high)]
        if finish.activation != "relu" or bounds == [0.0, None]:
            y = self.w.activate(y, finish.activation)
        elif bounds != [None, None]:
            y = self.w.call(aten.clamp.default, y, *bounds)
        if residual is not None and finish.adds_last:
            y = self.w.call(aten.add.Tensor, y, residual)
        return y


def _read_by(step: Step) -> set[int]:
    """The steps that a step reads."""
    fields: dict[str, Any] = vars(step)
    named = {fields[name] for name in ("x", "other", "residual", "q", "k", "v") if name in fields}
    return named | set(fields.get("parts", ()))
