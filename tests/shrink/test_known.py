"""What counts as known of a graph's values is what they are, whatever the inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.nn import functional as F

from fxprune.capture.capture import capture
from fxprune.graph.program import Program
from fxprune.shrink.dead.known import Known
from fxprune.shrink.dead.propagate import Propagation


class Recorded(Interpreter):
    """Runs a program and keeps what each op made, before later ops write to it."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.made: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor):
            self.made[n.name] = value.clone()
        return value


def known_values(program: Program) -> dict[str, Known]:
    """What is known of each op's output where a later op reads it; of what is written to, as it is after that."""
    found: dict[str, Known] = {}

    def visit(node: Node, get: Any) -> None:
        for read in node.all_input_nodes:
            state = get(read)
            if isinstance(state, Known) and read.op == "call_function":
                found.setdefault(read.name, state)

    Propagation(program, lambda _, tensor: tensor).run(visit)
    return found


def hold(model: nn.Module, *inputs: Tensor) -> dict[str, Known]:
    """Everything that is known, held against what the program computes from several inputs."""
    program = capture(model.eval(), inputs, {}).program
    known = known_values(program)
    for scale in (1.0, -2.0, 0.0, 30.0):
        run = Recorded(program)
        with torch.no_grad():
            run.run(*[x * scale if x.is_floating_point() else x.flip(0) for x in inputs])
        for name, state in known.items():
            actual = run.made[name]
            assert actual.shape == state.value.shape, name
            said = state.value.double()
            wrong = state.sure & ((actual.double() - said).abs() > 1e-5 * (1 + said.abs()))
            assert not bool(wrong.any()), f"{name}: {int(wrong.sum())} elements are not what they were said to be"
    return known


def drawn(*shape: int, seed: int = 0, zeros: float = 0.5) -> nn.Parameter:
    """A weight with zero rows and zero columns, and zeros elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape[0], generator=generator) < zeros] = 0
    if len(shape) > 1:
        weight[:, torch.rand(shape[1], generator=generator) < zeros / 2] = 0
    weight[torch.rand(shape, generator=generator) < 0.2] = 0
    return nn.Parameter(weight)


class Ops(nn.Module):
    """One function of an image x [2, 4, 6, 6] whose channels 0 and 1 are constants, and of parameters."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = drawn(4, 4, 1, 1, seed=3), drawn(4, seed=1, zeros=0)
        with torch.no_grad():
            self.weight[:2] = 0
        self.square, self.wide = drawn(6, 6, seed=4), drawn(4, 8, seed=5)
        self.kernel, self.scale = drawn(4, 1, 3, 3, seed=6), drawn(4, seed=7)
        self.full, self.table = drawn(4, 4, 3, 3, seed=8), drawn(9, 4, seed=9)
        with torch.no_grad():
            self.table[:, 2] = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, F.conv2d(x, self.weight, self.bias)).clone().sin()


