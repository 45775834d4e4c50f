"""drop: residual blocks leave the graph, and the rest computes what the model with identities in their place does."""

from __future__ import annotations

import copy
import functools
import io
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from transformers import modeling_outputs

from fxprune.capture import Program, capture
from fxprune.errors import PlanError
from fxprune.passes import blocks, drop, needs
from fxprune.passes.blocks import Block, find_blocks, module_paths
from fxprune.passes.drop import Bypassing, bypasses, drop_blocks
from tests.oracle import assert_close, snapshot

D = 8
TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
    "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def first(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A dropped block as a user would write it: it answers its first argument."""
    return x


class Pre(nn.Module):
    """x + f(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Apply(nn.Module):
    """A linear and a function of (linear, *args) as its forward."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(D, D)

    def forward(self, *args: Any) -> Any:
        return self.function(self.linear, *args)


class Between(nn.Module):
    """`block` between two linears, with a function of (block, x) to call it."""

    def __init__(self, block: nn.Module, call: Callable[..., Any] = lambda block, x: block(x)) -> None:
        super().__init__()
        self.before, self.block, self.after, self.call = nn.Linear(D, D), block, nn.Linear(D, D), call

    def forward(self, x: Tensor) -> Any:
        return pytree.tree_map(self.after, self.call(self.block, self.before(x)))


class Basic(nn.Module):
    """A ResNet block with everything in place; with a stride, its shortcut is a projection."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, padding=1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or i != o:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(Basic(8, 8), Basic(8, 8))
        self.layer2 = nn.Sequential(Basic(8, 16, 2), Basic(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def randomised(model: nn.Module) -> nn.Module:
    """The model in evaluation, with batch-norm statistics and norms that do something."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dim() == 1 and "inv_freq" not in name:
            tensor.data.uniform_(0.5, 1.5)
    return model.eval()


def ids(batch: int, length: int = 12) -> Tensor:
    return torch.randint(3, 99, (batch, length))


def bert(batch: int = 2) -> Case:
    mask = torch.ones(batch, 12, dtype=torch.long)
    mask[-1, 9:] = 0
    return hf.BertModel(hf.BertConfig(**TEXT)), (ids(batch),), {"attention_mask": mask}


def llama(batch: int = 2) -> Case:
    config = hf.LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False)
    return hf.LlamaForCausalLM(config), (ids(batch),), {}


def vit(batch: int = 2) -> Case:
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    return hf.ViTModel(config), (torch.randn(batch, 3, 16, 16),), {}


def resnet(batch: int = 2) -> Case:
    return ResNet(), (torch.randn(batch, 3, 16, 16),), {}


# case -> its blocks, in order
CASES: dict[Callable[..., Case], list[str]] = {
    bert: [f"encoder.layer.{i}" for i in range(3)],
    llama: [f"model.layers.{i}" for i in range(3)],
    vit: [f"layers.{i}" for i in range(3)],
    resnet: ["layer1.0", "layer1.1", "layer2.1"],
}
WHICH = {"first": [0], "last": [2], "consecutive": [0, 1], "apart": [0, 2], "all": [0, 1, 2]}


def find_block(program: Program, path: str) -> Block:
    """The block of one module."""
    return find_blocks(program, [path])[0]


def program_of(model: nn.Module, *args: Any, **kwargs: Any) -> Program:
    return capture(randomised(model), args, kwargs).program


