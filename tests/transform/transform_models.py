"""What the tests of transform share: an attention-like model, and a compiler that starts afresh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Attention-like: linears of different sizes, one without a bias, an activation and a softmax."""

    mask: Tensor

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.query = nn.Linear(width, 32)
        self.key = nn.Linear(width, 32, bias=False)
        self.out = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))
        self.register_buffer("mask", torch.full((600, 600), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2]
        scores = self.query(x) @ self.key(x).transpose(-1, -2) + self.mask[:size, :size]
        return self.out(scores.softmax(-1) @ x)


def net(width: int = 24) -> Any:
    return Net(width).eval()


@pytest.fixture(autouse=True)
def compiled_code_does_not_pile_up() -> Iterator[None]:
    yield
    torch._dynamo.reset()
