"""torch.compile(model, backend="fxprune"): right for every block, size and value of the parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fxprune.backend import fxprune

PACKED = {"layout": "nonzeros"}


class Net(nn.Module):
    """Linear, batch-norm (whose eps Dynamo makes an input when dynamic), linear, and arithmetic on the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.norm(self.a(x)))).view(x.shape[0], 2, 32) * x.shape[0]


class Blocks(nn.Module):
    """Blocks of one class with a graph break between them share one compiled frame."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Net() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x).flatten(1)
            torch._dynamo.graph_break()
        return x


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pruned(model: nn.Module) -> nn.Module:
    """Hooks left on the first linear of each Net, made permanent on the second."""
    for module in model.modules():
        if isinstance(module, Net):
            prune.l1_unstructured(module.a, "weight", 0.9)
            prune.l1_unstructured(module.c, "weight", 0.9)
            prune.remove(module.c, "weight")
            assert module.norm.running_mean is not None
            module.norm.running_mean.normal_()
    return model.eval()


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_equals_the_pruned_model_at_every_batch_size(dynamic: bool | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fxprune")
    model = pruned(Net())
    compiled = torch.compile(model, backend=fxprune, options=PACKED, dynamic=dynamic)
    for batch in (3, 5, 9, 1, 2):
        x = torch.randn(batch, 64)
        assert_equal(compiled(x), model(x))
    assert "a.weight -> nonzeros" in caplog.text and "c.weight -> nonzeros" in caplog.text


@torch.no_grad()
def test_weights_changed_in_place_are_seen() -> None:
    model = pruned(Net())
    compiled = torch.compile(model, backend=fxprune, options=PACKED)
    x = torch.randn(4, 64)
    before = compiled(x)
    weight = model.get_parameter("c.weight")
    weight.mul_(2)
    assert_equal(compiled(x), model(x))
    assert not torch.allclose(before, model(x))
    weight.mul_(0.5)
    assert_equal(compiled(x), before)


@torch.no_grad()
def test_blocks_that_share_a_frame_keep_their_own_weights() -> None:
    model = pruned(Blocks())
    compiled = torch.compile(model, backend=fxprune, options=PACKED)
    for batch in (4, 7):
        x = torch.randn(batch, 64)
        assert_equal(compiled(x), model(x))


def test_with_gradients_the_graph_stays_dense_and_trains(caplog: pytest.LogCaptureFixture) -> None:
    model = pruned(Net())
    x = torch.randn(4, 64)
    expected = torch.autograd.grad(model(x).square().sum(), [model.get_parameter("c.weight")])
    compiled: Any = torch.compile(model, backend=fxprune)
    got = torch.autograd.grad(compiled(x).square().sum(), [model.get_parameter("c.weight")])
    assert_equal(got[0], expected[0])
    assert "gradients are enabled" in caplog.text


@torch.no_grad()
def test_under_autocast_the_graph_stays_dense_and_follows_it(caplog: pytest.LogCaptureFixture) -> None:
    model, x = pruned(Net()), torch.randn(4, 64)
    compiled = torch.compile(model, backend=fxprune, options=PACKED)
    assert_equal(compiled(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = compiled(x), model(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    # Two roundings to bfloat16 a layer, in another order than eager's.
    assert float((got - expected).abs().max()) <= 5e-2 * float(expected.abs().max())
    assert_equal(compiled(x), model(x))
    assert "autocast is on" in caplog.text


@torch.no_grad()
def test_unknown_option_is_refused() -> None:
    compiled = torch.compile(pruned(Net()), backend=fxprune, options={"layuot": "dense"})
    # Dynamo wraps what a backend raises, and keeps its words.
    with pytest.raises(
        torch._dynamo.exc.BackendCompilerFailed, match=r"unknown option 'layuot'. Did you mean 'layout'\?"
    ):
        compiled(torch.randn(2, 64))