def run(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The outputs of a call on copies of its tensors."""
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    with torch.no_grad():
        return function(*args, **kwargs)


def bypassed(program: Program, blocks: list[Block], *args: Any, **kwargs: Any) -> Any:
    """The outputs that the oracle gives."""
    flat = [leaf.clone() for leaf in pytree.tree_leaves((args, kwargs))]
    with torch.no_grad():
        flat_out = Bypassing(program, blocks).run(*flat, enable_io_processing=False)
    return program.graph.process_outputs(flat_out)


def replaced(model: nn.Module, paths: list[str], identity: Callable[..., Any] = first) -> nn.Module:
    """The model with identities as the forwards of the modules at `paths`."""
    result = copy.deepcopy(model)
    for path in paths:
        result.get_submodule(path).forward = identity
    return result


@functools.cache
def captured(case: Callable[..., Case]) -> tuple[nn.Module, Program]:
    """A case's model and its program, which no test may change."""
    model, args, kwargs = case()
    return model, program_of(model, *args, **kwargs)


def dropped(model: nn.Module, paths: list[str], *args: Any, **kwargs: Any) -> Program:
    """The program without the blocks, held against the oracle on these arguments, bit for bit."""
    return checked(program_of(model, *args, **kwargs), paths, *args, **kwargs)


def checked(program: Program, paths: list[str], *args: Any, **kwargs: Any) -> Program:
    blocks = [find_block(program, path) for path in paths]
    result = drop_blocks(program, blocks)
    got, expected = run(result, *args, **kwargs), bypassed(program, blocks, *args, **kwargs)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b)
    return result


def refused(model: nn.Module, path: str, *args: Any, **kwargs: Any) -> PlanError:
    """The error for a block, which must say what, where, why and what to do."""
    return refusal(program_of(model, *args, **kwargs), path)


def refusal(program: Program, path: str) -> PlanError:
    with pytest.raises(PlanError) as caught:
        find_block(program, path)
    error = caught.value
    assert error.what == "cannot drop this block" and f'"{path}"' in error.where and error.why and error.do
    return error


