"""What structured pruning is for, on scikit-learn's digits: train, take channels away, fine-tune shortly, deploy."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Channels, Plan, Rule

Split = tuple[Tensor, Tensor]


def digits() -> tuple[Split, Split]:
    """1,347 images to train on and 450 to test on: [n, 1, 8, 8] between 0 and 1, and their classes."""
    from sklearn.datasets import load_digits

    images, classes = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = (images / 16).float().view(-1, 1, 8, 8)
    order = torch.randperm(len(images))
    train, test = order[:1347], order[1347:]
    return (images[train], classes[train]), (images[test], classes[test])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def net() -> nn.Sequential:
    """A ResNet of two blocks with dropout before its head."""
    stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 10)]
    return nn.Sequential(stem, Block(32), nn.MaxPool2d(2), Block(32), *head)


def train(model: nn.Module, data: Split, epochs: int, rate: float) -> None:
    """AdamW on batches of 64, in train mode, with a rate that falls to nothing: the last epochs decide."""
    images, classes = data
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: steps // epochs * 64].view(-1, 64):
            optimiser.zero_grad()
            F.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimiser.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """The share of images whose largest logit is that of their class."""
    images, classes = data
    return (model(images).argmax(1) == classes).float().mean().item()


def test_a_short_fine_tune_recovers_what_pruning_lost() -> None:
    training, held_out = digits()
    model = net()
    train(model, training, epochs=6, rate=3e-3)
    dense = accuracy(model, held_out)
    assert dense > 0.95

    plan = Plan([Rule("*.conv1.weight", Channels(0.75)), Rule("0.0.weight", Channels(0.5))])
    example = (training[0][:8],)
    small = fxprune.transform(model, plan, example, trainable=True, progress=False)
    sizes = {name: tuple(parameter.shape) for name, parameter in small.named_parameters()}
    assert sizes["1.conv1.weight"] == (8, 16, 3, 3) and sizes["1.bn2.weight"] == (16,) and sizes["7.weight"] == (10, 16)
    assert {name for name, _ in model.named_parameters()} == sizes.keys()
    pruned = accuracy(small, held_out)
    assert pruned < dense - 0.05

    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(small, training, epochs=10, rate=3e-3)
    tuned = accuracy(small, held_out)
    assert tuned > dense - 0.02 and tuned > pruned + 0.05
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    fast = fxprune.transform(small, example_inputs=example, progress=False, options={"compile": False})
    assert abs(accuracy(fast, held_out) - tuned) < 1 / len(held_out[0])
