"""Writes in place: every name of one memory sees them, in the smaller graph as in the model.

A flag that is all False in the example decides whether something is written, so that a wrong answer shows only at a
call that the example says nothing about. Each model must come out right for every flag, or keep its channels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import Channels, Drop, Plan, Rule, analyze
from fxprune.errors import InputError
from fxprune.shrink import proved as structure
from tests.oracle import assert_close, snapshot
from tests.structured_oracle import channels, kept, net, right, shrunk, sizes, zeroed

FLAG = torch.zeros(5, dtype=torch.bool)
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def through_a_view(m: Any, x: Tensor, flag: Tensor) -> Tensor:
    h = m.a(x)
    h.view(-1, 4, 4).masked_fill_(flag[:, None, None], 1.0)
    return h.sum(-1)


def read_through_an_earlier_view(m: Any, x: Tensor, flag: Tensor) -> Tensor:
    h = m.a(x)
    v = h.view(-1, 4, 4)
    h.masked_fill_(flag[:, None], 1.0)
    return v.sum(-1)


def one_of_two_chunks(m: Any, x: Tensor, flag: Tensor) -> Tensor:
    h = m.a(x)
    left, _ = h.chunk(2, -1)
    left.masked_fill_(flag[:, None], 1.0)
    return h.sum(-1)


def one_of_a_split(m: Any, x: Tensor, flag: Tensor) -> Tensor:
    h = m.a(x)
    left, _ = h.split([4, 12], -1)
    left.masked_fill_(flag[:, None], 1.0)
    return h.sum(-1)


def an_unbound_row(m: Any, x: Tensor, flag: Tensor) -> Tensor:
    h = m.a(x)
    h.unbind(0)[0].masked_fill_(flag[:1], 1.0)
    return h.sum(-1)


def through_dropout(m: Any, x: Tensor, flag: Tensor) -> Tensor:
    h = m.a(x)
    F.dropout(h, 0.5, m.training).masked_fill_(flag[:, None], 1.0)
    return h.sum(-1)


def through_type_as(m: Any, x: Tensor, flag: Tensor) -> Tensor:
    h = m.a(x)
    h.type_as(x).masked_fill_(flag[:, None], 1.0)
    return h.sum(-1)


def through_einsum(m: Any, x: Tensor, flag: Tensor) -> Tensor:
    h = m.a(x)
    torch.einsum("bc->cb", h).masked_fill_(flag, 1.0)
    return h.sum(-1)


def through_broadcast(m: Any, x: Tensor, flag: Tensor) -> Tensor:
    h = m.a(x)
    torch.broadcast_tensors(x[:, :1], h)[1].masked_fill_(flag[:, None], 1.0)
    return h.sum(-1)


WRITES = [
    through_a_view,
    read_through_an_earlier_view,
    one_of_two_chunks,
    one_of_a_split,
    an_unbound_row,
    through_dropout,
    through_type_as,
    through_einsum,
    through_broadcast,
]


def beside(forward: Any, **parts: nn.Module) -> Any:
    """A model of `forward` whose plan always finds something to remove: two layers beside it."""

    def both(m: Any, x: Tensor, *rest: Tensor) -> Tensor:
        return forward(m, x, *rest).flatten(1).sum(1) + m.second(m.first(x.flatten(1)[:, :8]).relu())[:, 0]

    return net(both, first=nn.Linear(8, 16), second=nn.Linear(16, 2), **parts)


@torch.no_grad()
def assert_right_for_every_flag(result: Any, oracle: Any, x: Tensor) -> None:
    assert sizes(result)["first.weight"] == (8, 8)
    for flag in (FLAG, ~FLAG):
        assert_close(result(x, flag), oracle(x, flag))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("forward", WRITES)
def test_every_name_of_the_memory_sees_a_write(forward: Any, check: bool) -> None:
    model = beside(lambda m, x, flag: forward(m, x, flag)[:, None], a=nn.Linear(8, 16))
    result = shrunk(model, X, FLAG, check=check)
    assert_right_for_every_flag(result, zeroed(model, result), X)


def test_writes_that_keep_zeros_keep_the_channels_free() -> None:
    """ReLU in place after every layer, and a residual sum in place, are what most CNNs are made of."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu_(m.a(x))
        y = F.relu_(m.b(h))
        y += h
        left, right = F.relu_(y).chunk(2, -1)
        left.mul_(2.0)
        return m.c(torch.cat([left, right], -1))

    model = net(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 3))
    assert sizes(right(model, X, other=X[:3]))["a.weight"] == (8, 8)


def copied_for_its_layout(m: Any, x: Tensor, flag: Tensor) -> Tensor:
    h = m.a(x).relu()
    q = h.permute(0, 2, 3, 1).contiguous()
    q.masked_fill_(flag[:, None, None, None], 1.0)
    return m.o(h) + m.o(q.permute(0, 3, 1, 2))


