"""unpack: nets come back step by step as ATen ops, for any batch, in the memory format that they handed out."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.nn import functional as F

import fxprune
from fxprune import Plan, Rule, Unstructured
from fxprune.capture.capture import capture
from fxprune.errors import InputError
from fxprune.kernels import native
from fxprune.kernels.native import net
from fxprune.kernels.native.net import Finish, Taps
from fxprune.lower.fold import fold
from fxprune.lower.layouts.choose import Chooser
from fxprune.lower.lower import lower
from fxprune.lower.nets import build
from fxprune.lower.nets import lower as lower_of_nets
from fxprune.lower.nets.transposed import plain, plain_weight
from fxprune.lower.unpack import unpack
from fxprune.lower.unpack.net_weights import as_transposed, by_groups
from fxprune.select.selection import Selection
from tests.kernels.kernel_case import same_bits
from tests.kernels.net_case import Made, started

from . import test_nets as images
from . import test_nets_tokens as tokens

needs_kernel = pytest.mark.skipif(not native.status().available, reason="needs a C++ compiler")
aten = torch.ops.aten
BATCHES = ({0: torch.export.Dim.DYNAMIC},)


def ops(program: GraphModule) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def fxprune_ops(program: GraphModule) -> list[str]:
    return [str(target) for target in ops(program) if "fxprune" in str(target)]


def near(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Within the tolerance of the largest, in the same memory format."""
    assert got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()
    error = (got.float() - want.float()).abs().max() if got.numel() else torch.tensor(0.0)
    assert error <= tolerance * (want.abs().max() if want.numel() else 1.0)


@functools.cache
def of_images(make: Callable[[], nn.Module]) -> tuple[nn.Module, Any]:
    """A model of images, and its result with one net."""
    torch.manual_seed(0)
    model = make().eval()
    return model, images.result_of(model, torch.randn(2, _channels(model), 17, 21))


def _channels(model: nn.Module) -> int:
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))


@needs_kernel
@pytest.mark.parametrize("make", images.MODELS, ids=lambda make: make.__name__)
def test_models_of_images(make: Callable[[], nn.Module]) -> None:
    model, result = of_images(make)
    before = set(result.state_dict())
    program = unpack(result)
    assert fxprune_ops(result) and not fxprune_ops(program)
    assert set(result.state_dict()) == before
    for count in (1, 2, 5):
        x = torch.randn(count, _channels(model), 17, 21)
        for each in (x, x.to(memory_format=torch.channels_last)):
            near(program(each), result(each))


@needs_kernel
@pytest.mark.parametrize("make", images.MODELS, ids=lambda make: make.__name__)
def test_a_batch_that_varies_is_exported(make: Callable[[], nn.Module]) -> None:
    model, result = of_images(make)
    x = torch.randn(2, _channels(model), 17, 21)
    exported = torch.export.export(unpack(result), (x,), dynamic_shapes=BATCHES, strict=False)
    assert not any("fxprune" in str(node.target) for node in exported.graph.nodes)
    for count in (2, 5):
        x = torch.randn(count, _channels(model), 17, 21)
        near(exported.module()(x), result(x))


@needs_kernel
@pytest.mark.parametrize("make", [images.residual, images.grouped], ids=lambda make: make.__name__)
def test_weights_come_back_as_they_were_under_readable_names(make: Callable[[], nn.Module]) -> None:
    model, result = of_images(make)
    state = unpack(result).state_dict()
    wanted = [m.weight for m in images.pruned(model).modules() if isinstance(m, nn.Conv2d)]
    assert all(any(torch.equal(held, w) for held in state.values()) for w in wanted)
    first = "a" if hasattr(model, "a") else "0"
    assert {name.rpartition(".")[2] for name in state} <= {"weight", "bias"}
    assert all(name.startswith(f"{first}.in_lanes.") for name in state), list(state)


@needs_kernel
def test_kernels_over_lines() -> None:
    torch.manual_seed(0)
    result: Any = images.result_of(images.lines().eval(), torch.randn(2, 3, 40))
    program = unpack(result)
    assert len(fxprune_ops(result)) == 2 and not fxprune_ops(program)
    for count in (1, 5):
        x = torch.randn(count, 3, 40)
        near(program(x), result(x))


