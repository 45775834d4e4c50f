"""Steps of nets, built by hand, unpacked: each computes what the reference says of it."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.nn import functional as F

from fxprune.capture.capture import capture
from fxprune.errors import InputError
from fxprune.kernels import native
from fxprune.kernels.native import net
from fxprune.kernels.native.net import Finish, Taps
from fxprune.lower.fold import fold
from fxprune.lower.layouts.choose import Chooser
from fxprune.lower.lower import lower
from fxprune.lower.nets.transposed import plain, plain_weight
from fxprune.lower.unpack import unpack
from fxprune.lower.unpack.net_weights import as_transposed, by_groups
from fxprune.select.selection import Selection
from tests.kernels.kernel_case import same_bits
from tests.kernels.net_case import Made, started

from . import test_nets as images
from .test_unpack_nets import BATCHES, fxprune_ops, near, ops

needs_kernel = pytest.mark.skipif(not native.status().available, reason="needs a C++ compiler")
aten = torch.ops.aten


def program_of(made: Made, inputs: list[Tensor], *, held: dict[int, Tensor] | None = None) -> GraphModule:
    """A graph without fake values that calls a net; of the inputs those in `held` are the program's own."""
    _, *operands, program = made.arguments(inputs)
    root, graph = nn.Module(), Graph()
    root.layer = nn.Module()
    root.layer.in_lanes = nn.Module()
    names = ("values", "columns", "order", "counts", "starts", "dense", "words", "brains")
    for name, tensor in zip(names, operands, strict=True):
        root.layer.in_lanes.register_buffer(name, tensor)
    for number, tensor in (held or {}).items():
        root.register_buffer(f"held_{number}", tensor)
    free = [number for number in range(len(inputs)) if number not in (held or {})]
    nodes = {number: graph.placeholder(f"x{number}") for number in free}
    nodes |= {number: graph.get_attr(f"held_{number}") for number in held or {}}
    given = [nodes[number] for number in range(len(inputs))]
    packed = [graph.get_attr(f"layer.in_lanes.{name}") for name in names]
    call = graph.call_function(torch.ops.fxprune.net.default, (given, *packed, program))
    exits = sum(isinstance(step, net.Exit) for step in made.steps)

    graph.output(tuple(graph.call_function(operator.getitem, (call, j)) for j in range(exits)))
    return GraphModule(root, graph)


def agrees(made: Made, *inputs: Tensor, held: dict[int, Tensor] | None = None, tolerance: float = 1e-5) -> GraphModule:
    """The unpacked net is what the reference says; returns it."""
    own = held or {}
    program = unpack(program_of(made, list(inputs), held=held))
    assert not fxprune_ops(program)
    got = program(*(x for number, x in enumerate(inputs) if number not in own))
    wanted = net.net_reference(*made.arguments(list(inputs)))
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        near(a, b, tolerance)
        assert a.is_contiguous()
    return program


def leave(made: Made, *values: int, form: str = "channels first") -> Made:
    made.steps += [net.Exit(x, form) for x in values]
    return made


PADDINGS = [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0), (2, 2, 0, 0)]


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("kind", net.POOLS)
@pytest.mark.parametrize("form", ["channels first", "channels last"])
def test_pools(kind: str, padding: tuple[int, int, int, int], form: str) -> None:
    for kernel, stride in (((3, 3), (2, 2)), ((3, 2), (1, 2)), ((5, 1), (1, 1))):
        if kernel[1] == 1 and any(padding[2:]):
            continue  # a window would have no place inside
        taps = Taps(kernel, stride, padding)
        made = started(3, 11, 9)
        made.add(net.Pool(kind, 0, taps), (3, *taps.out((11, 9))))
        x = made.random(2, 3, 11, 9)
        agrees(leave(made, 1, form=form), x.to(memory_format=torch.channels_last) if form != "channels first" else x)


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("depthwise", [False, True])
def test_convolutions(padding: tuple[int, int, int, int], depthwise: bool) -> None:
    taps = Taps((3, 2), (1, 2), padding, (2, 1))
    made = started(5, 12, 9)
    made.depthwise(0, taps) if depthwise else made.conv(0, 7, taps, bias=False)
    program = agrees(leave(made, 1), made.random(3, 5, 12, 9))
    is_even = padding in PADDINGS[:2] or padding == (2, 2, 0, 0)
    assert (aten.constant_pad_nd.default in ops(program)) == (not is_even)


