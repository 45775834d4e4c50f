"""Numbers among the inputs of a frame: what was packed for one of them answers for no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxprune.backend import fxprune
from tests.test_backend import EAGER, Net, assert_equal, pruned
from tests.test_backend import fresh as fresh


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, factor: float) -> Tensor:
        return self.net(x) * factor


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_a_number_that_each_call_gives_is_followed(dynamic: bool | None) -> None:
    model = pruned(Scaled())
    compiled = torch.compile(model, backend=fxprune, options=EAGER, dynamic=dynamic)
    for factor in (0.5, 1.5, 0.25, -3.0, 1.5):
        x = torch.randn(4, 64)
        assert_equal(compiled(x, factor), model(x, factor))
