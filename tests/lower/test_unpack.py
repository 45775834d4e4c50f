"""unpack: packed linears and attentions come back as ATen ops with dense weights, bit for bit, for any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

import fxprune
from fxprune.capture.entry import EntryCheck, TensorInput
from fxprune.errors import InputError
from fxprune.kernels.native.attention import attention as attention_op
from fxprune.lower.layouts import LAYOUTS
from fxprune.lower.layouts.bitmap import Bitmap
from fxprune.lower.layouts.site import Site
from fxprune.lower.unpack import unpack
from tests.kernels.kernel_case import same_bits, sparse
from tests.oracle import quick, zeroed
from triton_kernels import prune24

from .test_share import Apply, Attention, used_twice, with_activations, with_others_between

aten = torch.ops.aten
CPU = {"nonzeros": (torch.float32,), "bitmap": (torch.float32, torch.bfloat16), "tiles": (torch.bfloat16,)}
GPU = {name: (torch.float32, torch.bfloat16) for name in ("semi24", "blocks", "nonzeros8", "bitmap")}
CASES = [("cpu", *case) for case in CPU.items()] + [("cuda", *case) for case in GPU.items()]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def layout_of(device: str, name: str) -> Any:
    layout = LAYOUTS[name]
    return (layout.cuda if device == "cuda" else layout.cpu) if isinstance(layout, Bitmap) else layout


def weight_for(name: str, o: int, i: int, dtype: torch.dtype) -> Tensor:
    weight = sparse(o, i, 0.4, dtype, "cpu")
    if name == "semi24":
        return torch.where(prune24.reference_select(weight, 2, 4), weight, 0.0)
    if name == "blocks":
        keep = (torch.rand(o // 16, i // 16) < 0.3).repeat_interleave(16, 0).repeat_interleave(16, 1)
        return torch.where(keep, weight, 0.0)
    weight[0, 0] = -0.0
    return weight


def fxprune_ops(program: GraphModule) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "fxprune" in str(node.target)]


def ops(program: GraphModule) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def program_of(
    layout: Any, weight: Tensor, bias: Tensor | None, activation: str, parts: tuple[int, ...], reads: int = 1
) -> GraphModule:
    """A graph without fake values that multiplies its input by a weight stored under block.q.weight, `reads` times."""
    packed = layout.pack(Site("block.q.weight", "linear", weight, None, (1,)))
    root, graph = nn.Module(), Graph()
    root.block = nn.Module()
    root.block.q = nn.Module()
    root.block.q.weight = nn.Module()
    for name, tensor in {**packed.tensors, **({} if bias is None else {"bias": bias})}.items():
        root.block.q.weight.register_buffer(name, tensor)
    x = graph.placeholder("x")
    results: list[Node] = []
    for _ in range(reads):
        tensors = {name: graph.get_attr(f"block.q.weight.{name}") for name in packed.tensors}
        bias_node = None if bias is None else graph.get_attr("block.q.weight.bias")
        results += layout.lower(graph, packed, tensors, x, bias_node, activation, parts)
    graph.output(tuple(results))
    return GraphModule(root, graph)


def test_weights_come_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    for device, name, dtypes in CASES:
        for dtype in dtypes:
            layout, weight = layout_of(device, name), weight_for(name, 32, 64, dtype)
            bias = torch.randn(32).to(dtype)
            program = program_of(layout, weight, bias, "relu", (32,))
            plain = unpack(program)
            state = dict(plain.named_parameters())
            assert set(state) == {"block.q.weight", "block.q.bias"}, name
            assert same_bits(state["block.q.weight"], weight) and torch.equal(state["block.q.bias"], bias)
            assert ops(plain)[:2] == [aten.linear.default, aten.relu.default]
            # What was given is as it was.
            assert fxprune_ops(program) and f"block.q.weight.{layout.tensors[0]}" in program.state_dict()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("device", "name"), [(device, name) for device, name, _ in CASES])
def test_products_are_the_same_at_every_size(device: str, name: str, with_bias: bool, activation: str) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name == "tiles" else torch.float32
    layout, weight = layout_of(device, name), weight_for(name, 32, 64, dtype)
    bias = torch.randn(32).to(dtype) if with_bias else None
    program = program_of(layout, weight, bias, activation, (32,))
    plain = unpack(program)
    assert not fxprune_ops(plain)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for shape in ((3, 64), (2, 5, 64), (64,), (0, 64)):
        x = torch.randn(shape).to(dtype)
        (got,), (packed,) = plain(x), program(x)
        wanted = ACTIVATIONS[activation](F.linear(x, weight, bias))
        for other in (packed, wanted):
            torch.testing.assert_close(got, other, rtol=tolerance, atol=tolerance)
        assert got.is_contiguous() and got.dtype == dtype


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(("device", "name"), [(device, name) for device, name, _ in CASES])
def test_parts_are_apart_and_contiguous(device: str, name: str, held: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name == "tiles" else torch.float32
    layout, weight = layout_of(device, name), weight_for(name, 32, 64, dtype)
    bias, parts = torch.randn(32).to(dtype) if held else None, (16, 3, 13)
    program = program_of(layout, weight, bias, "gelu", parts)
    plain = unpack(program)
    if device == "cpu":
        names = {"block.q.weight", "block.q.weight_1", "block.q.weight_2"}
        biases = {"block.q.bias", "block.q.bias_1", "block.q.bias_2"} if held else set()
        assert set(plain.state_dict()) == names | biases
        assert same_bits(plain.get_parameter("block.q.weight_1"), weight[16:19])
    x = torch.randn(2, 5, 64).to(dtype)
    wanted = F.gelu(F.linear(x, weight, bias)).split(parts, -1)
    for got, packed, want in zip(plain(x), program(x), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
        assert got.shape == packed.shape and got.is_contiguous()


def test_a_weight_that_two_read_is_unpacked_once() -> None:
    weight = weight_for("nonzeros", 12, 20, torch.float32)
    plain = unpack(program_of(layout_of("cpu", "nonzeros"), weight, torch.randn(12), "", (12,), reads=2))
    assert set(plain.state_dict()) == {"block.q.weight", "block.q.bias"}
    assert ops(plain).count(aten.linear.default) == 2
    plain = unpack(program_of(layout_of("cpu", "nonzeros"), weight, torch.randn(12), "", (5, 7), reads=2))
    assert len(plain.state_dict()) == 4 and ops(plain).count(aten.linear.default) == 4


def test_a_weight_that_two_read_in_other_parts() -> None:
    layout, weight = layout_of("cpu", "nonzeros"), weight_for("nonzeros", 12, 20, torch.float32)
    program = program_of(layout, weight, None, "", (12,))
    graph, packed = program.graph, layout.pack(Site("w", "linear", weight, None, (1,)))
    (x,), output = graph.find_nodes(op="placeholder"), graph.output_node()
    tensors = {str(read.target).rpartition(".")[2]: read for read in graph.find_nodes(op="get_attr")}
    with graph.inserting_before(output):
        more = layout.lower(graph, packed, tensors, x, None, "", (5, 7))
        output.args = ((*output.all_input_nodes, *more),)
    program.recompile()
    plain = unpack(program)
    assert set(plain.state_dict()) == {"block.q.weight", "block.q.weight_1", "block.q.weight_2"}
    given = torch.randn(3, 20)
    for got, want in zip(plain(given), program(given), strict=True):
        torch.testing.assert_close(got, want)


def test_packed_tensors_that_no_module_of_their_own_holds() -> None:
    layout, weight = layout_of("cpu", "nonzeros"), weight_for("nonzeros", 12, 20, torch.float32)
    packed = layout.pack(Site("w", "linear", weight, None, (1,)))
    root, graph = nn.Module(), Graph()
    for name, tensor in packed.tensors.items():
        root.register_buffer(name, tensor)
    x, tensors = graph.placeholder("x"), {name: graph.get_attr(name) for name in packed.tensors}
    graph.output(layout.lower(graph, packed, tensors, x, None, "", (12,))[0])
    plain = unpack(GraphModule(root, graph))
    assert set(plain.state_dict()) == {"weight"} and same_bits(plain.get_parameter("weight"), weight)


def test_only_some() -> None:
    weight = weight_for("nonzeros", 12, 20, torch.float32)
    program = program_of(layout_of("cpu", "nonzeros"), weight, torch.randn(12), "", (12,), reads=2)
    first = fxprune_ops(program)[0]
    asked: list[str] = []

    def only(node: Node) -> bool:
        asked.append(str(node.target))
        return len(asked) == 1

    plain = unpack(program, only)
    assert asked == [first] * 2 and fxprune_ops(plain) == [first]
    # The other reads the packed tensors and the bias where they are.
    assert {"block.q.weight.values", "block.q.weight.bias", "block.q.weight_1"} <= set(plain.state_dict())
    assert same_bits(plain.get_parameter("block.q.weight_1"), weight)
    x = torch.randn(3, 20)
    for got, want in zip(plain(x), program(x), strict=True):
        torch.testing.assert_close(got, want)
    assert fxprune_ops(unpack(program, lambda _: False)) == fxprune_ops(program)


@pytest.mark.parametrize("told", ["value", "bias", "entry", "norm", "cast", "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_fewer_bits_are_multiplied_in_the_dtype_of_x(told: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = sparse(12, 20, 0.5, torch.bfloat16, "cpu").to(dtype)
    bias = torch.randn(12).to(dtype) if told == "bias" else None
    program = program_of(layout_of("cpu", "bitmap"), weight, bias, "", (12,))
    (x,) = program.graph.find_nodes(op="placeholder")
    given = torch.randn(3, 20).to(dtype)
    if told == "value":
        x.meta["val"] = given
    elif told == "entry":
        described = TensorInput(dtype, given.device, (3, 20))
        program.meta["entry"] = EntryCheck(("x",), ("x",), (described,), ())
    elif told in ("norm", "cast"):
        program.scale = nn.Parameter(torch.randn(20).to(dtype))
        with program.graph.inserting_after(x):
            args = ([20], program.graph.get_attr("scale")) if told == "norm" else ()
            target = aten.layer_norm.default if told == "norm" else aten._to_copy.default
            above = program.graph.call_function(target, (x, *args), {} if args else {"dtype": dtype})
        x.replace_all_uses_with(above, delete_user_cb=lambda user: user is not above)
        if args:
            x.append(above.args[2])
    program.recompile()
    plain = unpack(program)
    held = plain.get_parameter("block.q.weight")
    if told == "nothing":
        assert aten.type_as.default in ops(plain)
        assert torch.equal(held.to(dtype), weight)
    else:
        assert ops(plain)[-1] is aten.linear.default and same_bits(held, weight)
    (got,), (want,) = plain(given), program(given)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("layout", ["nonzeros", "bitmap"])
def test_a_result_comes_back_under_its_names(layout: str) -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 3, 24)
    options = {"layout": layout, "compile": False, "measure": False}
    plan = fxprune.Plan([fxprune.Rule("*", fxprune.Unstructured(0.5))])
    result = fxprune.transform(model, plan, (x,), options=options, progress=False)
    plain = unpack(result)
    expected = {f"q.{leaf}{end}" for leaf in ("weight", "bias") for end in ("", "_1", "_2")}
    assert fxprune_ops(result) and set(plain.state_dict()) == expected | {"out.weight", "out.bias"}
    pruned = zeroed(model, result)
    for mine, theirs in {"q.weight": "q", "q.weight_1": "k", "q.weight_2": "v", "out.weight": "out"}.items():
        assert torch.equal(plain.get_parameter(mine), pruned.get_parameter(f"{theirs}.weight"))
    assert plain.get_parameter("q.weight").requires_grad is False
    for again in (x, torch.randn(5, 7, 24)):
        torch.testing.assert_close(plain(again), pruned(again), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        exported = torch.export.export(plain, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    again = torch.randn(5, 3, 24)
    torch.testing.assert_close(exported.module()(again), pruned(again), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [with_activations, with_others_between, used_twice])
def test_what_stands_around_the_linears(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = Apply(function).eval()
    result = quick(model, torch.randn(2, 7, 24))
    plain = unpack(result)
    assert fxprune_ops(result) and not fxprune_ops(plain)
    for images in (1, 2, 5):
        x = torch.randn(images, 7, 24)
        torch.testing.assert_close(plain(x), zeroed(model, result)(x), rtol=1e-5, atol=1e-5)


def attention_program(scale: float, keys: int, masked: bool) -> GraphModule:
    graph = Graph()
    query = graph.placeholder("query")
    parts = [[graph.placeholder(f"{kind}{j}") for j in range(keys)] for kind in ("key", "value")]
    mask = graph.placeholder("mask") if masked else None
    graph.output(graph.call_function(attention_op, (query, *parts, mask, scale)))
    return GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("parts", [1, 3])
def test_attention(parts: int, heads: int, kv_heads: int, masked: bool) -> None:
    torch.manual_seed(0)
    program = attention_program(0.3, parts, masked)
    plain = unpack(program)
    assert not fxprune_ops(plain)
    for images, queries in ((1, 1), (3, 2)):
        lengths = [5, 1, 3][:parts]
        key, value = ([torch.randn(images, kv_heads, tokens, size) for tokens in lengths] for size in (8, 6))
        mask = torch.randn(images, 1, queries, sum(lengths))
        mask[:, :, 0] = -torch.inf  # one query sees no key
        given = (torch.randn(images, heads, queries, 8), *key, *value, *([mask] if masked else []))
        got, want = plain(*given), program(*given)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.is_contiguous() and got.shape == (images, queries, heads, 6)
        if masked:
            assert not got[:, 0].any()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_of_a_cache_that_grows_is_exported(kv_heads: int) -> None:
    torch.manual_seed(0)
    plain = unpack(attention_program(0.3, 2, False))
    dim = torch.export.Dim.DYNAMIC

    def given(images: int, past: int) -> tuple[Tensor, ...]:
        query, (key, value) = torch.randn(images, 4, 1, 8), torch.randn(2, images, kv_heads, 1, 8).unbind()
        before = torch.randn(2, images, kv_heads, past, 8).unbind()
        return query, before[0], key, before[1], value

    shapes = ({0: dim}, {0: dim, 2: dim}, {0: dim}, {0: dim, 2: dim}, {0: dim})
    exported = torch.export.export(plain, given(2, 7), dynamic_shapes=shapes, strict=False).module()
    for images, past in ((2, 7), (5, 31)):
        again = given(images, past)
        torch.testing.assert_close(exported(*again), plain(*again), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_unpacked_is_told() -> None:
    graph = Graph()
    x, *tensors = [graph.placeholder(name) for name in ("x", "values", "columns", "order", "counts", "blocks")]
    op = torch.ops.fxprune.nonzeros_linear.default
    graph.output(graph.call_function(op, (x, *tensors, None, 4, "")))
    with pytest.raises(InputError, match="not held by the program"):
        unpack(GraphModule(nn.Module(), graph))
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.fxprune.masked_linear.default, (x, x, x)))
    with pytest.raises(InputError, match=r"masked_linear.default has no weight that could be dense"):
        unpack(GraphModule(nn.Module(), graph))
    weight = weight_for("nonzeros8", 32, 64, torch.float32)
    program = program_of(layout_of("cuda", "nonzeros8"), weight, None, "", (32,))
    (call,) = [node for node in program.graph.nodes if "packed_linear" in str(node.target)]
    call.update_arg(3, "nonzeros9")
    with pytest.raises(InputError, match="its layout 'nonzeros9' is unknown, known are bitmap, blocks, cusparselt"):
        unpack(program)


def test_the_list_of_results_is_read_one_by_one() -> None:
    weight = weight_for("nonzeros", 12, 20, torch.float32)
    program = program_of(layout_of("cpu", "nonzeros"), weight, None, "", (5, 7))
    (call,) = [node for node in program.graph.nodes if "split" in str(node.target)]
    program.graph.output_node().args = (call,)
    with pytest.raises(InputError, match="reads its results as a list"):
        unpack(program)
