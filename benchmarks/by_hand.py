"""ResNet-50, ViT-B/16 and BERT-base as one writes them by hand in PyTorch, every width that pruning may change given.

The widths are data: `RESNET50`, `VIT_B16` and `BERT_BASE` are the published ones, and `read` takes others off a state
dict whose tensors were cut. Parameters have the same names at every width, so such a state dict loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class ResNetWidths:
    """Channels of a bottleneck ResNet: of the stem, of each stage's residual, and (reduced, 3x3) of each block."""

    stem: int
    residual: tuple[int, ...]
    inner: tuple[tuple[tuple[int, int], ...], ...]
    classes: int = 1000

    def read(self, state: State) -> ResNetWidths:
        """The widths of a network of this depth with these tensors."""
        stages = range(1, 1 + len(self.residual))
        blocks = [[f"stage{s}.{b}" for b in range(len(self.inner[s - 1]))] for s in stages]
        return ResNetWidths(
            _out(state, "conv"),
            tuple(_out(state, f"{names[0]}.conv3") for names in blocks),
            tuple(tuple((_out(state, f"{n}.conv1"), _out(state, f"{n}.conv2")) for n in names) for names in blocks),
            _out(state, "classifier"),
        )


@dataclasses.dataclass(frozen=True)
class LayerWidths:
    """Widths of one transformer layer: its heads, the features of each, and the hidden features of its MLP."""

    heads: int
    head: int
    ffn: int


@dataclasses.dataclass(frozen=True)
class ViTWidths:
    """A vision transformer: residual features, the widths of its layers, and the sides of a patch and of the image."""

    width: int
    layers: tuple[LayerWidths, ...]
    patch: int = 16
    image: int = 224
    classes: int = 1000

    def read(self, state: State) -> ViTWidths:
        """The same with the layers' widths taken from these tensors."""
        return dataclasses.replace(self, layers=_read_layers(self.layers, state))


@dataclasses.dataclass(frozen=True)
class BertWidths:
    """A BERT encoder: residual features, the widths of its layers, and the rows of its embeddings."""

    width: int
    layers: tuple[LayerWidths, ...]
    words: int = 30522
    positions: int = 512
    kinds: int = 2

    def read(self, state: State) -> BertWidths:
        """The same with the layers' widths taken from these tensors."""
        return dataclasses.replace(self, layers=_read_layers(self.layers, state))


RESNET50 = ResNetWidths(
    stem=64,
    residual=(256, 512, 1024, 2048),
    inner=(((64, 64),) * 3, ((128, 128),) * 4, ((256, 256),) * 6, ((512, 512),) * 3),
)
VIT_B16 = ViTWidths(768, (LayerWidths(12, 64, 3072),) * 12)
BERT_BASE = BertWidths(768, (LayerWidths(12, 64, 3072),) * 12)


def _out(state: State, name: str) -> int:
    return state[f"{name}.weight"].shape[0]


