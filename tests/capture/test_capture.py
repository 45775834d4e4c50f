"""Programs: plain graphs under the model's own names, and what capturing leaves behind (nothing)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection

from fxprune.capture.capture import capture
from fxprune.errors import CaptureError, InputError
from tests.oracle import assert_close


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.Dropout(0.5), nn.BatchNorm1d(24), nn.Linear(24, 8)).eval()


def test_a_program_is_a_plain_graph_over_the_models_own_tensors() -> None:
    model, x = perceptron(), torch.randn(5, 16)
    captured = capture(model, (x,), {})
    program = captured.program
    assert type(program).__mro__[1] is torch.fx.GraphModule
    assert all(node.op != "call_module" for node in program.graph.nodes)
    for name, parameter in model.named_parameters():
        assert program.get_parameter(name) is parameter
    assert all(p.requires_grad for p in program.parameters())
    assert captured.entry.names == ("x",) or captured.entry.names == ("input",)
    assert_close(program(x).detach(), model(x).detach())
    program.train()
    program.eval()


def test_weights_are_fetched_right_before_their_first_use() -> None:
    nodes = list(capture(perceptron(), (torch.randn(5, 16),), {}).program.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        if node.op == "get_attr" and node.users:
            first = min(order[user] for user in node.users)
            assert all(n.op == "get_attr" for n in nodes[order[node] : first])


def test_tied_names_stay_one_tensor() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[1].weight = model[0].weight
    program = capture(model, (torch.randn(2, 8),), {}).program
    assert program.get_parameter("0.weight") is program.get_parameter("1.weight")


@pytest.mark.parametrize("fails", [False, True])
def test_the_tensors_given_are_left_unmarked(fails: bool) -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * ({3: 2.0}[x.shape[0]] if fails else 1.0)

    x = torch.randn(3, 16)
    captured = capture(Tables().eval(), (x,), {})
    assert not vars(x)
    assert bool(captured.notes) is fails


def test_dynamic_shapes_in_every_form_that_export_takes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x).sum((0, 1)) + y.sum(0)

    x, y = torch.randn(2, 5, 16), torch.randn(3, 16)
    shapes = ShapesCollection()
    shapes[x] = {1: Dim.DYNAMIC}
    for form in (shapes, {"x": {1: Dim.DYNAMIC}, "y": None}, ({1: Dim.DYNAMIC}, None)):
        entry = capture(Model().eval(), (x, y), {}, form).entry
        entry.check((torch.randn(2, 9, 16), y), {})
        for bad in ((torch.randn(3, 5, 16), y), (x, torch.randn(4, 16))):
            with pytest.raises(InputError):
                entry.check(bad, {})


def test_a_size_that_cannot_be_dynamic_as_asked_is_an_error() -> None:
    with pytest.raises(CaptureError, match=r"torch\.export"):
        capture(perceptron(), (torch.randn(5, 16),), {}, ({1: Dim.DYNAMIC},))


def test_writing_to_a_view_of_a_buffer_is_state_and_to_an_input_is_not() -> None:
    class Writes(nn.Module):
        table: Tensor

        def __init__(self, to_input: bool) -> None:
            super().__init__()
            self.to_input = to_input
            self.register_buffer("table", torch.zeros(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            (x if self.to_input else self.table)[1:, 2:].t()[0].fill_(1)
            return x + self.table

    assert capture(Writes(True).eval(), (torch.zeros(4, 8),), {}).existing == {}
    with pytest.raises(InputError, match='"table"'):
        capture(Writes(False).eval(), (torch.zeros(4, 8),), {})
