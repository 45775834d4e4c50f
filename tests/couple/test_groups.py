"""analyze: the groups of six tiny models as golden texts, why axes are frozen, the meta device, and how analysis grows.

A golden text is what `print(fxprune.analyze(...))` says, then what `.why` says of some dimensions. To write them anew
after a change that is meant: FXPRUNE_WRITE_GOLDEN=1 pytest tests/couple/test_groups.py, and read the difference.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import fxprune
from fxprune.couple import axis
from tests.structured_oracle import kept, randomised, right

GOLDEN = Path(__file__).parents[1] / "golden"


class ResNet(nn.Module):
    """A stem, a block with a grouped convolution, one with a depthwise one and a projected shortcut, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a1, self.a2 = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.a3, self.abn = nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.b1, self.b2 = nn.Conv2d(16, 40, 1), nn.Conv2d(40, 40, 3, stride=2, padding=1, groups=40)
        self.b3, self.shortcut = nn.Conv2d(40, 32, 1), nn.Conv2d(16, 32, 1, stride=2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = (x + self.abn(self.a3(self.a2(self.a1(x).relu()).relu()))).relu()
        x = (self.shortcut(x) + self.b3(self.b2(self.b1(x).relu()).relu())).relu()
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Decoder(nn.Module):
    """One block of a language model: RMSNorm, grouped queries with rotary positions, a gated feed-forward layer."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(32) for _ in range(3))
        self.q, self.k = nn.Linear(32, 64, bias=False), nn.Linear(32, 16, bias=False)
        self.v, self.o = nn.Linear(32, 16, bias=False), nn.Linear(64, 32, bias=False)
        self.gate, self.up = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down, self.head = nn.Linear(48, 32, bias=False), nn.Linear(32, 50, bias=False)
        angles = torch.arange(7)[:, None] / 100 ** (torch.arange(4) / 4)
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, t, _ = x.shape
        y = self.norm1(x)
        q = self.rotate(self.q(y).view(b, t, 8, 8).transpose(1, 2))
        k = self.rotate(self.k(y).view(b, t, 2, 8).transpose(1, 2))
        v = self.v(y).view(b, t, 2, 8).transpose(1, 2)
        k, v = (z[:, :, None].expand(b, 2, 4, t, 8).reshape(b, 8, t, 8) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, 64))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm3(x))


class ViT(nn.Module):
    """Patches, a class token, positions, one block with a fused qkv that is cut by chunk, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 5, 32))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(32) for _ in range(3))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.fc1, self.fc2, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        b, t, width = x.shape
        q, k, v = (y.reshape(b, t, 4, 8).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm3(x)[:, 0])


