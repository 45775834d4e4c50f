"""net_case: a net put together step by step with random weights, and how it is held against plain torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fxprune.kernels.native import net
from fxprune.kernels.native.net import Step, Taps
from fxprune.kernels.native.segments import Segments

op = torch.ops.fxprune.net.default


@dataclasses.dataclass
class Made:
    """A net with its weights, and the shape [c, h, w] of each of its values."""

    generator: torch.Generator
    steps: list[Step] = dataclasses.field(default_factory=list)
    shapes: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    packed: list[Segments] = dataclasses.field(default_factory=list)
    panels: list[net.Panels] = dataclasses.field(default_factory=list)
    dense: list[Tensor] = dataclasses.field(default_factory=list)
    all_starts: list[Tensor] = dataclasses.field(default_factory=list)

    def _starts(self) -> int:
        return sum(map(len, self.all_starts))

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)

    def add(self, step: Step, shape: tuple[int, int, int]) -> int:
        self.steps.append(step)
        self.shapes.append(shape)
        return len(self.steps) - 1

    def put_dense(self, values: Tensor) -> int:
        self.dense.append(values.flatten())
        return sum(each.numel() for each in self.dense[:-1])

    def conv(
        self, x: int, rows: int, taps: Taps, *, zeros: float = 0.6, blocks: tuple[int, int] = (4, 3), bias: bool = True,
        **more: Any,
    ) -> int:  # fmt: skip
        channels, *size = self.shapes[x]
        weight = self.random(rows, channels, *taps.kernel)
        weight[torch.rand(weight.shape, generator=self.generator) < zeros] = 0.0
        tile = more.setdefault("tile", 4)
        packed = net.pack(weight, taps, tile, *blocks)
        where = [sum(field(p).numel() for p in self.packed) for field in (_values, _order)]
        where.append(self._starts())
        self.packed.append(packed)
        self.all_starts.append(packed.starts)
        at = self.put_dense(self.random(rows)) if bias else -1
        step = net.Conv(
            x, rows, channels, taps, *blocks, first_value=where[0], values=packed.values.numel(),
            first_segment=where[1], first_start=where[2], bias=at, **more,
        )  # fmt: skip
        return self.add(step, (rows, *taps.out(size)))

    def product(self, x: int, rows: int, *, zeros: float = 0.6, bias: bool = True, **more: Any) -> int:
        channels, *size = self.shapes[x]
        weight = self.random(rows, channels)
        weight[torch.rand(weight.shape, generator=self.generator) < zeros] = 0.0
        packed = net.pack_panels(weight.bfloat16())
        value, word = (sum(len(p[field]) for p in self.panels) for field in (1, 0))
        at = self.put_dense(self.random(rows)) if bias else -1
        where = {"first_value": value, "values": len(packed.values), "first_word": word, "first_start": self._starts()}
        self.panels.append(packed)
        self.all_starts.append(packed.starts)
        return self.add(net.Product(x, rows, channels, bias=at, **where, **more), (rows, *size))

    def depthwise(self, x: int, taps: Taps, **more: Any) -> int:
        channels, *size = self.shapes[x]
        at, bias = self.put_dense(self.random(channels, *taps.kernel)), self.put_dense(self.random(channels))
        step = net.Depthwise(x, channels, taps, weight=at, bias=bias, **more)
        return self.add(step, (channels, *taps.out(size)))

    def arguments(self, inputs: list[Tensor], **limits: int) -> tuple[Any, ...]:
        empty = Segments(torch.zeros(0), *(torch.zeros(0, dtype=torch.int16),) * 3, torch.zeros(0, dtype=torch.int64))
        tensors = [torch.cat(parts) for parts in zip(*(self.packed or [empty]))]
        tensors[-1] = torch.cat(self.all_starts or [empty.starts])
        dense = torch.cat(self.dense) if self.dense else torch.zeros(0)
        words = torch.cat([torch.zeros(0, dtype=torch.int32), *(p.words for p in self.panels)])
        brains = torch.cat([*(p.values for p in self.panels), torch.zeros(32, dtype=torch.bfloat16)])
        return inputs, *tensors, dense, words, brains, net.encode(self.steps, **limits)


def _values(packed: Segments) -> Tensor:
    return packed.values


def _order(packed: Segments) -> Tensor:
    return packed.order


def started(channels: int, height: int, width: int, tile: int = 4, seed: int = 0) -> Made:
    made = Made(torch.Generator().manual_seed(seed))
    made.add(net.Enter(0, tile), (channels, height, width))
    return made


def agrees(made: Made, inputs: list[Tensor], **limits: int) -> None:
    arguments = made.arguments(inputs, **limits)
    got, wanted = op(*arguments), net.net_reference(*arguments)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert a.shape == b.shape and a.stride() == b.stride()
        # Sums of a few hundred products, through a few steps.
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * max(1.0, float(b.abs().max()) if b.numel() else 1.0))