@pytest.mark.parametrize(
    ("case", "which"),
    [(case, which) for case in CASES for which in WHICH if case in (bert, resnet) or which in ("first", "all")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_rest_computes_what_the_model_with_identities_does(case: Callable[..., Case], which: str) -> None:
    model, program = captured(case)
    _, args, kwargs = case()
    paths = [CASES[case][index] for index in WHICH[which]]
    result = checked(program, paths, *args, **kwargs)
    eager = replaced(model, paths)
    dense = run(model, *args, **kwargs)
    for batch in (2, 5):
        _, args, kwargs = case(batch)
        expected = run(eager, *args, **kwargs)
        assert_close(run(result, *args, **kwargs), expected)
    # The model must notice that the blocks are gone, or the comparison would say nothing.
    whole = pytree.tree_leaves(dense)[0]
    assert not torch.allclose(whole, pytree.tree_leaves(run(eager, *case()[1], **case()[2]))[0], rtol=1e-2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_exactly_the_blocks_parameters_leave(case: Callable[..., Case]) -> None:
    model, program = captured(case)
    paths = CASES[case][1:]
    blocks = [find_block(program, path) for path in paths]
    names = dict(program.named_parameters()).keys()
    mine = {name for name in names if name.startswith(tuple(f"{path}." for path in paths))}
    result = drop_blocks(program, blocks)
    left = dict(result.named_parameters())
    assert mine and left.keys() == names - mine
    assert sum(block.parameters for block in blocks) == sum(model.get_parameter(name).numel() for name in mine)
    assert not any(name.startswith(tuple(f"{path}." for path in paths)) for name, _ in result.named_buffers())
    assert all(value is model.get_parameter(name) for name, value in left.items())
    kept = {node.name for node in result.graph.nodes}
    inside = {n.name for path in paths for n in program.graph.nodes if path in stack(n)}
    assert not kept & inside


def stack(node: torch.fx.Node) -> list[str]:
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nodes_outside_and_the_original_program_stay_as_they_were(case: Callable[..., Case]) -> None:
    model, program = captured(case)
    _, args, kwargs = case()
    model_before, code, expected = snapshot(model), program.code, run(program, *args, **kwargs)
    nodes = [(n.name, n.op, n.target, n.args, n.kwargs, dict(n.meta)) for n in program.graph.nodes]
    parameters = dict(program.named_parameters())
    block = find_block(program, CASES[case][1])
    result = drop_blocks(program, [block])
    assert program.code == code and snapshot(model) == model_before
    assert all(value is parameters[name] for name, value in program.named_parameters())
    assert [(n.name, n.op, n.target, n.args, n.kwargs) for n in program.graph.nodes] == [row[:5] for row in nodes]
    assert all(n.meta == row[5] for n, row in zip(program.graph.nodes, nodes, strict=True))
    assert_close(run(program, *args, **kwargs), expected)
    theirs = {node.name: node for node in result.graph.nodes}
    for node in program.graph.nodes:
        if node.op == "call_function" and block.path not in stack(node) and node.name in theirs:
            new = theirs[node.name]
            readable = map_arg(node.args, lambda n: block.entry if n.name == block.exit else n.name)
            assert new.target is node.target and map_arg(new.args, lambda n: n.name) == readable


def test_a_block_may_be_named_at_any_depth() -> None:
    model, program = captured(bert)
    _, args, kwargs = bert()
    answers: dict[str, Callable[..., Any]] = {
        "encoder": lambda x, *_, **__: modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x),
        "encoder.layer.1.attention": lambda x, *_, **__: (x, None),
    }
    for path, answer in answers.items():
        result = checked(program, [path], *args, **kwargs)
        assert not any(name.startswith(f"{path}.") for name, _ in result.named_parameters())
        assert_close(run(result, *args, **kwargs), run(replaced(model, [path], answer), *args, **kwargs))


def test_a_sublayer_with_two_inputs_hands_on_the_one_it_adds_to() -> None:
    _, program = captured(bert)
    block = find_block(program, "encoder.layer.1.output")
    attention = find_block(program, "encoder.layer.1.attention")
    assert block.entry == attention.exit
    result = drop_blocks(program, [block])
    # The feed-forward layer before it computed for it alone.
    assert not any("layer.1.intermediate" in name for name, _ in result.named_parameters())
    assert block.parameters == 2 * 32 * 48 + 48 + 32 + 2 * 32


def test_outer_and_inner_block_together() -> None:
    model, program = captured(resnet)
    _, args, _ = resnet()
    result = checked(program, ["layer1.0", "layer1", "layer1.1"], *args)
    assert_close(run(result, *args), run(replaced(model, ["layer1"]), *args))
    outer, inner = find_block(program, "layer1"), find_block(program, "layer1.1")
    assert outer.exit == inner.exit and bypasses([inner, outer]) == bypasses([outer, inner])
    assert bypasses([inner, outer])[outer.exit] == outer.entry != inner.entry


def test_hidden_states_that_are_outputs_read_the_input() -> None:
    model, args, kwargs = llama()
    model.config.output_hidden_states = True
    result = dropped(model, ["model.layers.0", "model.layers.2"], *args, **kwargs)
    output = run(result, *args)
    assert torch.equal(output.hidden_states[0], output.hidden_states[1])
    assert_close(output.logits, run(replaced(model, ["model.layers.0", "model.layers.2"]), *args).logits)


def test_half_precision_llama_casts_on_the_way() -> None:
    model, args, _ = llama()
    dropped(model.to(torch.bfloat16), ["model.layers.1"], *args)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize(("norm_first", "batch_first"), [(True, True), (False, False)])
def test_torchs_own_transformer_layers(norm_first: bool, batch_first: bool) -> None:
    sizes: dict[str, Any] = {"dim_feedforward": 12, "norm_first": norm_first, "batch_first": batch_first}
    model = nn.Transformer(D, 2, 1, 2, **sizes)
    # Source and target have one shape: only the sums tell which of them the decoder adds to.
    source, target = torch.randn(3, 5, D), torch.randn(3, 5, D)
    paths = ["encoder.layers.0", "decoder.layers.0", "decoder.layers.1"]
    result = dropped(model, paths, source, target)
    assert_close(run(result, source, target), run(replaced(model, paths), source, target))


def test_a_reused_module_leaves_with_all_of_its_calls() -> None:
    model = hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16))
    path = "encoder.albert_layer_groups.0"
    x = ids(2)
    program = program_of(model, x)
    block = find_block(program, path)
    assert [call.entry for call in block.calls[1:]] == [call.exit for call in block.calls[:-1]]
    assert len(block.calls) == 3 and (block.entry, block.exit) == (block.calls[0].entry, block.calls[0].exit)
    assert block.parameters == sum(p.numel() for p in model.encoder.albert_layer_groups[0].parameters())
    result = checked(program, [path], x)
    assert not any(path in name for name, _ in result.named_parameters())
    assert_close(run(result, x), run(replaced(model, [path]), x))