BOUNDS = [(0.0, math.inf), (0.0, 6.0), (-0.5, math.inf), (-math.inf, 0.3), (-math.inf, math.inf)]
FINISHES = [Finish(activation) for activation in net.ACTIVATIONS if activation != "relu"]
FINISHES += [Finish("relu", *bounds) for bounds in BOUNDS]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("finish", FINISHES, ids=lambda f: f"{f.activation}[{f.low},{f.high}]")
def test_what_follows_a_convolution(finish: Finish, last: bool) -> None:
    finish = Finish(finish.activation, finish.low, finish.high, adds_last=last)
    made = started(4, 6, 5)
    made.conv(0, 4, Taps((3, 3), padding=(1, 1, 1, 1)), residual=0, finish=finish)
    made.product(1, 4, residual=0, finish=finish)
    made.depthwise(2, Taps((3, 3), padding=(1, 1, 1, 1)), residual=1, finish=finish)
    made.add(net.Activate(3, Finish(finish.activation, finish.low, finish.high)), (4, 6, 5))
    agrees(leave(made, 1, 2, 3, 4), made.random(2, 4, 6, 5), tolerance=5e-5)


@pytest.mark.parametrize("times", [(1, 1), (2, 2), (2, 3), (1, 2)])
@pytest.mark.parametrize("cut", [(0, 0), (0, 1), (1, 0)])
def test_places(times: tuple[int, int], cut: tuple[int, int]) -> None:
    made = started(12, 5, 4)
    size = (5 * times[0] - cut[0], 4 * times[1] - cut[1])
    made.add(net.Shuffle(0, times, cut), (12 // math.prod(times), *size))
    made.add(net.Repeat(0, times), (12, 5 * times[0], 4 * times[1]))
    made.add(net.Mean(2), (12, 1, 1))
    made.add(net.Multiply(0, 3, Finish("silu")), (12, 5, 4))
    made.add(net.Add(0, 3), (12, 5, 4))
    made.add(net.Concat((4, 0, 5)), (36, 5, 4))
    agrees(leave(made, 1, 2, 3, 6), made.random(3, 12, 5, 4))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("is_held", [False, True])
def test_one_image_for_all(is_held: bool, count: int) -> None:
    """It may meet the others in a sum, stand beside them, or be handed out by itself."""
    made = started(4, 6, 5)
    made.add(net.Enter(1, 4), (4, 6, 5))
    made.add(net.Activate(1, Finish("silu")), (4, 6, 5))
    made.conv(2, 4, Taps(), residual=0)
    made.add(net.Concat((2, 3)), (8, 6, 5))
    x, one = made.random(count, 4, 6, 5), made.random(1, 4, 6, 5)
    program = agrees(leave(made, 2, 3, 4), x, one, held={1: one} if is_held else None)
    assert aten.expand.default in ops(program)
    if is_held:
        exported = torch.export.export(program, (made.random(2, 4, 6, 5),), dynamic_shapes=BATCHES, strict=False)
        x = made.random(5, 4, 6, 5)
        for got, want in zip(exported.module()(x), program(x), strict=True):
            near(got, want)


def test_outputs_are_apart_from_inputs_and_from_one_another() -> None:
    made = started(4, 6, 5)
    made.add(net.Enter(1, 4), (4, 6, 5))
    made.conv(0, 4, Taps())
    made.conv(1, 4, Taps())
    x, one = made.random(1, 4, 6, 5), made.random(1, 4, 6, 5)
    program = unpack(program_of(leave(made, 0, 1, 2, 2, 3, 3), [x, one]))
    entered, other, *rest = program(x, one)
    assert torch.equal(entered, x) and torch.equal(other, one)
    assert torch.equal(rest[0], rest[1]) and torch.equal(rest[2], rest[3])
    assert len({each.data_ptr() for each in (x, one, entered, other, *rest)}) == 8


def test_places_of_a_depthwise_convolution() -> None:
    """Zeros around its middle tap make no transposed one of it."""
    made = started(8, 6, 5)
    made.depthwise(0, Taps((3, 3), padding=(1, 1, 1, 1)))
    edge = torch.ones(3, 3, dtype=torch.bool)
    edge[1, 1] = False
    made.dense[0].view(8, 3, 3)[:, edge] = 0.0
    made.dense[1].fill_(0.5)
    made.add(net.Shuffle(1, (2, 2)), (2, 12, 10))
    agrees(leave(made, 2), made.random(2, 8, 6, 5))


def test_a_map_that_others_read_as_well_is_not_shuffled_at_once() -> None:
    made = started(3, 6, 5)
    made.conv(0, 8, Taps(), bias=False, zeros=1.0)
    made.add(net.Shuffle(1, (2, 2)), (2, 12, 10))
    program = unpack(program_of(leave(made, 2, 1), [x := made.random(2, 3, 6, 5)]))
    assert [y.shape for y in program(x)] == [(2, 2, 12, 10), (2, 8, 6, 5)]


@needs_kernel
def test_a_program_with_fake_values() -> None:
    """As lower leaves it, before it is emitted."""
    torch.manual_seed(0)
    model = images.pruned(images.constants().eval())
    captured = capture(model, (torch.randn(2, 3, 17, 21),), {})
    program = fold(captured.program, Selection())
    names = [name for name, value in program.named_parameters() if value.dim() == 4]
    packed, _ = lower(program, names, Chooser(only="nonzeros"))
    plain_program = unpack(packed)
    assert fxprune_ops(packed) and not fxprune_ops(plain_program)
    (output,) = plain_program.graph.output_node().all_input_nodes
    assert output.meta["val"].shape[1:] == (8, 17, 21)
    for count in (1, 5):
        x = torch.randn(count, 3, 17, 21)
        near(plain_program(x), packed(x))


def heads(made: Made, **more: Any) -> Made:
    """Attention of 2 heads over tokens of 10, 11 and 9 channels."""
    made.steps.append(net.Attention(0, 1, 2, 2, 4, 3, 1, 2, 3, scale=0.4, **more))
    made.shapes.append((6, 1, 7))
    return leave(made, 3, form="tokens")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, (1, 1, 7, 5), (3, 2, 7, 5), (3, 1, 1, 5), (1, 2, 7, 1)], ids=str)