class DenseNet(nn.Module):
    """Layers that read all before them, then branches of unequal widths side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(28), nn.Conv2d(28, 12, 3, padding=1)
        self.one, self.three, self.pool = nn.Conv2d(40, 8, 1), nn.Conv2d(40, 24, 3, padding=1), nn.Conv2d(40, 4, 1)
        self.head = nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(self.bn1(x).relu())], 1)
        x = torch.cat([x, self.conv2(self.bn2(x).relu())], 1)
        x = torch.cat([self.one(x), self.three(x), self.pool(F.avg_pool2d(x, 3, 1, 1))], 1)
        return self.head(x.relu().mean((2, 3)))


class Translator(nn.Module):
    """An encoder layer and a decoder layer that looks at it, with attention written as softmax(q k) v."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(40, 32), nn.Embedding(40, 32)
        self.up, self.down, self.norm = nn.Linear(32, 48), nn.Linear(48, 32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.norm2, self.head = nn.LayerNorm(32), nn.Linear(32, 40)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.source(source)
        memory = self.norm(memory + self.down(self.up(memory).relu()))
        x = self.target(target)
        q, k, v = (
            f(y).view(y.shape[0], y.shape[1], 4, 8).permute(0, 2, 1, 3)
            for f, y in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        y = (weights @ v).permute(0, 2, 1, 3).contiguous().view(x.shape[0], x.shape[1], 32)
        return self.head(self.norm2(x + self.o(y)))


class UNet(nn.Module):
    """Down, further down, up by a transposed convolution, and the skip beside it, with GroupNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.down, self.norm2 = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.merge, self.norm3 = nn.Conv2d(32, 16, 3, padding=1), nn.GroupNorm(1, 16)
        self.leave = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.silu(self.norm1(self.enter(x)))
        x = self.up(F.silu(self.norm2(self.down(skip))))
        return self.leave(F.silu(self.norm3(self.merge(torch.cat([skip, x], 1)))))


def image(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 8, 8),)


def words(count: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: tuple(torch.randint(40, (batch, 7)) for _ in range(count))


# name -> model, its arguments at a batch size, the dimensions whose `why` the golden text has
MODELS: dict[str, tuple[type[nn.Module], Callable[[int], tuple[Tensor, ...]], list[tuple[str, int]]]] = {
    "resnet": (ResNet, image, [("a2.weight", 0), ("stem.weight", 1), ("head.weight", 0)]),
    "decoder": (Decoder, words(1), [("q.weight", 0), ("q.weight", 1), ("embed.weight", 0), ("head.weight", 0)]),
    "vit": (ViT, image, [("qkv.weight", 0), ("patch.weight", 0), ("position", 1)]),
    "densenet": (DenseNet, image, [("bn2.weight", 0), ("head.weight", 1), ("conv1.weight", 3)]),
    "translator": (Translator, words(2), [("q.weight", 0), ("o.weight", 0), ("source.weight", 0)]),
    "unet": (UNet, image, [("norm2.weight", 0), ("merge.weight", 0), ("up.weight", 2)]),
}


def analyzed(name: str) -> Any:
    kind, arguments, _ = MODELS[name]
    return fxprune.analyze(kind().eval(), arguments(2))


@pytest.mark.parametrize("name", MODELS)
def test_groups_of_a_tiny_model(name: str) -> None:
    coupling = analyzed(name)
    whys = [f"why {tensor}[{dim}]\n{coupling.why(tensor, dim)}" for tensor, dim in MODELS[name][2]]
    text = "\n\n".join([str(coupling), *whys]) + "\n"
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    file = GOLDEN / f"groups_{name}.txt"
    if os.environ.get("FXPRUNE_WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), f"{file} has another text; see the top of this file"


@pytest.mark.parametrize("name", MODELS)
def test_the_tiny_models_shrink(name: str) -> None:
    """So that the golden texts are of groups that are right."""
    kind, arguments, _ = MODELS[name]
    model = randomised(kind())
    result = right(model, *arguments(2), other=arguments(5))
    free = {group.name for group in analyzed(name) if group.free}
    asked = {group.name for group in result.report.groups if group.asked is not None}
    assert set(kept(result)) == asked and asked <= free
    assert result.report.parameters[1] < 0.85 * result.report.parameters[0]


# --- what must be in them, whatever the golden texts say ---------------------------------------------------------


def members(coupling: Any, name: str) -> set[str]:
    return {str(member) for member in coupling[name].members}


def test_residual_sums_tie_what_they_add() -> None:
    coupling = analyzed("resnet")
    stream = coupling["stem.weight[0]"]
    assert (stream.size, stream.free) == (16, True)
    writers = {"stem.weight[0]", "bn.weight[0]", "bn.running_var[0]", "a3.weight[0]", "abn.bias[0]"}
    assert writers | {"a1.weight[1]", "b1.weight[1]", "shortcut.weight[1]"} <= members(coupling, stream.name)
    depthwise = members(coupling, "b1.weight[0]")
    assert depthwise == {"b1.weight[0]", "b1.bias[0]", "b2.weight[0]", "b2.bias[0]", "b3.weight[1]"}
    # A grouped convolution has whole groups, and channels in each, on both sides.
    grouped = [g for g in coupling if any(m.name == "a2.weight" and m.dim == 0 for m in g.members)]
    assert sorted(g.size for g in grouped) == [4, 6]


def test_key_value_heads_tie_their_queries() -> None:
    coupling = analyzed("decoder")
    (groups,) = [g for g in coupling if g.size == 2 and any(m.name == "k.weight" for m in g.members)]
    assert {m.name for m in groups.members} == {"q.weight", "k.weight", "v.weight", "o.weight"}
    assert [repr(coupling.axis("q.weight", 0)), repr(coupling.axis("v.weight", 0))] == ["((2x4)x(4+4))", "(2x8)"]
    assert {str(m) for m in coupling["gate.weight[0]"].members} == {"gate.weight[0]", "up.weight[0]", "down.weight[1]"}
    assert "a statistic runs over it" in coupling["embed.weight[1]"].mixed


def test_concatenations_are_sums_of_their_parts() -> None:
    coupling = analyzed("densenet")
    assert repr(coupling.axis("one.weight", 1)) == repr(coupling.axis("three.weight", 1)) == "(16+12+12)"
    assert repr(coupling.axis("head.weight", 1)) == "(8+24+4)"
    assert "bn2.running_mean[0]" in members(coupling, "conv1.weight[0]")


def test_cross_attention_ties_keys_to_queries_only_in_heads() -> None:
    coupling = analyzed("translator")
    heads, width = coupling.axis("q.weight", 0).root().parts
    assert heads.root() is coupling.axis("v.weight", 0).root().parts[0].root()
    assert width.root() is not coupling.axis("v.weight", 0).root().parts[1].root()


def test_a_group_norm_over_one_group_runs_over_all_channels() -> None:
    coupling = analyzed("unet")
    assert "a statistic runs over it" in coupling["merge.weight[0]"].mixed
    outer, inner = coupling.axis("norm2.weight", 0).root().parts
    assert not outer.root().mixed and "a statistic runs over it" in inner.root().mixed


# --- calls -------------------------------------------------------------------------------------------------------


def test_the_meta_device_gives_the_same_groups() -> None:
    for name in ("resnet", "decoder"):
        kind, arguments, _ = MODELS[name]
        with torch.device("meta"):
            model = kind().eval()
        lines = [line.rstrip() for line in str(fxprune.analyze(model, arguments(2))).splitlines()]
        golden = (GOLDEN / f"groups_{name}.txt").read_text().splitlines()
        assert golden[: len(lines)] == lines and golden[len(lines)] == ""


def test_sizes_cost_nothing() -> None:
    """Axes are not lists of indices: a width of millions is analysed on meta as a width of eight is."""

    def created(width: int, monkeypatch: pytest.MonkeyPatch) -> int:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(10, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10)).eval()
        with monkeypatch.context() as patch:
            count = counter(patch)
            coupling = fxprune.analyze(model, (torch.randn(2, 10),))
        assert coupling["0.weight[0]"].size == 4 * width
        return count[0]

    with pytest.MonkeyPatch.context() as monkeypatch:
        assert created(2, monkeypatch) == created(1 << 22, monkeypatch)


def test_keyword_arguments_and_dynamic_shapes() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(10, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.b(self.a(x).relu() * scale)

    model, x = Scaled().eval(), torch.randn(3, 7, 10)
    coupling = fxprune.analyze(model, (x,), {"scale": torch.ones(3, 7, 1)})
    assert [g.name for g in coupling if g.free] == ["a.weight[0]"]
    shapes = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "scale": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    coupling = fxprune.analyze(model, (x,), {"scale": torch.ones(3, 7, 1)}, dynamic_shapes=shapes)
    assert [g.name for g in coupling if g.free] == ["a.weight[0]"]
    # A scale for each channel is an input, and inputs keep their sizes.
    coupling = fxprune.analyze(model, (x,), {"scale": torch.ones(16)})
    assert "graph input" in coupling["a.weight[0]"].frozen
    assert "scale" in coupling.why("b.weight", 1)


def test_an_op_without_a_rule_freezes_and_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.special.bessel_j0(self.b(self.a(x).relu())))

    coupling = fxprune.analyze(Net().eval(), (torch.randn(3, 10),))
    assert coupling["a.weight[0]"].free
    assert "no rule for aten.special_bessel_j0.default" in coupling["b.weight[0]"].frozen
    assert coupling.missing == {"aten.special_bessel_j0.default": 1}
    assert "ops without a rule: aten.special_bessel_j0.default (1)" in str(coupling)
    assert "bessel" in coupling.why("c.weight", 1).splitlines()[-1]


def test_why_walks_from_tie_to_tie() -> None:
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 8), nn.Softmax(-1), nn.Linear(8, 3)).eval()
    coupling = fxprune.analyze(model, (torch.randn(2, 10),))
    assert coupling.why("0.weight", 0) == "0.weight[0] may shrink: it is 0.weight[0]"
    lines = coupling.why("2.weight", 0).splitlines()
    assert "2.weight[0]" in lines[0] and "a softmax runs over it" in lines[-1]
    # Each line goes on from where the line before it led.
    for before, after in itertools.pairwise(lines):
        assert before.split()[-1] == after.split()[0].rstrip(":")


# --- growth ------------------------------------------------------------------------------------------------------


def counter(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts every axis that is made and every step to the root of one: what analysis does, in whatever order."""
    count = [0]

    def counted(name: str) -> None:
        original = getattr(axis.Axis, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(axis.Axis, name, call)

    for name in ("__init__", "root"):
        counted(name)
    return count


class Deep(nn.Module):
    """Blocks on one residual stream, so that all of them are in one group, with heads that views cut out."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in self.blocks:  # pyright: ignore
            y = up(x).relu().unflatten(-1, (2, 4)).transpose(-1, -2)
            x = x + down(y.transpose(-1, -2).flatten(-2))
        return x.mean(-1)


class Chain(nn.Module):
    """Layers one after the other, each a group of its own."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


@pytest.mark.parametrize(("kind", "width"), [(Deep, 6), (Chain, 8)])
def test_analysis_grows_linearly(kind: Any, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(depth: int) -> int:
        with monkeypatch.context() as patch:
            count = counter(patch)
            fxprune.analyze(kind(depth).eval(), (torch.randn(2, width),))
        return count[0]

    four, eight, forty = steps(4), steps(8), steps(40)
    # Each block more costs the same.
    assert forty - eight == pytest.approx((eight - four) * 8, rel=0.05)


@pytest.mark.parametrize("pieces", ["split", "chunk", "slices", "unbind"])
def test_a_weight_that_is_read_in_pieces_makes_the_channels_of_each(pieces: str) -> None:
    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rows = (2, 16) if pieces == "unbind" else (32,)
            self.both, self.out = nn.Parameter(torch.randn(*rows, 8)), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cut = {
                "split": lambda: self.both.split((16, 16)),
                "chunk": lambda: self.both.chunk(2),
                "slices": lambda: (self.both[:16], self.both[16:]),
                "unbind": lambda: self.both.unbind(0),
            }
            a, b = cut[pieces]()
            return self.out(nn.functional.linear(x, a) * nn.functional.linear(x, b).sigmoid())

    plan = fxprune.Plan([fxprune.Rule("both", fxprune.Channels(0.5))])
    options = {"compile": False, "measure": False}
    fast = fxprune.transform(Pieces().eval(), plan, (torch.randn(3, 8),), options=options, progress=False)
    assert [len(kept) for kept in fast.selection.keep.values()] == [8]
    assert sum(p.numel() for p in fast.parameters()) == 8 * 16 + 8 * 4 + 4
