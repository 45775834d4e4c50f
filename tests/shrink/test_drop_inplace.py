"""Dropped blocks and memory: what is written in place, inside and outside of them, and the strides they hand on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxprune.errors import PlanError
from fxprune.graph.program import Program
from fxprune.shrink.drop.drop import drop_blocks
from tests.oracle import assert_close
from tests.shrink.drop_models import Apply, Between, D, Pre, dropped, find_block, program_of, refused, replaced, run

IN_PLACE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    # The block's own write goes with it.
    "adds to its input": (lambda linear, x: x.add_(linear(x)), lambda block, x: block(x)),
    "adds to its input, twice": (lambda linear, x: x.add_(linear(x)).add_(linear(x)), lambda block, x: block(x)),
    "relu on its input": (lambda linear, x: x + linear(x.relu_()), lambda block, x: block(x)),
    "adds to an alias": (
        lambda linear, x: x.view(-1, D).add_(linear(x).view(-1, D)).view(x.shape), lambda block, x: block(x)
    ),
    "one after the other": (lambda linear, x: x.add_(linear(x)), lambda block, x: block(block(x)) + 1),
    # What the rest writes must reach what it reached before.
    "output written later": (lambda linear, x: x + linear(x), lambda block, x: (block(x).mul_(3), x.add(0))),
    "input written later": (lambda linear, x: x + linear(x), lambda block, x: (block(x), x.mul_(3))),
    "view of the output written": (
        lambda linear, x: x + linear(x), lambda block, x: (F.relu_(block(x).transpose(0, 1)), x.tanh())
    ),
    "output written through a dropout": (
        lambda linear, x: x + linear(x), lambda block, x: (F.dropout(block(x), 0.1, False).mul_(3), x.add(0))
    ),
    "output's part filled": (lambda linear, x: x + linear(x), lambda block, x: (fill(block(x)), x)),
    "input written before": (lambda linear, x: x + linear(x), lambda block, x: block(fill(x))),
    "chain, output written": (lambda linear, x: x + linear(x), lambda block, x: (block(block(x)).mul_(3), x.add(0))),
    "chain, middle written": (
        lambda linear, x: x + linear(x), lambda block, x: (lambda y: (block(y), y.mul_(3), x.add(0)))(block(x))
    ),
}  # fmt: skip


def fill(x: Tensor) -> Tensor:
    x[:, 0] = 7
    return x


@pytest.mark.parametrize("name", IN_PLACE)
def test_writes_in_place(name: str) -> None:
    function, call = IN_PLACE[name]
    model, x = Between(Apply(function), call), torch.randn(3, 4, D)
    result = dropped(model, ["block"], x)
    # An identity that hands out memory of its own: writes to it do not reach its input.
    assert_close(run(result, x), run(replaced(model, ["block"], torch.clone), x))


# The block is a linear, or writes to its input first.
BRANCHES: dict[str, Callable[..., Any]] = {
    "added to the stream in place": lambda block, x: x.add_(block(x.tanh())),
    "the stream added to it": lambda block, x: block(x.tanh()).add_(x),
    "twice": lambda block, x: (lambda y: y.add_(block(y.tanh())))(x.add_(block(x.tanh()))),
    "scaled in place": lambda block, x: x + block(x.tanh()).mul_(0.5).div_(3),
    "stream read before": lambda block, x: (lambda y: (x.add_(block(x.tanh())), y))(x.tanh()),
    # What the rest writes must reach what it reached before.
    "sum written later": lambda block, x: ((x + block(x.tanh())).mul_(3), x.add(0)),
    "stream written later": lambda block, x: (x + block(x.tanh()), x.mul_(3)),
    "stream written before": lambda block, x: (lambda y: fill(x) + y)(block(x.tanh())),
    "sum in place, written later": lambda block, x: x.add_(block(x.tanh())).mul_(3),
    "sum in the branch's memory, written later": lambda block, x: (block(x.tanh()).add_(x).mul_(3), x.add(0)),
    "view of the sum written": lambda block, x: (F.relu_((x + block(x.tanh())).transpose(0, 1)), x.tanh()),
}


@pytest.mark.parametrize("writes", [False, True], ids=["", "writes to its input"])
@pytest.mark.parametrize("name", BRANCHES)
def test_branches_and_writes_in_place(name: str, writes: bool) -> None:
    block = Apply((lambda linear, x: linear(x.relu_())) if writes else (lambda linear, x: linear(x)))
    model, x = Between(block, BRANCHES[name]), torch.randn(3, 4, D)
    result = dropped(model, ["block"], x)
    assert {name.split(".")[0] for name, _ in result.named_parameters()} == {"before", "after"}
    assert_close(run(result, x), run(replaced(model, ["block"], torch.zeros_like), x))


def test_a_sum_into_a_graph_input_leaves_with_its_branch() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.after = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            x += self.block(x.tanh())
            return self.after(x)

    model, x = Model(), torch.randn(3, D)
    result, kept = dropped(model, ["block"], x), x.clone()
    assert_close(result(x), model.after(kept))
    assert torch.equal(x, kept)
    assert find_block(program_of(model, x), "block").parameters == D * D + D


def test_only_a_written_output_is_copied() -> None:
    x = torch.randn(3, 4, D)
    for name in ("output written later", "adds to its input"):
        function, call = IN_PLACE[name]
        result = dropped(Between(Apply(function), call), ["block"], x)
        copies = [n for n in result.graph.nodes if n.target is torch.ops.aten.clone.default]
        assert len(copies) == (name == "output written later")


def test_a_written_copy_of_a_graph_input_leaves_the_callers_tensor_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Pre()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x).mul_(2)

    model, x = Model(), torch.randn(3, D)
    result = dropped(model, ["block"], x)
    kept = x.clone()
    assert torch.equal(result(x), 2 * kept) and torch.equal(x, kept)


HANDED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "the input": lambda block, x: block(x),
    "the input, twice": lambda block, x: block(block(x)),
    "a view": lambda block, x: block(x)[0],
    "another output": lambda block, x: (lambda y: (y, block(y)))(x.exp()),
    "a view of another output": lambda block, x: (lambda y: {"y": y.flatten(), "of y": block(y)})(x.exp()),
    "one of a chain": lambda block, x: (lambda y: (y, block(y)))(block(x)),
}


@pytest.mark.parametrize("name", HANDED)
def test_what_a_caller_gets_is_memory_of_its_own(name: str) -> None:
    """A caller who writes to an output changes neither the input nor another output, as with the block."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Pre()

        def forward(self, x: Tensor) -> Any:
            return HANDED[name](self.block, x)

    x = torch.randn(3, D)
    result, kept = dropped(Model(), ["block"], x), x.clone()
    outputs = pytree.tree_leaves(result(x))
    for number, output in enumerate(outputs):
        others = [o.clone() for o in outputs]
        output.fill_(number)
        assert torch.equal(x, kept)
        assert all(torch.equal(a, b) for n, (a, b) in enumerate(zip(outputs, others)) if n != number)


