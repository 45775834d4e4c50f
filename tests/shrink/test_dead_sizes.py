"""Exact removal at sizes that are not fixed: what holds at the example's size only is no constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fxprune.emit.pruned import PrunedModule
from tests.shrink.dead_oracle import image, removed, routes, shapes, shuffled, vectors, zero

AUTO = torch.export.Dim.AUTO
IMAGES = ({0: AUTO, 2: AUTO, 3: AUTO},)
ROWS = ({0: AUTO, 1: AUTO},)


def rows(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(length))


def held(model: nn.Module, result: PrunedModule, *inputs: Tensor) -> None:
    """The result computes what the model computes, at each of these sizes."""
    with torch.no_grad():
        for x in inputs:
            wanted = model(x)
            assert torch.allclose(result(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_padding_convolution_reads_one_constant_in_place_of_others():
    model = shuffled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=1)))
    with torch.no_grad():
        model[0].bias[:2] = 0
    zero(model[0].weight, out=range(4))
    result = removed(model, image(), dynamic_shapes=IMAGES)
    assert shapes(result)["0.weight"][0] == 5
    assert routes(result) == {"zero": 2, "constant into another channel": 1}
    (row,) = [row for row in result.report.dead.slices if row.name == "0.weight"]
    assert (row.zero, row.left, row.why) == (4, 3, "its constant is read for others")
    held(model, result, image(1, side=17), image(3, side=4))


def test_an_unpadded_convolution_takes_constants_into_its_bias():
    model = shuffled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    zero(model[0].weight, out=range(4))
    result = removed(model, image(), dynamic_shapes=IMAGES)
    assert shapes(result)["0.weight"][0] == 4
    held(model, result, image(1, side=17))


@pytest.mark.parametrize("kernel, stride, more", [(2, 2, 0), (3, 1, 0), (3, 2, 1)])
def test_transposed_convolutions(kernel: int, stride: int, more: int):
    second = nn.ConvTranspose2d(6, 4, kernel, stride, output_padding=more)
    model = shuffled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sigmoid(), second))
    zero(model[0].weight, out=[0, 1, 2])
    result = removed(model, image(), dynamic_shapes=IMAGES)
    assert shapes(result)["0.weight"][0] == 4
    held(model, result, image(1, side=12), image(2, side=5))


def test_a_convolution_shared_by_two_keeps_its_constants_at_sizes_that_are_not_fixed():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x)) + self.c(self.b(x).relu())

    model = shuffled(Shared())
    zero(model.a.weight, out=[0, 1])
    zero(model.b.weight, out=[0, 1])
    result = removed(model, image(), dynamic_shapes=IMAGES)
    assert shapes(result)["a.weight"][0] == 6
    assert "over a size that is not fixed" in result.report.dead.slices[0].why
    held(model, result, image(1, side=12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_a_channel_that_fills_up_a_width_stands_in_for_others(dtype: torch.dtype, masked: bool):
    model = shuffled(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Sigmoid(), nn.Conv2d(16, 8, 3, padding=1, bias=False)))
    zero(model[0].weight, out=range(4))
    model = model.to(dtype)
    if masked:
        # The slice that is written in place of others was masked in part.
        prune.l1_unstructured(model[2], "weight", amount=0.5)
    eps = torch.finfo(dtype).eps
    result = removed(model, image().to(dtype), tolerance=max(1e-5 if eps < 1e-4 else 0, 32 * eps), align=7)
    assert shapes(result)["0.weight"][0] == 14
    assert routes(result) == {"constant into another channel": 2}
    assert result.report.dead.map_elements == 0


class Function(nn.Module):
    """A layer with three dead neurons of a sigmoid, a function, and a layer that reads what comes of it."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(12, 6), nn.Linear(6, 4), function
        self.two = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.a(x).sigmoid())


def pooled(m: Any, y: Tensor) -> Tensor:
    return m.b(F.avg_pool2d(y.permute(2, 0, 1), (3, 1), 1, (1, 0)).permute(1, 2, 0))


AT_ANY_LENGTH: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "padded to sixteen": lambda m, y: m.b(F.pad(y, (0, 0, 0, torch.sym_max(0, 16 - y.shape[1])))).sum(1),
    "padded to a multiple": lambda m, y: m.b(F.pad(y, (0, 0, 0, -y.shape[1] % 4))).sum(1),
    "a sum of all rows": lambda m, y: m.b(torch.ones(y.shape[1], y.shape[1]) @ y),
    "five sums of all rows": lambda m, y: m.b(F.linear(y.mT, torch.ones(5, y.shape[1])).mT),
    "a pattern that is regrouped": lambda m, y: m.b((y[:, None] + m.two[:, None]).flatten(0, 1).view(2, -1, 6)[:, :2]),
    "windows without a batch": pooled,
    "the mean of everything": lambda m, y: m.b(y / (1 + y.mean())),
    "the sum of everything": lambda m, y: m.b(y / (1 + y.sum())),
    "one long row": lambda m, y: m.b(y / (1 + y.reshape(1, -1) @ y.reshape(-1, 1))),
}


@pytest.mark.parametrize("name", AT_ANY_LENGTH)
def test_what_depends_on_a_length(name: str):
    model = shuffled(Function(AT_ANY_LENGTH[name]))
    zero(model.a.weight, out=[0, 1, 2])
    result = removed(model, rows(20), dynamic_shapes=ROWS)
    held(model, result, rows(7), rows(10, 3), rows(33))


def test_windows_that_hang_over_the_edge():
    pool = nn.AvgPool2d(2, ceil_mode=True, divisor_override=3)
    model = shuffled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sigmoid(), pool, nn.Conv2d(6, 4, 1)))
    zero(model[0].weight, out=[0, 1])
    result = removed(model, image(side=10), dynamic_shapes=IMAGES)
    held(model, result, image(side=9), image(side=7))


def test_zeros_without_a_mask_and_scales_of_zero_start_the_search():
    model = shuffled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    prune.l1_unstructured(model[1], "weight", amount=4)
    assert shapes(removed(model, image()))["0.weight"][0] == 4


def test_the_row_that_pads_an_embedding_starts_none():
    model = shuffled(nn.Sequential(nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 4)))
    with torch.no_grad():
        model[0].weight[0] = 0
    assert removed(model, torch.arange(12).view(3, 4)).report.dead is None


def test_outputs_of_other_scales_keep_their_positions():
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.places = nn.Linear(12, 6), nn.Linear(6, 2), nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x)[:, None] + self.places).sigmoid())

    model = shuffled(Scales())
    zero(model.a.weight, out=[0, 1, 2])
    with torch.no_grad():
        model.places[:, 0] = 1.0
        model.b.weight[0] = 0
        model.b.weight[:, 0] = torch.tensor([1e8, 0.0])
    result = removed(model, vectors())
    with torch.no_grad():
        wanted = model(vectors())[..., 1]
        assert torch.allclose(result(vectors())[..., 1], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
