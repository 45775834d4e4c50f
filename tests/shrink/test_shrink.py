"""The graph that shrink makes says of its values what they are when it runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from fxprune import Channels, Plan, Rule
from fxprune.capture.capture import capture
from fxprune.couple.couple import couple
from fxprune.select.decide import choose_selection
from fxprune.shrink.shrink import shrink
from tests.structured_oracle import net


class Compared(Interpreter):
    """Holds what the graph says of each value against the value."""

    def run_node(self, n: Node) -> object:
        value, said = super().run_node(n), n.meta.get("val")
        if n.op == "call_function" and isinstance(value, Tensor):
            assert said.shape == value.shape and said.dtype == value.dtype, n.name
            assert said.stride() == value.stride() or 1 in said.shape, n.name
        return value


VALUES = {
    "a transpose": lambda m, x: m.last(m.first(x).transpose(1, 2).relu().transpose(1, 2)),
    "a permuted image": lambda m, x: m.last(m.conv(x[:, None]).permute(0, 2, 3, 1).tanh() @ m.mix),
    "a view of a transpose": lambda m, x: m.last(m.first(x).transpose(0, 1).exp().unsqueeze(2).sum(2)),
}


@pytest.mark.parametrize("kind", VALUES)
def test_shapes_and_strides_of_values_are_those_of_the_smaller_graph(kind: str) -> None:
    model = net(
        VALUES[kind],
        first=nn.Linear(10, 16),
        conv=nn.Conv2d(1, 16, 3, padding=1),
        last=nn.Linear(16, 4),
    )
    model.mix = nn.Parameter(torch.randn(16, 16))
    x = torch.randn(3, 5, 10)
    captured = capture(model, (x,), {}, static=True)
    program = captured.program
    Compared(program).run(x)
    coupling = couple(program)
    plan = Plan([Rule("first.weight" if "image" not in kind else "conv.weight", Channels(0.5, align=1))])
    keep = choose_selection(captured, program, plan, coupling=coupling).selection.keep
    smaller = shrink(program, coupling, keep)
    assert keep and sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in program.parameters())
    Compared(smaller).run(x)