def test_a_reused_module_stays_where_one_call_is_not_residual() -> None:
    def twice(block: nn.Module, x: Tensor) -> Tensor:
        return block(block(x), x.sum(-1, keepdim=True))

    def maybe(linear: nn.Module, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x + linear(x) if gate is None else gate * linear(x)

    error = refused(Between(Apply(maybe), twice), "block", torch.randn(3, D))
    assert "call 2 of 2" in error.where and "no residual sum" in error.why


def test_a_module_under_two_names_leaves_under_the_name_that_is_asked_for() -> None:
    shared = Pre()
    model = nn.Sequential(nn.Linear(D, D), shared, nn.Linear(D, D), shared)
    x = torch.randn(3, D)
    program = program_of(model, x)
    first, second = find_block(program, "1"), find_block(program, "3")
    # Its weights are read under the other name as well.
    assert first.parameters == second.parameters == 0
    result = checked(program, ["1"], x)
    assert any(value is model[1].up.weight for value in result.parameters())
    eager = copy.deepcopy(model)
    eager[1] = nn.Identity()
    assert_close(run(result, x), run(eager, x))
    both = checked(program, ["1", "3"], x)
    assert {name for name, _ in both.named_parameters()} == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_weight_tied_to_one_outside_stays() -> None:
    model = Between(Pre())
    model.before.weight = nn.Parameter(torch.randn(2 * D, D))
    model.before.bias = None
    model.block.up.weight = model.before.weight
    model.call = lambda block, x: block(x[..., :D])
    x = torch.randn(3, D)
    block = find_block(program_of(model, x), "block")
    assert block.parameters == sum(p.numel() for p in model.block.parameters()) - 2 * D * D
    result = dropped(model, ["block"], x)
    assert result.get_parameter("before.weight") is model.before.weight
    assert "block.down.weight" not in dict(result.named_parameters())


def test_module_paths_are_those_traced_outer_before_inner() -> None:
    model, program = captured(resnet)
    paths = module_paths(program)
    named = [name for name, _ in model.named_modules()]
    assert set(paths) <= set(named) and "" not in paths
    assert paths[:4] == ["stem", "stem.0", "stem.1", "stem.2"]
    assert paths.index("layer1") < paths.index("layer1.0") < paths.index("layer1.0.conv1") < paths.index("layer2")
    # The lists that only hold layers run no forward.
    paths = module_paths(captured(bert)[1])
    assert "encoder.layer.1" in paths and "encoder.layer" not in paths


@pytest.mark.parametrize(("strict", "saved"), [(True, False), (False, True)])
def test_programs_exported_by_the_user(strict: bool, saved: bool) -> None:
    model, args, _ = resnet()
    randomised(model)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, args, dynamic_shapes=shapes, strict=strict)
    if saved:
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        exported = torch.export.load(file)
    program = capture(exported, args, {}).program
    result = drop_blocks(program, [find_block(program, "layer1.1")])
    x = torch.randn(3, 3, 16, 16)
    assert_close(run(result, x), run(replaced(model, ["layer1.1"]), x))