def _read_layers(layers: tuple[LayerWidths, ...], state: State) -> tuple[LayerWidths, ...]:
    """Whole heads leave, so the features of a head are what they were."""
    return tuple(
        LayerWidths(state[f"layers.{i}.attention.out.weight"].shape[1] // old.head, old.head, _out(state, name))
        for i, old in enumerate(layers)
        for name in [f"layers.{i}.up"]
    )


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution around a shortcut, which is projected where size or width changes."""

    def __init__(self, i: int, inner: tuple[int, int], o: int, stride: int, project: bool) -> None:
        super().__init__()
        reduced, spatial = inner
        self.conv1, self.norm1 = nn.Conv2d(i, reduced, 1, bias=False), nn.BatchNorm2d(reduced)
        self.conv2 = nn.Conv2d(reduced, spatial, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(spatial)
        self.conv3, self.norm3 = nn.Conv2d(spatial, o, 1, bias=False), nn.BatchNorm2d(o)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if project else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [n, i, h, w] -> [n, o, h / stride, w / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network of bottlenecks, the stride in the 3x3 convolution (He et al. 2015, as in torchvision)."""

    def __init__(self, widths: ResNetWidths) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, widths.stem, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(widths.stem)
        self.stages = len(widths.residual)
        i = widths.stem
        for stage, (o, blocks) in enumerate(zip(widths.residual, widths.inner, strict=True), 1):
            layers = []
            for block, inner in enumerate(blocks):
                first = block == 0
                layers.append(Bottleneck(i, inner, o, 2 if first and stage > 1 else 1, first))
                i = o
            self.add_module(f"stage{stage}", nn.Sequential(*layers))
        self.classifier = nn.Linear(i, widths.classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, 3, h, w] -> scores [n, classes]."""
        y = F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, 2, 1)
        for stage in range(1, self.stages + 1):
            y = self.get_submodule(f"stage{stage}")(y)
        return self.classifier(F.adaptive_avg_pool2d(y, 1).flatten(1))


class Attention(nn.Module):
    """Multi-head self-attention; `fused` makes query, key and value in one product."""

    def __init__(self, width: int, heads: int, head: int, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.head, self.fused = heads, head, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * heads * head)
        else:
            self.query = nn.Linear(width, heads * head)
            self.key = nn.Linear(width, heads * head)
            self.value = nn.Linear(width, heads * head)
        self.out = nn.Linear(heads * head, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [n, t, width], mask [n, 1, 1, t] True where a token may be read -> [n, t, width]."""
        n, t, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(n, t, 3, self.heads, self.head).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                project(x).view(n, t, self.heads, self.head).transpose(1, 2)
                for project in (self.query, self.key, self.value)
            )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(n, t, self.heads * self.head))


class ViTLayer(nn.Module):
    """Attention and MLP, each behind a layer norm and beside a residual."""

    def __init__(self, width: int, sizes: LayerWidths) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, sizes.heads, sizes.head, fused=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, sizes.ffn), nn.Linear(sizes.ffn, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, t, width] -> the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Vision transformer with a class token (Dosovitskiy et al. 2020)."""

    def __init__(self, widths: ViTWidths) -> None:
        super().__init__()
        tokens = 1 + (widths.image // widths.patch) ** 2
        self.patches = nn.Conv2d(3, widths.width, widths.patch, widths.patch)
        self.token = nn.Parameter(torch.zeros(1, 1, widths.width))
        self.positions = nn.Parameter(torch.zeros(1, tokens, widths.width))
        self.layers = nn.ModuleList(ViTLayer(widths.width, sizes) for sizes in widths.layers)
        self.norm = nn.LayerNorm(widths.width, eps=1e-6)
        self.classifier = nn.Linear(widths.width, widths.classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, 3, image, image] -> scores [n, classes]."""
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], dim=1) + self.positions
        for layer in self.layers:
            y = layer(y)
        return self.classifier(self.norm(y)[:, 0])


class BertLayer(nn.Module):
    """Attention and MLP, each with a layer norm behind its residual."""

    def __init__(self, width: int, sizes: LayerWidths) -> None:
        super().__init__()
        self.attention = Attention(width, sizes.heads, sizes.head, fused=False)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, sizes.ffn), nn.Linear(sizes.ffn, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [n, t, width], mask [n, 1, 1, t] -> [n, t, width]."""
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    """BERT's encoder with its pooler (Devlin et al. 2018), all tokens of the first kind."""

    def __init__(self, widths: BertWidths) -> None:
        super().__init__()
        self.words = nn.Embedding(widths.words, widths.width)
        self.positions = nn.Embedding(widths.positions, widths.width)
        self.kinds = nn.Embedding(widths.kinds, widths.width)
        self.norm = nn.LayerNorm(widths.width, eps=1e-12)
        self.layers = nn.ModuleList(BertLayer(widths.width, sizes) for sizes in widths.layers)
        self.pooler = nn.Linear(widths.width, widths.width)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids and attention_mask [n, t] -> hidden states [n, t, width] and the pooled first one [n, width]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.positions(places) + self.kinds(torch.zeros_like(ids)))
        mask = attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x, torch.tanh(self.pooler(cast(Tensor, x[:, 0])))
