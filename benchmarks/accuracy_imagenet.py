"""The accuracy benchmark's photographs: how far two mobile classifiers stay with their dense selves.

The images are foolbox's 20 packaged ImageNet photographs, cut, mirrored and coloured at random (as in Szegedy et al.
2015); their labels serve no purpose here. No photograph is in two parts. With so few photographs, what is scored is not
accuracy but agreement with the dense model, with an interval over photographs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy_case import (
    Batch,
    Plans,
    check_count,
    check_split,
    endless,
    packaged_file,
    shuffled,
)
from benchmarks.accuracy_mobile import EFFICIENTNET_LITE0, IMAGE, MOBILENET_V2, Shape, efficientnet_lite0, mobilenet_v2
from fxprune.plan.patterns import Channels, Unstructured
from fxprune.plan.plan import Plan, Rule

ROWS = 16
VIEWS = 16  # of each photograph that is scored
PARTS = {"evaluation": 8, "development": 4}  # photographs; the others are for calibration
DRAWS = 2000
# The 1x1 convolutions and the classifier: 97% of the weights. The depthwise kernels have nine to 25 each.
DENSE_PARTS = ("blocks.*.expand.*weight", "blocks.*.project.*weight", "top.*weight", "classifier.weight")


def unstructured(amount: float) -> Callable[[], Plan]:
    """The 1x1 convolutions and the classifier lose this share of their weights each."""
    return lambda: Plan([Rule(pattern, Unstructured(amount)) for pattern in DENSE_PARTS])


def channels(amount: float) -> Callable[[], Plan]:
    """Every block loses this share of the channels that it expands to; what runs between the blocks stays."""
    return lambda: Plan([Rule("blocks.*.expand.*weight", Channels(amount))])


PLANS: Plans = {
    **{f"{amount:.0%}": unstructured(amount) for amount in (0.5, 0.7)},
    **{f"{amount:.0%} of channels": channels(amount) for amount in (0.25, 0.5)},
}


def read_photographs() -> list[Tensor]:
    """Return foolbox's 20 photographs `[3, h, w]`, values 0 to 1, in the order of their file names."""
    packaged_file("PIL")
    pillow: Any = importlib.import_module("PIL.Image")
    files = sorted(packaged_file("foolbox", "data").glob("imagenet_*.jpg"))
    pixels = [numpy.array(pillow.open(file).convert("RGB")) for file in files]
    return [torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in pixels]


def middle(image: Tensor, size: int = IMAGE) -> Tensor:
    """Return the middle seven eighths of `image [3, h, w]` as `[3, size, size]`: the usual view for a score."""
    _, h, w = image.shape
    side = round(min(h, w) * 0.875)
    top, left = (h - side) // 2, (w - side) // 2
    return resize(image[:, top : top + side, left : left + side], size)


def vary(image: Tensor, random: numpy.random.Generator, size: int = IMAGE) -> Tensor:
    """Return a random part of `image [3, h, w]`, 35% to all of it, in random colours: `[3, size, size]`, 0 to 1."""
    _, h, w = image.shape
    area = h * w * random.uniform(0.35, 1.0)
    ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    tall, wide = min(h, round(math.sqrt(area / ratio))), min(w, round(math.sqrt(area * ratio)))
    top, left = random.integers(h - tall + 1), random.integers(w - wide + 1)
    part = resize(image[:, top : top + tall, left : left + wide], size)
    if random.random() < 0.5:
        part = part.flip(2)
    brightness, contrast, saturation = random.uniform(0.75, 1.25, 3).tolist()
    part = part * brightness
    part = torch.lerp(part.mean(), part, contrast)
    return torch.lerp(part.mean(0, keepdim=True), part, saturation).clamp(0, 1)


def resize(image: Tensor, size: int) -> Tensor:
    """`image [3, h, w]` -> `[3, size, size]`, bilinear, smoothed where it shrinks."""
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]


def interval(values: Tensor, draws: int = DRAWS) -> tuple[float, float]:
    """Return the 95% interval of the mean of `values [photographs, views]`: photographs drawn anew with replacement.

    The views of one photograph resemble each other, so that they stay together (Davison and Hinkley 1997, section 3.8).
    """
    random = numpy.random.default_rng(0)
    means = values.double().mean(1).numpy()
    drawn = means[random.integers(len(means), size=(draws, len(means)))].mean(1)
    low, high = numpy.quantile(drawn, (0.025, 0.975)).tolist()
    return low, high