def copied_by_reshape(m: Any, x: Tensor, flag: Tensor) -> Tensor:
    h = m.a(x).relu()
    q = h.permute(0, 2, 3, 1).reshape(5, 9, 4)
    q.masked_fill_(flag[:, None, None], 1.0)
    return m.o(h) + m.o(q.view(5, 3, 3, 4).permute(0, 3, 1, 2))


@pytest.mark.parametrize("forward", [copied_for_its_layout, copied_by_reshape])
def test_a_copy_that_one_channel_would_not_need(forward: Any) -> None:
    """A transposed tensor of one channel is contiguous already: what was a copy would be the tensor itself."""
    model = beside(forward, a=nn.Conv2d(8, 4, 1), o=nn.Conv2d(4, 2, 1))
    x = torch.randn(5, 8, 3, 3)
    plan = Plan([Rule("*", Channels(0.5, align=1)), Rule("a.weight", Channels(0.75, align=1))])
    if not any(group.free for group in analyze(model, (x, FLAG)) if group.name == "a.weight[0]"):
        plan = Plan(plan.rules[:1])
    result = shrunk(model, x, FLAG, plan=plan)
    assert_right_for_every_flag(result, zeroed(model, result), x)


def test_a_block_whose_output_is_written_through_a_chunk() -> None:
    """The block's output was memory of its own; without the block it would be its input's."""

    def forward(m: Any, x: Tensor, flag: Tensor) -> Tensor:
        h = m.i(x)
        y = m.block(h)
        left, _ = y.chunk(2, -1)
        left.masked_fill_(flag[:, None], 1.0)
        return m.o(h) + m.o(y)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    model = net(forward, i=nn.Linear(8, 8), block=Block(), o=nn.Linear(8, 3))
    result = shrunk(model, X, FLAG, plan=Plan([Drop("block")]))
    model.block.forward = lambda x: x.clone()
    with torch.no_grad():
        for flag in (FLAG, ~FLAG):
            assert_close(result(X, flag), model(X, flag))


@pytest.mark.parametrize(
    "write",
    [
        lambda s: s.chunk(2)[0].add_(1),
        lambda s: s.split(2)[1].add_(1),
        lambda s: s.unbind(0)[0].add_(1),
        lambda s: F.dropout(s, 0.5, False).add_(1),
        lambda s: s.view(2, 2)[0].add_(1),
    ],
)
def test_state_written_through_a_view_is_refused(write: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        write(m.state)
        return m.a(x)

    model = net(forward, a=nn.Linear(8, 16), state=torch.zeros(4))
    before = snapshot(model)
    with pytest.raises(InputError, match="keeps state"):
        shrunk(model, X, plan=channels(0.5))
    assert snapshot(model) == before


def test_a_result_handed_in_as_memory() -> None:
    """`out=` writes to a tensor by keyword."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        memory = torch.empty_like(h)
        torch.add(h, 1.0, out=memory)
        return m.b(memory)

    model = beside(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 3))
    with torch.no_grad():
        result = shrunk(model, X)
        assert_close(result(X), zeroed(model, result)(X))
    assert "a.weight[0]" not in kept(result)


# --- the call that turns flags -----------------------------------------------------------------------------------


def test_a_flag_that_the_model_fails_on_is_said() -> None:
    def forward(m: Any, x: Tensor, kind: Tensor) -> Tensor:
        return m.second(m.first(x).relu()) + m.kinds(kind)

    model = net(forward, first=nn.Linear(8, 16), second=nn.Linear(16, 4), kinds=nn.Embedding(1, 4))
    result = shrunk(model, X, torch.zeros(5, dtype=torch.int64))
    assert any("flags that the example has constant" in note for note in result.report.notes)
    assert {row.call for row in result.report.checks}.isdisjoint({"flags turned"})


def test_a_flag_is_tried_at_its_other_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that is wrong there alone stays whole: the furthest beyond its own tolerance decides."""

    def forward(m: Any, x: Tensor, flag: Tensor) -> tuple[Tensor, Tensor]:
        hidden = m.first(x).relu()
        return m.second(hidden), flag.double() * hidden.shape[1]

    model = net(forward, first=nn.Linear(8, 16), second=nn.Linear(16, 4))
    assert kept(shrunk(model, X, FLAG)) == {"first.weight[0]": 8}
    shrink = structure.shrink

    def wrong_when_turned(*args: Any) -> Any:
        program = shrink(*args)
        (node,) = [n for n in program.graph.nodes if n.target is torch.ops.aten.mul.Tensor]
        node.args = (node.args[0], node.args[1] * (1 + 1e-7))
        program.recompile()
        return program

    monkeypatch.setattr(structure, "shrink", wrong_when_turned)
    result = shrunk(model, X, FLAG)
    assert kept(result) == {} and any("keeps all its indices" in note for note in result.report.notes)