class Bottleneck(nn.Module):
    """Works at half the size, which is a computation with sizes where they are dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        y = y.reshape(y.shape[0], 4, y.shape[2] * y.shape[3]).tanh().view(y.shape)
        return x + self.up(F.interpolate(y, size=x.shape[2:]))


class Halving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.down = Bottleneck(), nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.block(x))
        return y.reshape(y.shape[0], 4, y.shape[2] * y.shape[3])


def test_sizes_computed_inside_that_the_rest_reads_stay() -> None:
    model, x = Halving().eval(), torch.randn(2, 4, 8, 8)
    dynamic = torch.export.Dim.DYNAMIC
    program = capture(model, (x,), {}, ({0: dynamic, 2: dynamic, 3: dynamic},)).program
    block = find_block(program, "block")
    assert any("block" in stack(n) and any("block" not in stack(u) for u in n.users) for n in program.graph.nodes
               if isinstance(n.meta.get("val"), torch.SymInt))  # fmt: skip
    result = drop_blocks(program, [block])
    assert {name for name, _ in result.named_parameters()} == {"down.weight", "down.bias"}
    for size in ((2, 4, 8, 8), (3, 4, 12, 6)):
        x = torch.randn(size)
        assert_close(run(result, x), run(replaced(model, ["block"]), x))


def relu_between(linear: nn.Module, x: Tensor) -> Tensor:
    return F.relu(F.relu(x + linear(x)) + linear(x))


def transposed(linear: nn.Module, x: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    return (y + linear(y)).permute(1, 0, 2)


def regrouped(linear: nn.Module, x: Tensor) -> Tensor:
    y = x.reshape(x.shape[0], -1, D // 2).transpose(1, 2).flatten(1)
    y = y + linear(y.view(x.shape)).view(y.shape)
    return y.unflatten(1, (D // 2, -1)).transpose(1, 2).reshape(x.shape)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


RESIDUAL: dict[str, Callable[..., Tensor]] = {
    "either operand": lambda linear, x: linear(x) + x,
    "in place": lambda linear, x: linear(x).add_(x),
    "alpha": lambda linear, x: torch.add(x, linear(x), alpha=0.5),
    "scaled": lambda linear, x: 2 * x + linear(x) / 3,
    "scaled by a parameter": lambda linear, x: x * linear.bias + linear(x),
    "shifted by a parameter": lambda linear, x: x + linear.bias + linear(x),
    "dropout": lambda linear, x: F.dropout(x + F.dropout(linear(x), 0.1, False), 0.1, False),
    "activations": relu_between,
    "cast": lambda linear, x: (x.double() + linear(x).double()).float(),
    "clone": lambda linear, x: x.clone().add_(linear(x)).contiguous(),
    "post-norm": lambda linear, x: F.layer_norm(x + linear(x), (D,)),
    "group norm": lambda linear, x: F.group_norm((x + linear(x)).flatten(0, 1), 2).view(x.shape),
    "hand-written pre-norm": lambda linear, x: x + linear(rms(x)),
    "hand-written norm of the branch": lambda linear, x: x + rms(linear(rms(x))),
    "two branches": lambda linear, x: x + linear(x).tanh() + linear(x.tanh()),
    "gated branch": lambda linear, x: x + torch.sigmoid(linear(x)) * x,
    "sequence first": transposed,
    "views": regrouped,
    "returned twice": lambda linear, x: x + linear(x),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_ways_that_are_residual(name: str) -> None:
    def call(block: nn.Module, x: Tensor) -> Any:
        y = block(x)
        return (y, 2 * y, y) if name == "returned twice" else y

    model, x = Between(Apply(RESIDUAL[name]), call), torch.randn(3, 4, D)
    result = dropped(model, ["block"], x)
    assert {name.split(".")[0] for name, _ in result.named_parameters()} == {"before", "after"}
    eager = replaced(model, ["block"])
    for batch in (3, 5):
        x = torch.randn(batch, 4, D)
        assert_close(run(result, x), run(eager, x))


NOT_RESIDUAL: dict[str, tuple[Callable[..., Any], str]] = {
    "no sum": (lambda linear, x: linear(x).relu(), "no residual sum found: the ways back from relu end at linear_1"),
    "no branch": (lambda linear, x: F.layer_norm(x, (D,)).relu(), "no branch is added on the way from linear to relu"),
    "bias only": (lambda linear, x: x + linear.bias, "no branch is added"),
    "table": (lambda linear, x: x + linear(torch.arange(4 * D).float().view(4, D)), "no branch is added"),
    "doubled": (lambda linear, x: x + x, "no branch is added"),
    "projection": (lambda linear, x: linear(x) + linear(x.relu()), "end at linear_1 (aten.linear.default), linear_2"),
    "gate": (lambda linear, x: x * torch.sigmoid(linear(x)), "end at mul (aten.mul.Tensor)"),
    "post-norm by hand": (lambda linear, x: rms(x + linear(x)), "end at mul"),
    "other shape": (
        lambda linear, x: linear(x).mean(1) + x.mean(1), "its shape changes from linear [s"
    ),
    "other order": (
        lambda linear, x: (x + linear(x)).unflatten(2, (2, 4)).transpose(2, 3).flatten(2), "on cpu becomes flatten"
    ),
    "other type": (lambda linear, x: (x + linear(x)).double().mul(2.0), "float32 on cpu becomes mul"),
    "broadcast": (lambda linear, x: x.mean(1, keepdim=True) + linear(x), "end at linear_1"),
    "two tensors": (
        lambda linear, x: (x + linear(x), x.exp()), "2 tensors leave it: add (read by linear_2), exp (read by linear_3)"
    ),
    "a number": (lambda linear, x: (x + linear(x), x[0, 0, 0].item()), "2 tensors leave it"),
    "a list": (lambda linear, x: (x + linear(x)).split(2, 1), "2 tensors leave it"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_RESIDUAL)
def test_blocks_that_are_not_residual(name: str) -> None:
    function, why = NOT_RESIDUAL[name]

    def call(block: nn.Module, x: Tensor) -> Any:
        return pytree.tree_map(lambda y: y if isinstance(y, Tensor) else x * y, block(x))

    model = Between(Apply(function), call)
    model.after.double() if name == "other type" else None
    assert why in refused(model, "block", torch.randn(3, 4, D)).why


class Two(nn.Module):
    """`block` on two tensors."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.block = nn.Linear(D, D), nn.Linear(D, D), Apply(function)

    def forward(self, x: Tensor) -> Any:
        return self.block(self.a(x), self.b(x)).tanh()


