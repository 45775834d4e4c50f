"""What the groups of a graph must say, model by model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune


def test_every_output_is_frozen() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(10, 16), nn.Linear(10, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.a(x), {"more": self.b(x)}

    coupling = fxprune.analyze(Two().eval(), (torch.randn(3, 10),))
    assert all("graph output" in coupling[f"{name}.weight[0]"].frozen for name in "ab")


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_norm_by_hand_over_a_residual_width_leaves_on_request_alone(layers: int) -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.writers, self.last = nn.ModuleList(nn.Linear(10, 16) for _ in range(layers)), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.writers[0](x)
            for writer in self.writers[1:]:
                y = y + writer(x)
            return self.last(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5))

    group = fxprune.analyze(Stream().eval(), (torch.randn(3, 10),))["writers.0.weight[0]"]
    assert group.free == (layers == 1)
    assert layers == 1 or f"a statistic runs over what {layers} layers write to" in group.mixed
