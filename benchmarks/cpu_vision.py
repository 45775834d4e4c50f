"""The CPU benchmark's models that read an image."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from benchmarks.cpu_model import CpuModel
from benchmarks.zoo_vision import define_operators


def vision_models() -> list[CpuModel]:
    """Torchvision's, a U-Net and timm's EfficientNet-Lite0."""
    found = [_torchvision(name) for name in ("resnet18", "resnet50", "mobilenet_v2", "vgg16")]
    return [*found, CpuModel("unet", UNet, _image), CpuModel("efficientnet_lite0", _lite, _image)]


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