@pytest.mark.parametrize(
    ("function", "entry"),
    [
        (lambda linear, x, y: x + linear(y), "linear"),
        (lambda linear, x, y: y + linear(x), "linear_1"),
        (lambda linear, x, y: F.layer_norm(x, (D,)) + linear(x) + y, "linear_1"),
        (lambda linear, x, y: F.layer_norm(x, (D,)) + linear(y * F.layer_norm(y, (D,))), "linear"),
        (lambda linear, x, y: (x * y.sum(-1, keepdim=True)) + linear(x) + y, "linear_1"),
    ],
)
def test_of_two_inputs_the_sums_and_then_the_fewest_norms_tell(function: Callable[..., Tensor], entry: str) -> None:
    model, x = Two(function), torch.randn(3, D)
    assert find_block(program_of(model, x), "block").entry == entry
    dropped(model, ["block"], x)


def test_inputs_that_cannot_be_told_apart() -> None:
    error = refused(Two(lambda linear, x, y: x + y + linear(x)), "block", torch.randn(3, D))
    assert "cannot be told apart" in error.why and "linear and linear_1" in error.why
    error = refused(Two(lambda linear, x, y: x + y), "block", torch.randn(3, D))
    assert "no branch is added" in error.why


def test_a_decoder_starts_from_zeros() -> None:
    def start(block: nn.Module, x: Tensor) -> Tensor:
        return x + block(torch.zeros_like(x), x)

    model, x = (
        Between(Apply(lambda linear, q, x: F.layer_norm(q + linear(q) + linear(x), (D,))), start),
        torch.randn(3, D),
    )
    result = dropped(model, ["block"], x)
    assert_close(run(result, x), run(replaced(model, ["block"]), x))


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


def test_a_table_of_the_inputs_shape_is_not_taken_for_the_input() -> None:
    def call(block: nn.Module, x: Tensor) -> Tensor:
        return block(x, torch.arange(x.numel()).float().view(x.shape))

    model, x = Between(Apply(lambda linear, x, table: x + table + linear(x)), call), torch.randn(3, D)
    result = dropped(model, ["block"], x)
    assert_close(run(result, x), run(replaced(model, ["block"]), x))


def test_a_graph_input_that_becomes_the_output() -> None:
    model, x = nn.Sequential(Pre(), Pre()), torch.randn(3, D)
    result = dropped(model, ["0", "1"], x)
    assert not list(result.parameters()) and torch.equal(result(x), x)
    x = torch.randn(7, D)
    assert torch.equal(result(x), x)


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