@needs_kernel
def test_sizes_that_vary() -> None:
    torch.manual_seed(0)
    conv = images.conv
    model = nn.Sequential(
        conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8), nn.ReLU6(), nn.ConvTranspose2d(8, 8, 4, 2, 1)
    ).eval()
    dim = torch.export.Dim
    shapes = ({0: dim("batch"), 2: dim("height", min=2), 3: dim("width", min=2)},)
    options = {"layout": "nonzeros", "compile": False, "measure": False}
    plan = Plan([Rule("*", Unstructured(0.8))])
    x = torch.randn(2, 3, 16, 24)
    result = fxprune.transform(model, plan, (x,), dynamic_shapes=shapes, options=options, progress=False)
    program = unpack(result)
    assert aten.conv_transpose2d.input in ops(program) and aten.pixel_shuffle.default not in ops(program)
    least = ({0: dim("batch"), 2: dim("height", min=4), 3: dim("width", min=4)},)
    exported = torch.export.export(program, (x,), dynamic_shapes=least, strict=False).module()
    for size in ((2, 3, 16, 24), (3, 3, 7, 9), (2, 3, 40, 4)):
        x = torch.randn(size)
        near(program(x), result(x))
        near(exported(x), result(x))


@needs_kernel
def test_one_net_of_two() -> None:
    torch.manual_seed(0)
    model = images.two_parts().eval()
    result: Any = images.result_of(model, torch.randn(2, 3, 9, 10))
    last = [node.name for node in result.graph.nodes if "fxprune" in str(node.target)][-1]
    program = unpack(result, lambda node: node.name == last)
    assert len(fxprune_ops(result)) == 2 and len(fxprune_ops(program)) == 1
    x = torch.randn(3, 3, 9, 10)
    near(program(x), result(x))


