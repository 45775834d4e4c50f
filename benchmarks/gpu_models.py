"""Whole models on a GPU: what `transform` makes of them, against the best of torch.compile, for `benchmarks.gpu`.

A decoder of Llama's shape (the layers of Llama 3.1 8B, four of them, random weights) decodes one token behind 512
others, and reads 2048 at once; ResNet-50, ViT-B/16 and the decoder lose half of their channels. Both sides are compiled
with mode "max-autotune" and run as CUDA graphs, the dense one on the same pruned weights. Each result is held against
the pruned model before it is timed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from benchmarks.by_hand import RESNET50, VIT_B16, ResNet, ViT
from fxprune import Blocks, Channels, Plan, Rule, SemiStructured, Unstructured

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Widths:
    """A decoder: residual features, hidden ones, heads, heads of keys and values, layers, and words."""

    width: int
    ffn: int
    heads: int
    shared: int
    layers: int
    words: int


LLAMA = Widths(4096, 14336, 32, 8, 4, 32000)
SMALL = Widths(512, 1024, 8, 2, 2, 1000)


class Attention(nn.Module):
    """Grouped attention behind keys and values of earlier tokens."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.head = widths.width // widths.heads
        self.q, self.o = (nn.Linear(widths.width, widths.width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(widths.width, widths.shared * self.head, bias=False) for _ in range(2))

    def forward(self, x: Tensor, past: Tensor, angles: Tensor) -> Tensor:
        """x [b, t, width], past [2, b, shared, p, head], angles [t, head / 2] -> [b, t, width]."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = turn(q, angles), turn(k, angles)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past.shape[3] == 0, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


def angles(place: Tensor, head: int) -> Tensor:
    """Places [t] -> angles [t, head / 2] of the pairs of a head's features."""
    return place.unsqueeze(1) * 5e5 ** (-torch.arange(head // 2, device=place.device) / (head // 2))


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: x [..., t, head] turned by angles [t, head / 2]."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.before, self.between = (nn.RMSNorm(widths.width) for _ in range(2))
        self.attention = Attention(widths)
        self.gate, self.up = (nn.Linear(widths.width, widths.ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(widths.ffn, widths.width, bias=False)

    def forward(self, x: Tensor, past: Tensor, angles: Tensor) -> Tensor:
        """x [b, t, width] -> [b, t, width]."""
        x = x + self.attention(self.before(x), past, angles)
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A decoder of Llama's shape; the last token's logits."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths
        self.table = nn.Embedding(widths.words, widths.width)
        self.layers = nn.ModuleList(Layer(widths) for _ in range(widths.layers))
        self.norm, self.words = nn.RMSNorm(widths.width), nn.Linear(widths.width, widths.words, bias=False)

    def forward(self, ids: Tensor, past: Tensor) -> Tensor:
        """ids [b, t], past [layers, 2, b, shared, p, head] -> [b, words]."""
        place = angles(past.shape[4] + torch.arange(ids.shape[1], device=ids.device), past.shape[5])
        x = self.table(ids)
        for layer, own in zip(self.layers, past, strict=True):
            x = layer(x, own, place)
        return self.words(self.norm(x[:, -1]))


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, what it is called with, and plans by name."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.device, torch.dtype], tuple[Tensor, ...]]
    plans: dict[str, Plan]


def decoder_call(widths: Widths, tokens: int, past: int) -> Callable[[torch.device, torch.dtype], tuple[Tensor, ...]]:
    """Calls of a decoder with so many tokens behind so many others."""

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shape = (widths.layers, 2, 1, widths.shared, past, widths.width // widths.heads)
        ids = torch.randint(0, widths.words, (1, tokens), device=device)
        return ids, torch.randn(*shape, device=device, dtype=dtype)

    return inputs


def _image(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(32, 3, 224, 224, device=device, dtype=dtype),)


def cases(widths: Widths = LLAMA) -> Iterator[Case]:
    """Every model with its plans; those of one model stand together."""
    layers = "layers.*.weight"
    zeros = {f"{amount:.0%}": Plan([Rule(layers, Unstructured(amount))]) for amount in (0.5, 0.7, 0.9)}
    two_of_four = {"2:4": Plan([Rule(layers, SemiStructured(2, 4))])}
    tiles = {"80% of 64x64": Plan([Rule(layers, Blocks(0.8, (64, 64)))])}
    half = {"half the channels": Plan([Rule("*", Channels(0.5))])}

    def llama() -> nn.Module:
        return Llama(widths)

    yield Case("llama, 1 token", llama, decoder_call(widths, 1, 512), {**zeros, **two_of_four, **half})
    yield Case("llama, 2048 tokens", llama, decoder_call(widths, 2048, 0), {**two_of_four, **tiles, **half})
    yield Case("resnet50, 32 images", lambda: ResNet(RESNET50), _image, half)
    yield Case("vit-b16, 32 images", lambda: ViT(VIT_B16), _image, half)


def quick_case() -> Case:
    """A decoder of small layers, and one plan."""
    case = next(cases(SMALL))
    return dataclasses.replace(case, plans={"90%": case.plans["90%"]})


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, *, mode: str | None = "max-autotune", seconds: float = 2.0
) -> Iterator[Row]:
    """One row for each plan of a case: the ratio of `transform`'s result to the dense model, and how exact it is.

    A plan that fails has a row that says so.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = case.build().to(dtype).eval()
    inputs = case.inputs(device, dtype)
    dense = torch.compile(model, mode=mode)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, plan in case.plans.items():
        row: Row = {"kernel": "model", "case": case.name, "shape": name}
        try:
            yield row | _timed(model, dense, plan, inputs, mode, seconds)
        except Exception as error:  # Whatever it is, it is the figure of this plan, and the others go on.
            yield row | {"ratio": 0.0, "error": 1.0, "failed": f"{type(error).__name__}: {error}"}
        with torch.no_grad():
            for key, value in whole.items():
                model.get_parameter(key).copy_(value)


def _timed(
    model: nn.Module, dense: Any, plan: Plan, inputs: tuple[Tensor, ...], mode: str | None, seconds: float
) -> Row:
    fast = fxprune.transform(model, plan, inputs, mode=mode, progress=False)
    with torch.no_grad():
        # The dense side multiplies by the same zeros: they change a GPU's power, and so its clock.
        for key, mask in fast.selection.mask.items():
            model.get_parameter(key).masked_fill_(~mask.unpack(), 0)
    timed = fxprune.benchmark(dense, fast, inputs, seconds=seconds, progress=False)
    return {
        "dense": timed.a.median,
        "sparse": timed.b.median,
        "ratio": timed.ratio,
        "error": max((row.error for row in fast.report.checks), default=0.0),
        "layouts": dict(Counter(row.layout for row in fast.report.weights)),
        "notes": fast.report.notes,
    }
