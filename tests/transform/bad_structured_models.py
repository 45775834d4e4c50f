"""What the tests of bad input to structured pruning share: a model of two branches and its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.structured_oracle import randomised


class Net(nn.Module):
    """Two coupled branches, a norm over their sum, a plain block, a residual block, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(10, 24), nn.Linear(10, 24)
        self.hidden = nn.Linear(24, 16)
        self.plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.hidden((self.left(x) + self.right(x)).relu())
        return self.head(self.norm(y + self.plain(y)))


def net() -> Any:
    return randomised(Net())


X = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
