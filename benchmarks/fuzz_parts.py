"""Modules that random models are made of, where torch has none: attention, gates, residual blocks, experts, masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

VOCABULARY = 11


class OwnRMSNorm(nn.Module):
    """RMS norm as Llama writes it: in float32 at least, then back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of an image [b, c, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of x [b, h, t, d]: halves turned by an angle of their place."""
    half = x.shape[-1] // 2
    place = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)
    rate = torch.arange(half, dtype=x.dtype, device=x.device) / half
    angle = place[:, None] * torch.exp(-rate)[None, :]
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    a, b = x[..., :half], x[..., half:]
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    """Self-attention over x [b, t, c] with all that varies between models.

    fused     one linear for queries, keys and values
    groups    heads of keys and values, each read by several heads of queries
    way       "sdpa", "gqa" (sdpa repeats the groups), "softmax" or "einsum"
    """

    def __init__(
        self,
        width: int,
        heads: int,
        groups: int | None = None,
        size: int | None = None,
        fused: bool = False,
        rotary: bool = False,
        causal: bool = False,
        bias: bool = True,
        way: str = "sdpa",
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups or heads, size or width // heads
        self.fused, self.rotary, self.causal, self.way = fused, rotary, causal, way
        q, k = self.heads * self.size, self.groups * self.size
        if fused:
            self.qkv = nn.Linear(width, q + 2 * k, bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(width, o, bias=bias) for o in (q, k, k))
        self.o = nn.Linear(q, width, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, _ = x.shape
        if self.fused:
            wide, narrow = self.heads * self.size, self.groups * self.size
            q, k, v = self.qkv(x).split([wide, narrow, narrow], -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q = q.view(b, t, self.heads, self.size).transpose(1, 2)
        k, v = (y.view(b, t, self.groups, self.size).transpose(1, 2) for y in (k, v))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        seen = None if mask is None else mask[:, None, None, :]
        if self.way == "gqa":
            y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=self.causal, enable_gqa=True)
        else:
            times = self.heads // self.groups
            if times > 1:
                k, v = (y.repeat_interleave(times, 1) for y in (k, v))
            y = self._attend(q, k, v, seen)
        return self.o(y.transpose(1, 2).reshape(b, t, self.heads * self.size))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        if self.way == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, seen, is_causal=self.causal)
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) if self.way == "einsum" else q @ k.transpose(-1, -2)
        scores = scores * self.size**-0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, -1e4)
        if self.causal:
            t = q.shape[-2]
            scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool, device=q.device).tril(), -1e4)
        weights = scores.softmax(-1)
        return torch.einsum("bhts,bhsd->bhtd", weights, v) if self.way == "einsum" else weights @ v


class SwiGLU(nn.Module):
    """Gate, up and down; the first two may be one linear."""

    def __init__(self, width: int, hidden: int, bias: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.both = nn.Linear(width, 2 * hidden, bias=bias)
        else:
            self.gate, self.up = nn.Linear(width, hidden, bias=bias), nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class ResidualMLP(nn.Module):
    """x + f(x) over the last dimension, normed before; with `post` normed after."""

    def __init__(self, width: int, hidden: int, norm: str = "layer", post: bool = False) -> None:
        super().__init__()
        self.norm = OwnRMSNorm(width) if norm == "rms" else nn.LayerNorm(width) if norm == "layer" else nn.Identity()
        self.up, self.down, self.post = nn.Linear(width, hidden), nn.Linear(hidden, width), post

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            return self.norm(x + self.down(F.gelu(self.up(x))))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ResidualAttention(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class ResidualConv(nn.Module):
    """Two convolutions with norms beside a way around them; `scale` is a learned factor of each channel."""

    def __init__(self, width: int, hidden: int, norm: str = "batch", last: bool = True, scale: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, hidden, 3, padding=1, bias=False), nn.Conv2d(hidden, width, 1)
        made = {"batch": nn.BatchNorm2d, "instance": lambda c: nn.InstanceNorm2d(c, affine=True)}.get(norm)
        self.norm_first = made(hidden) if made else nn.GroupNorm(1, hidden)
        self.norm_second = made(width) if made else nn.Identity()
        self.last, self.scale = last, nn.Parameter(torch.ones(width)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_second(self.second(F.relu(self.norm_first(self.first(x)))))
        if self.scale is not None:
            y = y * self.scale[:, None, None]
        return F.relu(x + y) if self.last else x + y


class SqueezeExcite(nn.Module):
    """An image's channels times what their means say."""

    def __init__(self, width: int, hidden: int, conv: bool = False, hard: bool = False) -> None:
        super().__init__()
        self.conv, self.hard = conv, hard
        if conv:
            self.down, self.up = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        else:
            self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool2d(x, 1) if self.conv else x.mean((2, 3))
        gate = self.up(F.relu(self.down(mean)))
        gate = F.hardsigmoid(gate) if self.hard else torch.sigmoid(gate)
        return x * (gate if self.conv else gate[:, :, None, None])


class InvertedResidual(nn.Module):
    """Expanded, convolved in depth, projected, added."""

    def __init__(self, width: int, times: int, kernel: int = 3) -> None:
        super().__init__()
        hidden = width * times
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(inplace=True),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Experts(nn.Module):
    """Every expert's answer, weighed by a softmax; with `stacked` their weights are one parameter [e, o, i]."""

    def __init__(self, i: int, o: int, experts: int, stacked: bool = False) -> None:
        super().__init__()
        self.gate, self.stacked = nn.Linear(i, experts), stacked
        if stacked:
            self.weight = nn.Parameter(torch.empty(experts, o, i))
        else:
            self.experts = nn.ModuleList(nn.Linear(i, o) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        if self.stacked:
            return torch.einsum("...i,eoi,...e->...o", x, self.weight, share)
        return sum(share[..., k, None] * expert(x) for k, expert in enumerate(self.experts))  # pyright: ignore


class Recurrent(nn.Module):
    """The outputs alone of an LSTM, GRU or RNN over x [b, t, c]."""

    def __init__(self, kind: str, i: int, o: int, layers: int = 1, both: bool = False) -> None:
        super().__init__()
        self.net = getattr(nn, kind)(i, o, layers, batch_first=True, bidirectional=both)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0]


class Counter(nn.Module):
    """Adds how often it was called: a buffer that each call changes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + 0.1 * self.calls.to(x.dtype)


class Masked(nn.Module):
    """A parametrization that multiplies by a mask."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask.to(x.dtype)


def weight_normed(module: nn.Module) -> nn.Module:
    """The module with torch's weight norm on its weight."""
    return nn.utils.parametrizations.weight_norm(module)


def tied(first: nn.Module, second: nn.Module) -> nn.Module:
    """The second module with the first's weight."""
    if parametrize.is_parametrized(first):
        return second
    second.weight = first.weight
    return second
