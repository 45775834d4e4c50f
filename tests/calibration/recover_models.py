"""Small models and data for the tests of recovery, and the clock that it reads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.calibration.batches import capture_for, read_calls
from fxprune.calibration.recover import train
from fxprune.couple.couple import couple
from fxprune.plan.patterns import Channels
from fxprune.plan.plan import Plan
from fxprune.select.decide import choose_selection
from fxprune.select.selection import Selection


class PostNorm(nn.Module):
    """Two blocks norm(x + b(relu(a(x))))."""

    def __init__(self, width: int = 16, inner: int = 32) -> None:
        super().__init__()
        self.enter = nn.Linear(8, width)
        self.a = nn.ModuleList(nn.Linear(width, inner) for _ in range(2))
        self.b = nn.ModuleList(nn.Linear(inner, width) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.leave = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.hidden(x)[-1])

    def hidden(self, x: Tensor) -> list[Tensor]:
        """What each block gives."""
        found = [self.enter(x)]
        for a, b, norm in zip(self.a, self.b, self.norm, strict=True):
            found.append(norm(found[-1] + b(torch.relu(a(found[-1])))))
        return found[1:]


class Decoder(nn.Module):
    """A pre-norm causal language model whose head is its embedding."""

    def __init__(self, words: int = 50, width: int = 16, heads: int = 4, layers: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(words, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(ids)
        allowed = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        if attention_mask is not None:
            allowed = allowed & (attention_mask != 0)[:, None, None, :]
        for layer, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = (
                t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for t in qkv(self.norms[2 * layer](x)).chunk(3, dim=-1)
            )
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
            x = x + out(mixed.transpose(1, 2).flatten(2))
            x = x + self.down[layer](functional.gelu(self.up[layer](self.norms[2 * layer + 1](x))))
        return {"logits": self.head(x), "argmax": self.head(x).argmax(-1)}


class ConvNet(nn.Module):
    """conv-bn-relu, and a residual block that adds in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.one_norm = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.two, self.two_norm = nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu_()
        y = self.two_norm(self.two(self.one_norm(self.one(x)).relu_()))
        y += x
        return self.head(y.relu_().mean((2, 3)))


def conv_net() -> ConvNet:
    """In eval mode, with statistics that a batch left."""
    model = ConvNet()
    model(torch.randn(64, 3, 6, 6))
    return model.eval()


def vectors(count: int = 20, size: int = 16, seed: int = 1) -> list[Tensor]:
    """Batches [size, 8]."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 8, generator=random) for _ in range(count)]


def texts(count: int = 12, lengths: Sequence[int] = (6, 9), seed: int = 1) -> list[dict[str, Tensor]]:
    """Batches of ids [4, s], s from `lengths` in turn; the last two positions of the second row are padding."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        ids = torch.randint(0, 50, (4, lengths[index % len(lengths)]), generator=random)
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0
        found.append({"ids": ids, "attention_mask": mask})
    return found


def images(count: int = 10, seed: int = 1) -> list[Tensor]:
    """Batches [8, 3, 6, 6]."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 6, 6, generator=random) for _ in range(count)]


def by_magnitude(model: nn.Module, plan: Plan, data: Sequence[Any]) -> Selection:
    """What a plan alone selects."""
    captured = capture_for(model, read_calls(data))
    asks = any(isinstance(rule.sparsity, Channels) for rule in plan.rules)
    coupling = couple(captured.program) if asks else None
    return choose_selection(captured, captured.program, plan, None, coupling).selection


def is_plus_zero(tensor: Tensor) -> bool:
    """Whether all elements are +0.0."""
    return bool((tensor == 0).all()) and not bool(tensor.signbit().any())


def same(a: Selection, b: Selection) -> bool:
    """Whether two recovered selections have the same values, bit for bit."""
    return a.values.keys() == b.values.keys() and all(torch.equal(a.values[n], b.values[n]) for n in a.values)


def set_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Has every look of recover at the clock be `seconds` after the one before, however long its steps take."""
    looks = itertools.count(1)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: seconds * next(looks)))