@dataclass(frozen=True)
class Photographs:
    """One classifier on 8 photographs to evaluate, 4 to develop on and 8 to calibrate on, 16 views of each scored."""

    name: str
    loader: Callable[[], nn.Module]
    shape: Shape
    photographs: Callable[[], Sequence[Tensor]] = read_photographs
    views: int = VIEWS
    size: int = IMAGE
    parts: dict[str, int] = field(default_factory=lambda: dict(PARTS))
    metric: str = "agreement"
    lower_is_better: bool = False
    loss: Callable[[Any, Any], Tensor] | None = None

    @property
    def plans(self) -> Plans:
        """50% and 70% of the 1x1 convolutions and the classifier; 25% and 50% of the blocks' inner channels."""
        return PLANS

    @property
    def sample(self) -> str:
        """On what a figure was calibrated and scored."""
        known, held, views = len(self.split["rest"]), self.parts["evaluation"], self.views
        return f"calibrated on 128 views of {known} photographs, scored on {views} views of {held} others"

    @cached_property
    def split(self) -> dict[str, list[Tensor]]:
        """Part -> its photographs."""
        images = self.photographs()
        order = shuffled(len(images), seed=0)
        found: dict[str, list[Tensor]] = {}
        for part, count in self.parts.items():
            found[part], order = [images[n] for n in order[:count]], order[count:]
        return found | {"rest": [images[n] for n in order]}

    @cached_property
    def dense(self) -> nn.Module:
        """The classifier with its packaged weights."""
        return self.loader()

    @cached_property
    def scored(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Split -> the images that are scored and the dense model's logits, filled as splits are scored."""
        return {}

    def model(self) -> nn.Module:
        """Return the dense classifier in eval mode."""
        return self.dense

    def inputs(self, images: Sequence[Tensor]) -> Tensor:
        """Images `[3, s, s]`, 0 to 1 -> the classifier's input `[n, 3, s, s]`."""
        mean, deviation = (torch.tensor(of).view(3, 1, 1) for of in (self.shape.mean, self.shape.deviation))
        return (torch.stack(list(images)) - mean) / deviation

    def calibration(self, seed: int, count: int | None = None) -> list[Batch]:
        """Return `count` random views (128 if not given) of the photographs that are in no split, 16 a batch."""
        count = check_count(128 if count is None else count, 4096, "views")
        random = numpy.random.default_rng(seed)
        rest = self.split["rest"]
        views = [vary(rest[n % len(rest)], random, self.size) for n in range(count)]
        return list(self.inputs(views).split(ROWS))

    def recovery(self, seed: int) -> Iterator[Batch]:
        """Yield new random views of the photographs that are in no split, 16 a batch."""
        random = numpy.random.default_rng(seed)
        rest = self.split["rest"]
        for chosen in endless(len(rest), ROWS, seed):
            yield self.inputs([vary(rest[n], random, self.size) for n in chosen])

    def score(self, model: Callable[..., Any], split: str) -> dict[str, float]:
        """Return how often `model` names the dense model's first class, and the mean cosine between their logits.

        Both come with the ends of a 95% interval over photographs.
        """
        if check_split(split) not in self.scored:
            images = self.scored_images(split)
            self.scored[split] = images, logits(self.dense, images)
        images, wanted = self.scored[split]
        found = logits(model, images)
        by_photograph = (-1, self.views)
        agreement = (found.argmax(1) == wanted.argmax(1)).double().view(by_photograph)
        cosine = F.cosine_similarity(found.double(), wanted.double(), dim=-1).view(by_photograph)
        measured: dict[str, float] = {}
        for name, values in (("agreement", agreement), ("cos", cosine)):
            low, high = interval(values)
            measured |= {name: values.mean().item(), f"{name} low": low, f"{name} high": high}
        return measured

    def scored_images(self, split: str) -> Tensor:
        """Return the views of a split's photographs, those of one photograph together, its middle first."""
        random = numpy.random.default_rng(0)
        views = []
        for image in self.split[split]:
            views += [middle(image, self.size), *(vary(image, random, self.size) for _ in range(self.views - 1))]
        return self.inputs(views)


def logits(model: Callable[..., Any], images: Tensor) -> Tensor:
    """Return what `model` gives for `images [n, 3, s, s]`, 16 at a time: `[n, classes]`."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(ROWS)])


def mobilenet_case() -> Photographs:
    """Return the case of MobileNetV2."""
    return Photographs("mobilenet_v2", mobilenet_v2, MOBILENET_V2)


def efficientnet_case() -> Photographs:
    """Return the case of EfficientNet-Lite0."""
    return Photographs("efficientnet_lite0", efficientnet_lite0, EFFICIENTNET_LITE0)
