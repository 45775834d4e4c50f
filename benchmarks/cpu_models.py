"""The models of the CPU benchmark, with zeros in their weights: the same for every runtime, by a seed."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks.zoo_randomise import randomise
from benchmarks.zoo_vision import define_operators


@dataclasses.dataclass(frozen=True)
class CpuModel:
    """A model in eval mode, and the inputs of one call, by position."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]


def models() -> dict[str, CpuModel]:
    """Every model by name; builds none."""
    found = [_torchvision(name) for name in ("resnet18", "resnet50", "mobilenet_v2", "vgg16")]
    found += [CpuModel("unet", UNet, _image), CpuModel("efficientnet_lite0", _lite, _image)]
    found += [_minilm(length) for length in (32, 128, 512)]
    return {model.name: model for model in found}


def pruned(model: CpuModel, sparsity: float) -> nn.Module:
    """The model with the least of each linear's and convolution's weights zero; depthwise convolutions stay dense."""
    torch.manual_seed(0)
    built = model.build().eval().requires_grad_(False)
    randomise(built, 0)
    for module in built.modules():
        if sparsity and isinstance(module, (nn.Linear, nn.Conv2d)) and not is_depthwise(module):
            prune.l1_unstructured(module, "weight", sparsity)
            prune.remove(module, "weight")
            module.weight.requires_grad_(False)
    return built


def is_depthwise(module: nn.Module) -> bool:
    """Whether each output channel of a convolution reads one input channel."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def example(model: CpuModel) -> tuple[Tensor, ...]:
    """The inputs, the same in every process."""
    torch.manual_seed(1)
    return model.inputs()


class UNet(nn.Module):
    """U-Net (Ronneberger et al., 2015) with padding, batch-norm and bilinear upsampling, at a quarter of its widths."""

    WIDTHS = (16, 32, 64, 128, 256)

    def __init__(self) -> None:
        super().__init__()
        downs = zip((3, *self.WIDTHS), self.WIDTHS)
        ups = zip(self.WIDTHS[::-1], self.WIDTHS[-2::-1])
        self.down = nn.ModuleList(_double(i, o) for i, o in downs)
        self.up = nn.ModuleList(_double(i + o, o) for i, o in ups)
        self.head = nn.Conv2d(self.WIDTHS[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [n, 2, h, w] for images [n, 3, h, w] whose sides are multiples of 16."""
        skips: list[Tensor] = []
        for block in self.down:
            x = block(nn.functional.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
            x = block(torch.cat([skips.pop(), x], 1))
        return self.head(x)


def _double(i: int, o: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (i, o):
        layers += [nn.Conv2d(channels, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _image() -> tuple[Tensor]:
    return (torch.randn(1, 3, 224, 224),)


def _torchvision(name: str) -> CpuModel:
    def build() -> nn.Module:
        define_operators()
        return importlib.import_module("torchvision.models").get_model(name, weights=None)

    return CpuModel(name, build, _image)


def _lite() -> nn.Module:
    define_operators()
    return importlib.import_module("timm").create_model("efficientnet_lite0", pretrained=False)


def _minilm(length: int) -> CpuModel:
    """The shape of all-MiniLM-L6-v2."""

    def build() -> nn.Module:
        define_operators()
        transformers = importlib.import_module("transformers")
        sizes: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
        config = transformers.BertConfig(num_attention_heads=12, **sizes)
        return _LastHidden(transformers.BertModel(config, add_pooling_layer=False))

    return CpuModel(f"minilm-{length}", build, lambda: (torch.randint(0, 30000, (1, length)),))


class _LastHidden(nn.Module):
    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(ids).last_hidden_state
