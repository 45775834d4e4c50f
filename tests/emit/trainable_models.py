"""What the tests of trainable results share: small models, the results they become, and when two are the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.capture import admit
from fxprune.capture.capture import capture
from fxprune.emit.trainable.modes import training_modes
from fxprune.emit.trainable.module import emit_trainable, origin_of
from fxprune.graph.program import Program
from fxprune.select.mask import PackedMask


@pytest.fixture(autouse=True)
def compiled_code_does_not_pile_up() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def emitted(
    model: nn.Module,
    *args: Any,
    masks: dict[str, PackedMask] | None = None,
    edit: Callable[[Program], Program] = lambda program: program,
    **kwargs: Any,
) -> tuple[Any, list[str]]:
    """The model as a TrainableModule, and the notes of its modes."""
    with admit.untouched(model) if isinstance(model, nn.Module) else contextlib.nullcontext():
        captured = capture(model, args, kwargs)
    modes, notes = training_modes(model, captured, args, kwargs)
    program = edit(captured.program)
    return emit_trainable(program, captured.entry, modes, origin_of(model, captured), masks), notes


def trainable(model: nn.Module, *args: Any, **more: Any) -> Any:
    result, notes = emitted(model, *args, **more)
    assert notes == []
    return result


def seeded(module: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return module(*args, **kwargs)


def assert_same(a: Any, b: Any) -> None:
    """The same kernels on the same numbers: what rounding order may change, and no more."""
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], rtol=1e-6, atol=1e-6, msg=name)


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}


class Net(nn.Module):
    """A convolution with its norm, dropout, a tied pair, a buffer that is not saved and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(8), persistent=False)
        self.register_buffer("shift", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu().mean((2, 3)) * self.scale + self.shift
        return self.second(self.drop(self.first(y)).relu())


def net() -> Net:
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 6, 6)


class Forward(nn.Module):
    """A function of (module, x) as a forward; `parts` are its submodules."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.linear = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.linear(x))
