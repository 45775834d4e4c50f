"""Models whose results are exported: each with a plan, an example call and other calls that the result takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fxprune
from fxprune import Channels, Plan, Rule, Unstructured

QUICK = {"compile": False, "measure": False}


class Case(NamedTuple):
    """A model, how it is pruned, and calls of it; the first is the example."""

    model: nn.Module
    plan: Plan
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def result(self, **options: Any) -> Any:
        """The model transformed for its first call."""
        trainable = options.pop("trainable", False)
        args, kwargs = self.calls[0]
        return fxprune.transform(
            self.model, self.plan, args, kwargs, trainable=trainable, options={**QUICK, **options}, progress=False
        )


class Residual(nn.Module):
    """A CNN with batch-norms, a shortcut and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.last = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, 5)
        for buffer in (self.norm.running_mean, self.norm.running_var):
            assert buffer is not None
            buffer.uniform_(0.5, 1.5)

    def forward(self, image: Tensor) -> Tensor:
        """image [n, 3, h, w] -> logits [n, 5]."""
        x = torch.relu(self.norm(self.first(image)))
        x = torch.relu(x + self.last(torch.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


class Tagger(nn.Module):
    """Ids and a mask, by name, to a dict of tensors; what was read of the length is part of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(11, 32), nn.Linear(32, 48), nn.Linear(48, 7)

    def forward(self, ids: Tensor, *, mask: Tensor, scale: float = 1.0) -> dict[str, Any]:
        """ids, mask [n, t] -> logits [n, t, 7] and pooled [n, 48]."""
        hidden = torch.relu(self.inner(self.table(ids))) * mask.unsqueeze(-1)
        return {"logits": self.out(hidden) * scale, "pooled": hidden.sum(1) / ids.shape[1]}


def mlp() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 8)).eval()
    plan = Plan([Rule("*.weight", Unstructured(0.7))])
    return Case(model, plan, [((torch.randn(n, 40),), {}) for n in (6, 1, 17)])


def cnn() -> Case:
    torch.manual_seed(1)
    plan = Plan([Rule("*.weight", Unstructured(0.8))])
    return Case(Residual().eval(), plan, [((torch.randn(n, 3, 14, 14),), {}) for n in (2, 1, 5)])


def shrunk() -> Case:
    return cnn()._replace(plan=Plan([Rule("*", Channels(0.5))]))


def tagger() -> Case:
    torch.manual_seed(2)
    plan = Plan([Rule("*.weight", Channels(0.5))])
    calls = [((torch.randint(11, (n, 9)),), {"mask": torch.rand(n, 9)}) for n in (3, 1, 4)]
    return Case(Tagger().eval(), plan, calls)


CASES: dict[str, Callable[[], Case]] = {"mlp": mlp, "cnn": cnn, "shrunk": shrunk, "tagger": tagger}
