"""Folding masks and batch-norm: what is folded, what is left, and that the program given stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.capture.capture import capture
from fxprune.graph.program import Program
from fxprune.lower.fold import fold_batch_norm, fold_masks
from fxprune.select.mask import PackedMask
from fxprune.select.selection import Selection
from tests.oracle import assert_close

NORM = torch.ops.aten.batch_norm.default


def norms(program: Program) -> int:
    return sum(node.target is NORM for node in program.graph.nodes)


def noisy(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2) if "var" in name else tensor.normal_()
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("convolution", "norm", "shape"),
    [
        (nn.Conv1d, nn.BatchNorm1d, (2, 4, 9)),
        (nn.Conv2d, nn.BatchNorm2d, (2, 4, 9, 8)),
        (nn.Conv3d, nn.BatchNorm3d, (2, 4, 5, 6, 7)),
    ],
)
def test_a_batch_norm_goes_into_its_convolution(
    convolution: type[nn.Conv2d], norm: type[nn.BatchNorm2d], shape: tuple[int, ...], affine: bool, bias: bool
) -> None:
    model = noisy(nn.Sequential(convolution(4, 8, 3, groups=2, bias=bias), norm(8, affine=affine, eps=0.1)))
    x = torch.randn(shape)
    program = capture(model, (x,), {}).program
    folded = fold_batch_norm(program)
    assert norms(program) == 1 and norms(folded) == 0
    assert set(folded.state_dict()) - {"1.num_batches_tracked"} == {"0.weight", "0.weight_folded_bias"}
    assert set(program.state_dict()) >= {"0.weight", "1.running_var"}
    assert_close(folded(x).detach(), model(x).detach())
    assert_close(program(x).detach(), model(x).detach())


class Shared(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        if kind == "tied":
            self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.kind == "two readers":
            return self.norm(y) + y
        if self.kind == "used twice":
            return self.norm(y) + self.conv(x + 1)
        if self.kind == "weight read":
            return self.norm(y) * self.conv.weight.mean()
        if self.kind == "before":
            return self.conv(self.norm(x))
        return self.norm(y) + self.other(x)


@pytest.mark.parametrize("kind", ["two readers", "used twice", "weight read", "before", "tied"])
def test_what_others_read_stays_right(kind: str) -> None:
    model, x = noisy(Shared(kind)), torch.randn(2, 4, 5, 5)
    folded = fold_batch_norm(capture(model, (x,), {}).program)
    assert norms(folded) == 1
    assert_close(folded(x).detach(), model(x).detach())


def test_a_batch_norm_without_running_statistics_is_no_constant() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, affine=True)).eval()
    x = torch.randn(2, 3, 5, 5)
    assert_close(fold_batch_norm(capture(model, (x,), {}).program)(x).detach(), model(x).detach())


def test_masks_become_positive_zeros_under_every_name() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[0, 0] = -1
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[0, 0] = False
    program = capture(model, (torch.randn(3, 4),), {}).program
    folded = fold_masks(program, Selection(mask={"0.weight": PackedMask.pack(keep)}))
    weight = folded.get_parameter("0.weight")
    assert folded.get_parameter("2.weight") is weight
    assert weight[0, 0] == 0 and not torch.signbit(weight[0, 0])
    assert model[0].weight[0, 0] == -1 and program.get_parameter("0.weight") is model[0].weight
