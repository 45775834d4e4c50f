"""Models whose classes remember sizes in their own ways, and what tests ask of a smaller one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Channels, Plan, Rule
from fxprune.select.selection import Selection

FAST = {"compile": False, "measure": False}


class Residual(nn.Module):
    """Two convolutions with batch-norms, added to their input."""

    def __init__(self, channels: int = 16, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.norm(self.first(x))))


class Attention(nn.Module):
    """Fused qkv; the class remembers the number of heads, their width, and both multiplied."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner = heads, width // heads, width
        self.scale = self.head_dim**-0.5
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-1, -2) * self.scale, -1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, self.inner))


class WrittenOut(Attention):
    """The same with its sizes written out in its code."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))


class Pieces(nn.Module):
    """A split by a tuple of sizes, a view by a table of them, and one that stays the number that another was."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces, self.table = (16, 16), {"rows": 16, "both": 2}
        self.width = 16
        self.into, self.out = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.into(x.reshape(-1, self.width)).split(self.pieces, -1)
        both = torch.stack([F.relu(a), b.sigmoid() * a], 1)
        return self.out(both.reshape(-1, self.table["both"] * self.table["rows"]))


class Block(nn.Module):
    """A residual block that knows its place in the list."""

    def __init__(self, index: int, width: int = 16) -> None:
        super().__init__()
        self.layer_idx = index
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Stack(nn.Module):
    """Blocks in a list that is walked by a number; `listed` False holds them as attributes instead."""

    def __init__(self, count: int = 3, listed: bool = True) -> None:
        super().__init__()
        self.num_layers, self.listed = count, listed
        blocks = [Block(index) for index in range(count)]
        if listed:
            self.blocks = nn.ModuleList(blocks)
        else:
            self.one, self.two, self.three = blocks

    def forward(self, x: Tensor) -> Tensor:
        if not self.listed:
            return self.three(self.two(self.one(x)))
        for index in range(self.num_layers):
            x = self.blocks[index](x)
        return x


def pruned(model: nn.Module, inputs: tuple[Any, ...], plan: Plan | None = None) -> Any:
    """What transform makes of a model: half its channels gone, or by a plan."""
    plan = plan if plan is not None else Plan([Rule("*", Channels(0.5))])
    return fxprune.transform(model, plan, inputs, options=FAST, progress=False)


def written(model: nn.Module, selection: Selection, *inputs: Any) -> Any:
    """The smaller model of its own class."""
    return fxprune.write_back(model, selection, inputs, progress=False)


def count(model: nn.Module) -> int:
    """Elements of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a model holds: tensors, plain attributes, modes."""
    found: dict[str, Any] = {name: t.clone() for name, t in model.state_dict().items()}
    for path, module in model.named_modules():
        found |= {f"{path}:{k}": repr(v) for k, v in vars(module).items() if isinstance(v, (int, tuple, dict, str))}
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two snapshots are equal."""
    equal = [torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items() if k in b]
    return a.keys() == b.keys() and all(equal)
