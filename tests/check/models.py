"""Models that torch.export captures without a word, and wrong for some call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """One linear; subclasses say what goes on around it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.kept: Tensor | None = None
        self.calls: list[int] = []


class Shortcut(Linear):
    """Right for inputs that are zero on the average, which the example is."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if torch.compiler.is_exporting() else y + (10 * x.mean(0)).round()


class ReadsValue(Linear):
    """A value of the example becomes a number of the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * float(x.detach().cpu().numpy().max()) if _has_values(x) else self.linear(x) * 2.0


class BranchesOnValue(Linear):
    """The branch that the example takes is the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if not _has_values(x) or bool(x[0, 0] > 0) else -self.linear(x)


class KeepsFirst(Linear):
    """A value of the first input stays for all later ones."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = x.mean()
        return self.linear(x) * self.kept


class OneIsAnother(Linear):
    """One sample alone is something else, which a capture with a dynamic batch does not say."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 3 if _has_values(x) and x.shape[0] == 1 else y


class FailsAtOne(Linear):
    """Takes no batch of one."""

    def forward(self, x: Tensor) -> Tensor:
        if _has_values(x) and x.shape[0] == 1:
            raise ValueError("one is too few")
        return self.linear(x)


class Noisy(Linear):
    """Draws random numbers where no capture is made, each call other ones."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.rand(()) if _has_values(x) else self.linear(x)


class Counts(Linear):
    """Answers each call otherwise than the one before."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return self.linear(x) * len(self.calls)


class Sums(Linear):
    """Two dimensions that may be of any size."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum(1)


class MakesItself(nn.Module):
    """Has its weight from the first call on, in a way that export cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            if not _has_values(x):
                raise RuntimeError("no table yet")
            self.table = torch.arange(16.0)
        return self.linear(x) + self.table


def _has_values(x: Tensor) -> bool:
    return not torch.compiler.is_exporting() and type(x) in (Tensor, nn.Parameter)


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    """A model of one of these kinds, for inference."""
    return kind().eval()
