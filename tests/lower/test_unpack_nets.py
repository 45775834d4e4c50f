"""unpack: nets come back step by step as ATen ops, for any batch, in the memory format that they handed out."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fxprune
from fxprune import Plan, Rule, Unstructured
from fxprune.kernels import native
from fxprune.kernels.native import net
from fxprune.lower.nets import build
from fxprune.lower.nets import lower as lower_of_nets
from fxprune.lower.unpack import unpack

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