def test_attention(mask: tuple[int, ...] | None, causal: bool) -> None:
    made = Made(torch.Generator().manual_seed(0))
    for number, (channels, width) in enumerate(((10, 7), (11, 5), (9, 5))):
        made.add(net.Enter(number), (channels, 1, width))
    heads(made, mask=-1 if mask is None else 3, causal=causal)
    inputs = [made.random(3, 7, 10), made.random(3, 5, 11), made.random(1, 5, 9)]
    if mask is not None:
        inputs.append(made.random(*mask))
        inputs[-1][0, 0, 0] = -math.inf
    agrees(made, *inputs)


@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("is_tokens", [False, True])
def test_layer_norm(is_tokens: bool, affine: tuple[bool, bool]) -> None:
    made = started(6, 1 if is_tokens else 4, 5)
    weight, bias = (made.put_dense(made.random(6)) if given else -1 for given in affine)
    made.add(net.LayerNorm(0, weight, bias, 1e-3), made.shapes[0])
    made.conv(1, 9, Taps(), finish=Finish("gelu"))
    leave(made, 1, 2, form="tokens" if is_tokens else "channels first")
    agrees(made, made.random(3, 5, 6) if is_tokens else made.random(3, 6, 4, 5))


def test_a_norm_of_unknown_channels_is_refused() -> None:
    made = started(6, 1, 5)
    made.add(net.LayerNorm(0), (6, 1, 5))
    with pytest.raises(InputError, match="how many channels"):
        unpack(program_of(leave(made, 1, form="tokens"), [made.random(3, 5, 6)]))