OPS: dict[str, Any] = {
    "relu": lambda m, x: x.relu(),
    "silu in place": lambda m, x: F.silu(x, inplace=True) + x,
    "written through a view": lambda m, x: (x[:, :1].add_(x[:, 3:]), x)[1],
    "written as a whole": lambda m, x: (x.mul_(x.flip(1)), x)[1],
    "copied into": lambda m, x: (x[:, 0].copy_(x[:, 2]), x)[1],
    "product with zeros": lambda m, x: x * m.scale[:, None, None],
    "quotient": lambda m, x: x / (1 + m.scale.abs()[:, None, None]),
    "comparison": lambda m, x: (x > 0.1).float(),
    "where": lambda m, x: torch.where(x > 0.1, x, x * 2),
    "masked fill": lambda m, x: x.masked_fill(x > 0.2, 1.5),
    "power": lambda m, x: x**2 + x.abs() ** 0.5,
    "clamp": lambda m, x: x.clamp(-0.1, 0.2),
    "matrix product": lambda m, x: x @ m.square,
    "weight on the left": lambda m, x: m.square @ x,
    "product of activations": lambda m, x: x @ x.relu().transpose(-1, -2),
    "linear": lambda m, x: F.linear(x.permute(0, 2, 3, 1), m.wide.t(), None),
    "addmm": lambda m, x: torch.addmm(m.bias, x.mean((2, 3)), m.wide[:, :4], beta=2, alpha=3),
    "addmm of constants": lambda m, x: torch.addmm(m.bias, x[:, :2].mean((2, 3)), m.table[:2], beta=2, alpha=3),
    "batched product": lambda m, x: torch.bmm(x.flatten(1, 2), m.square.expand(x.shape[0], 6, 6)),
    "convolution": lambda m, x: F.conv2d(x, m.full),
    "padded convolution": lambda m, x: F.conv2d(x, m.full, m.bias, padding=1, stride=2),
    "depthwise": lambda m, x: F.conv2d(x, m.kernel, m.bias, padding=1, groups=4),
    "grouped": lambda m, x: F.conv2d(x, m.full[:, :2], groups=2),
    "transposed": lambda m, x: F.conv_transpose2d(x, m.full, m.bias, stride=2, padding=1),
    "transposed in groups": lambda m, x: F.conv_transpose2d(x, m.full[:, :2], groups=2, stride=2),
    "batch norm": lambda m, x: F.batch_norm(x, m.bias, m.scale.abs() + 1, m.scale, m.bias),
    "layer norm": lambda m, x: F.layer_norm(x.permute(0, 2, 3, 1), (4,), m.scale, m.bias),
    "group norm": lambda m, x: F.group_norm(x, 2, m.scale, m.bias),
    "instance norm": lambda m, x: F.instance_norm(x, weight=m.scale, bias=m.bias),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x, x.permute(0, 1, 3, 2)),
    "attention of channels": lambda m, x: F.scaled_dot_product_attention(*[x.flatten(2).transpose(1, 2)] * 3),
    "attention with a mask": lambda m, x: F.scaled_dot_product_attention(
        *[x.flatten(2).transpose(1, 2)] * 3, attn_mask=torch.ones(36, 36, dtype=torch.bool).tril()
    ),
    "mean": lambda m, x: x.mean((2, 3)),
    "mean of channels": lambda m, x: x[:, :2].mean(1),
    "sum": lambda m, x: x.sum(1, keepdim=True) + x[:, :2].sum(1, keepdim=True),
    "sum over a batch": lambda m, x: x.sum(0),
    "largest pool": lambda m, x: F.max_pool2d(x, 3, 2, padding=1),
    "average pool": lambda m, x: F.avg_pool2d(x, 3, 2, padding=1),
    "average pool without padding": lambda m, x: F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False),
    "adaptive pool": lambda m, x: F.adaptive_avg_pool2d(x, 3),
    "nearest": lambda m, x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda m, x: F.interpolate(x, scale_factor=1.7, mode="bilinear", align_corners=False),
    "padding": lambda m, x: F.pad(x, (1, 2, 0, 1), value=-0.5),
    "reflection": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "softmax": lambda m, x: x.softmax(1) + x.softmax(-1),
    "views": lambda m, x: x.view(x.shape[0], 2, 2, -1).transpose(1, 2).reshape(x.shape[0], 4, 6, 6),
    "concatenation": lambda m, x: torch.cat([x, x.relu(), m.scale[None, :, None, None].expand(x.shape[0], 4, 6, 6)], 1),
    "stack": lambda m, x: torch.stack([x, x * 2], 1).flatten(1, 2),
    "halves": lambda m, x: (lambda a, b: a * b)(*x.chunk(2, 1)),
    "pieces": lambda m, x: torch.cat(x.split([1, 2, 1], 1)[::-1], 1),
    "gated": lambda m, x: F.glu(x, 1),
    "slices": lambda m, x: x[:, 1::2, 2:, :-1] + x[:, 0:1, 2:, :-1],
    "selected": lambda m, x: x.select(1, 1) + x[:, 0],
    "repeated": lambda m, x: x.repeat(1, 2, 1, 1).repeat_interleave(2, 1),
    "shuffled pixels": lambda m, x: F.pixel_shuffle(x, 2),
    "shuffled channels": lambda m, x: F.channel_shuffle(x, 2),
    "rolled": lambda m, x: x.roll(1, 1).flip(2),
    "filled": lambda m, x: torch.zeros_like(x) + torch.full((4, 1, 1), 0.5) + x.new_ones(6) * torch.arange(6),
    "counted by batch": lambda m, x: x + torch.arange(x.shape[0])[:, None, None, None],
    "divided by a size": lambda m, x: x / x.shape[0] + x.shape[0],
    "batch put beside": lambda m, x: torch.cat([m.scale[None, :, None, None].expand(1, 4, 6, 6), x], 0),
    "part of a batch": lambda m, x: x[: x.shape[0] - 1] + x[1:],
    "embedding": lambda m, x: F.embedding((x > 0).long().clamp(0, 8), m.table),
    "running sum": lambda m, x: x.cumsum(1),
    "sorted": lambda m, x: x.sort(1).values,
    "random": lambda m, x: x + 0 * torch.rand_like(x),
    "dropped": lambda m, x: F.dropout(x, 0.5, training=False),
    "other type": lambda m, x: x.to(torch.float64).float(),
    "einsum": lambda m, x: torch.einsum("bchw,cd->bdhw", x, m.wide),
}


