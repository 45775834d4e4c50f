"""What a model came with is taken for pruning, or for chance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.oracle import quick


@pytest.mark.parametrize(("zeros", "is_pruned"), [(0, False), (2, False), (3, True), (90, True), (250, True)])
def test_a_weight_of_which_a_hundredth_is_zero_counts_as_pruned(zeros: int, is_pruned: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    with torch.no_grad():
        model[0].weight.view(-1)[torch.randperm(256)[:zeros]] = 0
    masks = quick(model, torch.randn(4, 16), plan=None).selection.mask
    assert list(masks) == ["0.weight"] * is_pruned
    assert not is_pruned or masks["0.weight"].kept() == 256 - zeros
