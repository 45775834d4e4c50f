"""What only train mode does: refused where it has outputs, parameters or state of its own, and told elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import CaptureError
from tests.emit.trainable_models import emitted
from tests.oracle import snapshot


class Branched(nn.Module):
    """A body, and what train mode does with its output and the head's."""

    def __init__(self, branch: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.mean = nn.Buffer(torch.zeros(8))
        self.branch = branch

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        return self.branch(self, x, self.head(x)) if self.training else self.head(x)


def keeps_a_mean(m: Any, x: Tensor, y: Tensor) -> Tensor:
    m.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return y


BRANCHES: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str]] = {
    "an auxiliary head": (lambda m, x, y: (y, m.aux(x)), "2 outputs where eval mode returns 1 and reads aux.weight"),
    "another structure": (lambda m, x, y: {"y": y}, "returns another structure"),
    "parameters": (lambda m, x, y: y + m.aux(x), "reads aux.weight, aux.bias, which eval mode does not"),
    "state": (keeps_a_mean, "writes to mean"),
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_a_branch_of_train_mode_is_refused(kind: str) -> None:
    branch, words = BRANCHES[kind]
    model, x = Branched(branch).eval(), torch.randn(3, 8)
    before = snapshot(model)
    with pytest.raises(CaptureError, match=words) as caught:
        fxprune.transform(model, None, (x,), trainable=True, progress=False)
    assert snapshot(model) == before
    assert "self.training" in caught.value.do
    # Eval mode is all that an inference result has.
    fxprune.transform(model, None, (x,), progress=False, options={"compile": False})


def test_tied_parameters_are_known_under_every_name() -> None:
    def other_name(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.aux(x) * torch.rand(())

    model = Branched(other_name).eval()
    model.aux.weight, model.aux.bias = model.head.weight, model.head.bias
    _, notes = emitted(model, torch.randn(3, 8))
    assert len(notes) == 1 and "by their flags" in notes[0]


def test_regions_without_gradients_are_known_where_the_modes_part() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.back, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.back(x)
            return self.head(x * torch.rand(()) if self.training else x)

    model, x = Frozen().eval(), torch.randn(3, 8)
    result, notes = emitted(model, x)
    assert len(notes) == 1 and "by their flags" in notes[0]
    for module in (result, oracle := copy.deepcopy(model)):
        module(x).square().sum().backward()
    assert result.get_parameter("back.weight").grad is None
    torch.testing.assert_close(result.get_parameter("head.weight").grad, oracle.head.weight.grad)