@pytest.mark.parametrize("name", OPS)
def test_what_is_known_after_an_op_is_so(name: str):
    hold(Ops(OPS[name]), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)))


SEEN_THROUGH = (
    "relu", "silu in place", "product with zeros", "quotient", "comparison", "where", "matrix product", "linear",
    "addmm", "addmm of constants", "convolution", "padded convolution", "depthwise", "grouped", "transposed",
    "transposed in groups", "batch norm", "layer norm", "group norm", "instance norm", "attention of channels",
    "mean", "mean of channels",
    "largest pool", "average pool", "adaptive pool", "nearest", "bilinear", "padding", "views", "concatenation",
    "stack", "pieces", "slices", "selected", "repeated", "shuffled channels", "rolled", "filled", "embedding",
    "dropped", "other type",
)  # fmt: skip


@pytest.mark.parametrize("name", SEEN_THROUGH)
def test_constants_are_seen_through_an_op(name: str):
    known = hold(Ops(OPS[name]), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert any(op.startswith("clone") and bool(state.sure.any()) for op, state in known.items())


UNKNOWN = ("counted by batch", "divided by a size", "batch put beside", "part of a batch", "sum over a batch", "random")


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_depends_on_the_size_of_a_batch_is_not_known(name: str):
    known = hold(Ops(OPS[name]), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert not any(op.startswith("clone") for op in known)


def test_a_pattern_along_a_batch_is_known_in_channels_that_it_leaves_alone():
    """Channels 0 and 1 are constants; rows are doubled, with one added to channel 0 of the second, and regrouped."""

    def function(m: Ops, x: Tensor) -> Tensor:
        added = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])[:, :, None, None]
        return (x[:, None] + added).flatten(0, 1).view(2, -1, 4, 6, 6)[:, 0]

    known = hold(Ops(function), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)))
    (sure,) = [state.sure for op, state in known.items() if op.startswith("clone")]
    assert bool(sure[:, 1].all()) and not bool(sure[:, 0].any())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(sorted(set(OPS) - {"einsum"})), min_size=2, max_size=3), st.integers(2, 3))
def test_any_two_or_three_ops_one_after_the_other(names: list[str], batch: int):
    def function(m: Ops, x: Tensor) -> Tensor:
        for name in names:
            if x.dim() != 4 or tuple(x.shape[1:]) != (4, 6, 6):
                break
            x = OPS[name](m, x)
        return x

    hold(Ops(function), torch.randn(batch, 4, 6, 6, generator=torch.Generator().manual_seed(1)))