def test_a_write_to_a_graph_input_that_nobody_reads_stays() -> None:
    def call(block: nn.Module, x: Tensor) -> Tensor:
        y = block(x.exp())
        x.add_(1)
        return y

    class Model(Between):
        def forward(self, x: Tensor) -> Tensor:
            return call(self.block, x)

    x = torch.randn(3, D)
    result = dropped(Model(Pre()), ["block"], x)
    kept = x.clone()
    assert torch.equal(result(x), kept.exp()) and torch.equal(x, kept + 1)


@pytest.mark.parametrize(
    ("function", "call", "why"),
    [
        (
            lambda linear, x, other: x + linear(other.relu_()),
            lambda block, x: block(x, x.exp()),
            "relu_ (aten.relu_.default) writes to exp, which is computed outside",
        ),
        (
            lambda linear, x: x.add_(linear(x)),
            lambda block, x: (lambda view: block(x) + view)(x.view(x.shape)),
            "add_ (aten.add_.Tensor) writes to linear, which add reads later",
        ),
        (
            lambda linear, x: fill(x + linear(x)),
            lambda block, x: block(x),
            "fill_ (aten.fill_.Tensor) writes to its output after the residual sum",
        ),
    ],
)  # fmt: skip
def test_writes_in_place_that_keep_a_block(function: Any, call: Any, why: str) -> None:
    error = refused(Between(Apply(function), call), "block", torch.randn(3, 4, D))
    assert why in error.why and "in place" in error.do


def test_other_strides_are_followed_and_refused_where_a_view_needs_the_old_ones() -> None:
    def call(block: nn.Module, x: Tensor) -> Tensor:
        return block(x.transpose(0, 1)).reshape(x.shape)

    def call_view(block: nn.Module, x: Tensor) -> Tensor:
        return block(x.transpose(0, 1)).view(x.shape)

    add = Apply(lambda linear, x: linear(x) + x)
    x = torch.randn(3, 4, D)
    model = Between(add, call)
    program = program_of(model, x)
    result = dropped(model, ["block"], x)
    assert_close(run(result, x), run(replaced(model, ["block"]), x))
    with torch.no_grad():
        seen = Strides(result)
        seen.run(x, enable_io_processing=False)
    assert seen.wrong == []
    # The same check finds the strides of the old program wrong when its block is bypassed, so it can fail.
    program = program_of(Between(add, call_view), x)
    with pytest.raises(PlanError, match="other strides") as caught:
        drop_blocks(program, [find_block(program, "block")])
    assert '"block"' in caught.value.where and "view" in caught.value.why and "reshape" in caught.value.do


class Strides(torch.fx.Interpreter):
    """Compares each tensor's strides with those that its node announces, at the example's sizes."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.wrong: list[str] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        announced = n.meta.get("val")
        if isinstance(announced, Tensor) and [int(s) for s in announced.stride()] != list(value.stride()):
            self.wrong.append(n.name)
        return value
