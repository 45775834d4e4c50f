"""verify: each promise of a program, broken on purpose, is told with the nodes around it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.capture.capture import Capture, capture
from fxprune.errors import CheckError
from fxprune.graph.program import Program, copy_program
from fxprune.graph.verify import verify

aten = torch.ops.aten
X = torch.randn(2, 3, 8, 8)


class Model(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.register_buffer("scale", torch.rand(6, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.conv(x)).relu_() * self.scale
        return y.mean((2, 3)), y


def captured() -> Capture:
    return capture(Model().eval(), (X,), {})


def check(program: Program, original: Capture) -> None:
    sizes = [getattr(want, "sizes", None) for want in original.entry.inputs]
    verify(program, "a test", origin=original.program, sizes=sizes)


def node(program: Program, target: Any) -> Node:
    return next(n for n in program.graph.nodes if n.target == target)


def add(program: Program, target: Any, *args: Any) -> Node:
    output = next(n for n in program.graph.nodes if n.op == "output")
    with program.graph.inserting_before(output):
        return program.graph.call_function(target, args)


def rename(program: Program) -> None:
    node(program, aten.conv2d.default).name = node(program, aten.relu_.default).name


def reorder(program: Program) -> None:
    node(program, "scale").append(node(program, aten.conv2d.default))


def lose(program: Program) -> None:
    del program.get_submodule("conv")._parameters["weight"]


def swap(program: Program) -> None:
    program.get_submodule("conv")._parameters["weight"] = nn.Parameter(torch.rand(5, 3, 3, 3))


def retype(program: Program) -> None:
    program.get_submodule("conv")._parameters["weight"] = nn.Parameter(torch.rand(6, 3, 3, 3).double())


def call_module(program: Program) -> None:
    program.add_module("act", nn.ReLU())
    output = next(n for n in program.graph.nodes if n.op == "output")
    with program.graph.inserting_before(output):
        program.graph.call_module("act", (node(program, aten.conv2d.default),))


def drop_input(program: Program) -> None:
    x = node(program, "x")
    with program.graph.inserting_before(x):
        other = program.graph.placeholder("other")
    other.meta = dict(x.meta)
    x.replace_all_uses_with(other)
    program.graph.erase_node(x)


def write_to_buffer(program: Program) -> None:
    add(program, aten.mul_.Tensor, node(program, "scale"), 2)


def write_to_input(program: Program) -> None:
    add(program, aten.add_.Tensor, add(program, aten.view.default, node(program, "x"), [-1]), 1)


def hand_out_input(program: Program) -> None:
    view = add(program, aten.view.default, node(program, "x"), [-1])
    output = next(n for n in program.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], view),)  # pyright: ignore


def hand_out_twice(program: Program) -> None:
    output = next(n for n in program.graph.nodes if n.op == "output")
    output.args = ((output.args[0][0], output.args[0][0]),)  # pyright: ignore


def hand_out_less(program: Program) -> None:
    output = next(n for n in program.graph.nodes if n.op == "output")
    output.args = (output.args[0][:1],)  # pyright: ignore


def lie_about_shape(program: Program) -> None:
    conv = node(program, aten.conv2d.default)
    conv.meta["val"] = conv.meta["val"].new_empty(2, 7, 6, 6)


def lie_about_a_later_one(program: Program) -> None:
    mean = node(program, aten.mean.dim)
    mean.meta["val"] = mean.meta["val"].double()


def cannot_run(program: Program) -> None:
    node(program, aten.mean.dim).args = (node(program, aten.mul.Tensor), [2, 9])


BROKEN: dict[str, Callable[[Program], None]] = {
    "stands twice": rename,
    "which stands after it": reorder,
    "fetches what the program does not hold": lose,
    "says [6, 3, 3, 3], the tensor is [5, 3, 3, 3]": swap,
    "says torch.float32, the tensor is torch.float64": retype,
    "it is a call_module": call_module,
    "it takes ['other'], the model takes ['x']": drop_input,
    'it writes to "scale"': write_to_buffer,
    "it writes to the input x": write_to_input,
    "it hands out memory of the input x": hand_out_input,
    "it hands out memory that mean is too": hand_out_twice,
    "it hands out 1 tensors, the model hands out 2": hand_out_less,
    "its fake value is not true: it says [2, 7, 6, 6]": lie_about_shape,
    "its fake value is not true: it says torch.float64": lie_about_a_later_one,
    "it cannot run on what it reads: IndexError": cannot_run,
}


def test_a_capture_keeps_every_promise() -> None:
    found = captured()
    check(found.program, found)
    check(copy_program(found.program), found)


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_promise_is_told(words: str) -> None:
    found = captured()
    program = copy_program(found.program)
    BROKEN[words](program)
    with pytest.raises(CheckError) as caught:
        check(program, found)
    text = str(caught.value)
    assert words in text and "the stage a test left a program" in text
    assert "placeholder" in text or "conv2d" in text


def test_an_entry_check_must_cover_the_sizes_that_the_graph_fixes() -> None:
    found = capture(Model().eval(), (X,), {}, static=True)
    verify(found.program, "a test", sizes=[(2, 3, 8, 8)])
    with pytest.raises(CheckError, match="dim 0 is 2 in the graph, and the entry check takes s0"):
        verify(found.program, "a test", sizes=[("s0", 3, 8, 8)])


def test_what_the_model_writes_and_hands_out_it_may() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x.add_(1)
            return x * 2, x.view(-1)

    found = capture(Writes().eval(), (X.clone(),), {})
    check(copy_program(found.program), found)


def test_symbolic_sizes_are_compared_by_the_example() -> None:
    found = captured()
    program = copy_program(found.program)
    mul = node(program, aten.mul.Tensor)
    batch = mul.meta["val"].shape[0]
    mul.meta["val"] = mul.meta["val"].new_empty(operator.mul(batch, 2), 6, 6, 6)
    with pytest.raises(CheckError, match="its fake value is not true"):
        check(program, found)