@needs_kernel
def test_outputs_that_are_written_to_are_apart() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = m.b(F.relu(y))
        y.cumsum_(2)
        return torch.cat([y, z], 1)

    torch.manual_seed(0)
    model = images.Model(run, a=images.conv(3, 8), b=images.conv(8, 8)).eval()
    result: Any = images.result_of(model, torch.randn(2, 3, 9, 10))
    program = unpack(result)
    assert fxprune_ops(result) and not fxprune_ops(program)
    x = torch.randn(3, 3, 9, 10)
    near(program(x), result(x))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every net of tokens is taken, however small."""
    monkeypatch.setattr(build, "gain_of", lambda *_: 9.0)
    monkeypatch.setattr(lower_of_nets, "LEAST_WORK", 0)


@needs_kernel
@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    "attend",
    [tokens.apart, tokens.together, tokens.split, tokens.crossed, tokens.transposed],
    ids=lambda f: f.__name__,
)
def test_transformers(attend: Callable[..., Tensor], before: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(tokens.Block(attend, before=before) for _ in range(2))).eval()
    result: Any = tokens.result_of(model, torch.randn(2, 10, 24))
    program = unpack(result)
    assert fxprune_ops(result) and not fxprune_ops(program)
    # Tokens stay tokens.
    made = ops(program)
    assert made.count(aten.linear.default) >= 8 and aten.conv2d.default not in made and aten.permute.default not in made
    exported = torch.export.export(program, (torch.randn(2, 10, 24),), dynamic_shapes=BATCHES, strict=False).module()
    for count in (1, 2, 5):
        x = torch.randn(count, 10, 24)
        near(program(x), result(x))
        if count > 1:
            near(exported(x), result(x))
    wanted = [m.weight for m in tokens.pruned(model).modules() if isinstance(m, nn.Linear)]
    held = [each for each in program.state_dict().values() if each.dim() == 2]
    read = [w for w in wanted if any(torch.equal(each, w) for each in held)]
    # Block.forward leaves out `qkv`, or `q`, `k` and `v`.
    assert len(read) >= 2 * (4 if attend in (tokens.together, tokens.split) else 6)


@needs_kernel
@pytest.mark.usefixtures("taken")
def test_a_length_that_varies() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(tokens.Block(tokens.together), tokens.Block(tokens.together)).eval()
    calls = [(torch.randn(2, 10, 24),), (torch.randn(3, 17, 24),)]
    options = {"compile": False, "measure": False}
    result = fxprune.transform(model, Plan([Rule("*", Unstructured(0.6))]), calls, options=options, progress=False)
    program = unpack(result)
    assert fxprune_ops(result) and not fxprune_ops(program)
    dim = torch.export.Dim.DYNAMIC
    exported = torch.export.export(program, calls[0], dynamic_shapes=({0: dim, 1: dim},), strict=False).module()
    for size in ((1, 5), (2, 64), (4, 33)):
        x = torch.randn(*size, 24)
        near(program(x), result(x))
        if size[0] > 1:
            near(exported(x), result(x))


@needs_kernel
@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = tokens.Block(tokens.apart).eval(), torch.randn(2, 10, 24)
    mask = torch.rand(2, 1, 10, 10) > 0.4
    mask[0, :, 3] = False  # one query sees no key
    mask = mask if dtype == torch.bool else torch.where(mask, torch.randn(mask.shape), -math.inf)
    result: Any = tokens.result_of(model, x, mask)
    program = unpack(result)
    assert fxprune_ops(result) and not fxprune_ops(program)
    for again in (mask, mask.flip(-1)):
        near(program(x, again), result(x, again))


@needs_kernel
@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("isa", ["AMX", ""])
def test_bfloat16(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With AMX there are products, which compute in bfloat16 by plain torch as well."""
    monkeypatch.setattr(build.tiles, "isa", lambda: isa)
    torch.manual_seed(0)
    layers = nn.Sequential(tokens.Block(tokens.apart), tokens.Block(tokens.together, before=True))
    model = tokens.pruned(layers.eval())
    options = {"compile": False, "measure": False, "dtype": "bfloat16"}
    torch._dynamo.reset()
    result = fxprune.transform(model, None, (torch.randn(2, 10, 24),), options=options, progress=False)
    program = unpack(result)
    (call,) = [node for node in result.graph.nodes if node.target is torch.ops.fxprune.net.default]
    many = sum(isinstance(step, net.Product) for step in net.decode(call.args[-1]))
    assert (many > 0) == (isa == "AMX") and ops(program).count(aten._to_copy.default) == 2 * many
    for count in (1, 3):
        x = torch.randn(count, 10, 24)
        near(program(x), result(x), 2e-2)


@needs_kernel
@pytest.mark.usefixtures("taken")
def test_a_model_in_bfloat16() -> None:
    torch.manual_seed(0)
    wanted = tokens.pruned(nn.Sequential(tokens.Block(tokens.apart), tokens.Block(tokens.split)).eval().bfloat16())
    result: Any = tokens.result_of(wanted, torch.randn(2, 10, 24).bfloat16(), plan=Plan([]))
    program, truth = unpack(result), copy.deepcopy(wanted).double()
    assert fxprune_ops(result) and not fxprune_ops(program)
    x = torch.randn(3, 10, 24).bfloat16()
    got, exact = program(x), truth(x.double())
    assert got.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 1.5 * (wanted(x) - exact).abs().max()


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


@needs_kernel
@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_onnx_computes_the_same_for_any_batch(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    result: Any = None
    if kind == "images":
        _, result = of_images(images.transposed)
        shape: tuple[int, ...] = (3, 17, 21)
    else:
        model = nn.Sequential(tokens.Block(tokens.apart), tokens.Block(tokens.split, before=True)).eval()
        shape = (10, 24)
        result = tokens.result_of(model, torch.randn(2, *shape))
    file = tmp_path / "model.onnx"
    with torch.no_grad():
        given = (torch.randn(2, *shape),)
        torch.onnx.export(unpack(result), given, file, dynamo=True, dynamic_shapes=BATCHES, verbose=False)
    session = runtime.InferenceSession(file)
    for count in (1, 2, 5):
        x = torch.randn(count, *shape)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        near(torch.from_numpy(got), result(x))
