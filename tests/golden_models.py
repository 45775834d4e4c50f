"""Ten small models, one of every kind, with what is asked of each: what the golden texts of the stages are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune.prune as prune
from fxprune import Blocks, Channels, Drop, Plan, Rule, SemiStructured, Unstructured
from tests.structured_oracle import randomised

EAGER: dict[str, Any] = {"compile": False, "measure": False}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A model, one call of it, and the arguments of transform. A layout is named, so that nothing hangs on times."""

    model: nn.Module
    args: tuple[Any, ...]
    plan: Plan | None = None
    layout: str = "nonzeros"
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return EAGER if self.more.get("trainable") else {**EAGER, "layout": self.layout}


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> Any:
    return randomised(
        nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8, bias=False))
    )


class Bottleneck(nn.Module):
    """A residual block with a grouped convolution and everything in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(width, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.b, self.bn = nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(32)
        self.c, self.cn = nn.Conv2d(32, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.an(self.a(x)), inplace=True)
        y = F.relu(self.bn(self.b(y)), inplace=True)
        y = self.cn(self.c(y))
        y += x
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(Bottleneck(16) for _ in range(blocks)))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3)))


class Block(nn.Module):
    """A decoder's block: fused queries, grouped keys, a gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(32), nn.RMSNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o, self.gate, self.up, self.down = (
            nn.Linear(32, 32),
            nn.Linear(32, 64, bias=False),
            nn.Linear(32, 64, bias=False),
            nn.Linear(64, 32, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm(x)
        q = self.q(y).view(b, t, 4, 8).transpose(1, 2)
        k, v = (layer(y).view(b, t, 2, 8).transpose(1, 2) for layer in (self.k, self.v))
        k, v = (z[:, :, None].expand(b, 2, 2, t, 8).reshape(b, 4, t, 8) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, 32))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Two blocks over tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.RMSNorm(32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def decoder(plan: Plan, **more: Any) -> Asked:
    tokens = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))
    return Asked(randomised(Decoder()), (tokens,), plan, more=more)


def cnn() -> Any:
    """Convolutions of every kind before a classifier."""
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, groups=16, padding=1, bias=False),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.Conv2d(16, 32, 1),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 24, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24 * 9, 40),
            nn.ReLU(),
            nn.Linear(40, 5),
        )
    )


def structured() -> Asked:
    return Asked(randomised(ResNet()), (drawn(2, 3, 8, 8),), Plan([Rule("*", Channels(0.5))]))


def masks() -> Asked:
    plan = Plan(
        [Rule("*.weight", Unstructured(0.8), scope="global"), Rule("2.weight", Unstructured(0.6, per_row=True))]
    )
    return Asked(mlp(), (drawn(5, 32),), plan)


def semi_structured() -> Asked:
    return Asked(mlp(), (drawn(5, 32),), Plan([Rule("*.weight", SemiStructured(2, 4))]), "semi24")


def blocks() -> Asked:
    return Asked(mlp(), (drawn(5, 32),), Plan([Rule("*.weight", Blocks(0.5, (8, 8)))]))


def dropped() -> Asked:
    plan = Plan([Drop("blocks.1"), Rule("blocks.*.weight", Unstructured(0.7))])
    return Asked(randomised(ResNet(3)), (drawn(2, 3, 8, 8),), plan)


def dead() -> Asked:
    model = cnn()
    for name, dim in (("0", 0), ("6", 0), ("11", 0), ("8", 1)):
        prune.ln_structured(model.get_submodule(name), "weight", amount=0.5, n=2, dim=dim)
    return Asked(model, (drawn(2, 3, 16, 16),))


def calibrated() -> Asked:
    batches = [drawn(64, 32, seed=seed).double() for seed in range(3)]
    plan = Plan([Rule("0.weight", Unstructured(0.5)), Rule("2.weight", Channels(0.25))])
    return Asked(mlp().double(), (drawn(5, 32).double(),), plan, "dense", {"calibration": batches})


def trainable() -> Asked:
    plan = Plan([Rule("*", Channels(0.5)), Rule("8.weight", Unstructured(0.5)), Rule("13.weight", Unstructured(0.5))])
    return Asked(cnn(), (drawn(2, 3, 16, 16),), plan, more={"trainable": True})


def language() -> Asked:
    return decoder(
        Plan(
            [
                Rule("blocks.*.weight", Unstructured(0.8), scope="global"),
                Rule("blocks.1.down.weight", Channels(0.5, dim=1)),
                Rule("blocks.0.k.weight", Channels(0.5, align=1)),
            ]
        )
    )


def convolutional() -> Asked:
    return Asked(cnn(), (drawn(2, 3, 16, 16),), Plan([Rule("*.weight", Unstructured(0.9))]))


ASKED: dict[str, Callable[[], Asked]] = {
    "structured": structured,
    "masks": masks,
    "semi_structured": semi_structured,
    "blocks": blocks,
    "dropped": dropped,
    "dead": dead,
    "calibrated": calibrated,
    "trainable": trainable,
    "decoder": language,
    "cnn": convolutional,
}