def test_paths_that_name_no_block() -> None:
    _, program = captured(bert)
    for path, why, do in [
        ("encoder.layer.7", "no op that the output depends on", "encoder.layer."),
        ("encoder.layer", "only holds modules", "encoder.layer.0, encoder.layer.1"),
        ("", "the whole model", "Name a module"),
        ("zzz", "no op that the output depends on", "named_modules"),
    ]:
        with pytest.raises(PlanError) as caught:
            find_block(program, path)
        error = caught.value
        assert error.what == "cannot drop this block" and error.where == f'"{path}"'
        assert why in error.why and do in error.do


def test_errors_name_what_could_go_instead() -> None:
    _, program = captured(resnet)
    error = refusal(program, "layer2")
    assert error.why.startswith("its shape changes from relu__4 [s") and error.do.endswith("go: layer2.1.")
    assert ", 8, 16, 16] float32 on cpu to relu__8 [s" in error.why
    assert "its shape changes" in refusal(program, "layer2.0").why
    assert refusal(program, "layer1.1.conv2").do.endswith("go: layer1.1.")
    assert "its shape changes" in refusal(program, "head").why


def test_a_cache_that_leaves_is_named() -> None:
    config = hf.LlamaConfig(**TEXT | {"num_hidden_layers": 2}, num_key_value_heads=2)
    error = refused(hf.LlamaForCausalLM(config), "model.layers.1", ids(2))
    assert "3 tensors leave it" in error.why and "read by the model's output" in error.why
    assert "use_cache=False" in error.do


def test_a_block_that_nobody_reads() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.linear = Pre(), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            self.block(x)
            return self.linear(x)

    assert "no op that the output depends on" in refused(Idle(), "block", torch.randn(3, D)).why


# --- work --------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Many blocks in a row between two linears."""

    def __init__(self, depth: int, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(D, D), nn.Linear(D, D)
        self.blocks = nn.ModuleList(Apply(function) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return self.after(x)


CHAINS: dict[str, Callable[..., Tensor]] = {
    "sums": lambda linear, x: x + linear(x).relu(),
    "sums in place": lambda linear, x: x.add_(linear(x).relu()),
}


def chain_of(depth: int, name: str) -> tuple[Program, list[str]]:
    """A chain's program and every second block of it."""
    program = program_of(Chain(depth, CHAINS[name]), torch.randn(2, D))
    return program, [f"blocks.{index}" for index in range(0, depth, 2)]


def lines_run(act: Callable[[], Any]) -> int:
    """How many lines of the modules that drop blocks, loops over one line included, `act` runs."""
    count, files = 0, {module.__file__ for module in (blocks, drop, needs)}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def test_what_belongs_to_the_program_is_found_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    program, paths = chain_of(8, "sums")
    calls: Counter[str] = Counter()
    once = [(blocks, name) for name in ("varying_tensors", "names_of_parameters", "calls_by_module")]
    for module, name in [*once, *((needs, name) for name in ("aliased", "written", "checks_inputs"))]:
        original = getattr(module, name)

        def counted(*args: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(module, name, counted)
    assert len(find_blocks(program, paths)) == 4
    assert calls["varying_tensors"] == calls["names_of_parameters"] == calls["calls_by_module"] == 1
    nodes = len(program.graph.nodes)
    assert calls["aliased"] == calls["written"] == nodes and calls["checks_inputs"] <= nodes


@pytest.mark.parametrize("name", CHAINS)
def test_the_work_is_linear_in_the_size_of_the_graph(name: str) -> None:
    small, large = (chain_of(depth, name) for depth in (12, 48))

    def work(program: Program, paths: list[str]) -> tuple[int, int]:
        blocks = find_blocks(program, paths)
        return lines_run(lambda: find_blocks(program, paths)), lines_run(lambda: drop_blocks(program, blocks))

    for few, many in zip(work(*small), work(*large), strict=True):
        assert many < 4.5 * few