def test_tokens_meet_a_map() -> None:
    """A kernel of three taps over tokens, and a linear of what it makes."""
    made = started(6, 1, 9)
    made.conv(0, 6, Taps((1, 3), padding=(0, 0, 1, 1)), residual=0)
    made.conv(1, 5, Taps())
    made.add(net.Add(0, 1), (6, 1, 9))
    made.conv(0, 6, Taps(), residual=0)
    agrees(leave(made, 1, 2, 3, 4, form="tokens"), made.random(2, 9, 6))


def test_groups_are_found_by_the_zeros_between_them() -> None:
    torch.manual_seed(0)
    for groups, o, i in ((1, 6, 4), (2, 6, 4), (4, 8, 4), (3, 3, 9)):
        own = torch.randn(o, i // groups, 3, 2)
        own.view(-1)[::3] = 0.0
        own[0, 0, 0, 0] = -0.0
        blocks = [part.reshape(o // groups, i // groups, 6) for part in own.view(groups, -1)]
        whole = torch.zeros(o, i, 6)
        for g, block in enumerate(blocks):
            whole[g * o // groups : (g + 1) * o // groups, g * i // groups : (g + 1) * i // groups] = block
        found, many = by_groups(whole.view(o, i, 3, 2))
        assert many == groups and same_bits(found, own)


@pytest.mark.parametrize("more", [(0, 0), (1, 0), (0, 1)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((4, 4), (2, 2), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (0, 0), (1, 1)),
        ((5, 4), (3, 2), (2, 0), (1, 1)),
        ((3, 5), (2, 3), (1, 0), (3, 1)),
        ((6, 6), (4, 4), (1, 1), (1, 1)),
    ],
)
def test_transposed_convolutions_are_found_by_the_zeros_of_their_places(
    kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int, more: Any
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 6 // groups, *kernel), torch.randn(6)
    around = (padding[0], padding[0], padding[1], padding[1])
    how = plain(Taps(kernel, stride, around, dilation), more)
    assert how is not None
    whole, repeated = plain_weight(weight, groups, how), bias.repeat_interleave(math.prod(stride))
    found = as_transposed(whole, repeated, how.taps, net.Shuffle(0, how.times, how.cut))
    assert found is not None and found.groups == groups
    x = torch.randn(3, 4, 5, 6)
    wanted = F.conv_transpose2d(x, weight, bias, stride, padding, more, groups, dilation)
    given = (found.stride, found.padding, found.output_padding, found.groups)
    got = F.conv_transpose2d(x, found.weight, found.bias, *given)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    if dilation == (1, 1):
        assert torch.equal(found.weight, weight)


def test_a_convolution_before_a_shuffle_is_not_taken_for_a_transposed_one() -> None:
    torch.manual_seed(0)
    taps, after = Taps((3, 3), padding=(1, 1, 1, 1)), net.Shuffle(0, (2, 2))
    assert as_transposed(torch.randn(8, 3, 3, 3), None, taps, after) is None
    weight = plain_weight(torch.randn(3, 2, 4, 4), 1, plain(Taps((4, 4), (2, 2), (1, 1, 1, 1)), (0, 0)))  # pyright: ignore
    assert as_transposed(weight, None, taps, after) is not None
    assert as_transposed(weight, torch.randn(8), taps, after) is None
    assert as_transposed(weight, None, Taps((3, 3), (2, 2), (1, 1, 1, 1)), after) is None
