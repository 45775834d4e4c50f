"""drop: residual blocks leave the graph, and the rest computes what the model with identities in their place does."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from transformers import modeling_outputs

from fxprune.capture.capture import capture
from fxprune.shrink.drop.blocks import module_paths
from fxprune.shrink.drop.drop import drop_blocks
from tests.oracle import assert_close, snapshot
from tests.shrink.drop_models import (
    Case,
    D,
    Pre,
    bert,
    captured,
    checked,
    dropped,
    find_block,
    llama,
    randomised,
    replaced,
    resnet,
    run,
    stack,
    vit,
)

# case -> its blocks, in order
CASES: dict[Callable[..., Case], list[str]] = {
    bert: [f"encoder.layer.{i}" for i in range(3)],
    llama: [f"model.layers.{i}" for i in range(3)],
    vit: [f"layers.{i}" for i in range(3)],
    resnet: ["layer1.0", "layer1.1", "layer2.1"],
}
WHICH = {"first": [0], "last": [2], "consecutive": [0, 1], "apart": [0, 2], "all": [0, 1, 2]}


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
    (call, *_), theirs = block.calls, {node.name: node for node in result.graph.nodes}
    for node in program.graph.nodes:
        if node.op == "call_function" and block.path not in stack(node) and node.name in theirs:
            new = theirs[node.name]
            readable = map_arg(node.args, lambda n: call.entry if n.name == call.exit else n.name)
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
    assert block.calls[0].entry == attention.calls[0].exit
    result = drop_blocks(program, [block])
    # The feed-forward layer before it computed for it alone.
    assert not any("layer.1.intermediate" in name for name, _ in result.named_parameters())
    assert block.parameters == 2 * 32 * 48 + 48 + 32 + 2 * 32


def test_outer_and_inner_block_together() -> None:
    model, program = captured(resnet)
    _, args, _ = resnet()
    outer, inner = find_block(program, "layer1"), find_block(program, "layer1.1")
    assert outer.calls[0].exit == inner.calls[0].exit and outer.calls[0].entry != inner.calls[0].entry
    for paths in (["layer1.0", "layer1", "layer1.1"], ["layer1.1", "layer1"], ["layer1", "layer1.1"]):
        # Where an inner block ends as an outer one does, the outer counts.
        result = checked(program, paths, *args)
        assert_close(run(result, *args), run(replaced(model, ["layer1"]), *args))


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


def test_a_graph_input_that_becomes_the_output() -> None:
    model, x = nn.Sequential(Pre(), Pre()), torch.randn(3, D)
    result = dropped(model, ["0", "1"], x)
    assert not list(result.parameters()) and torch.equal(result(x), x)
    x = torch.randn(7, D)
    assert torch.equal(result(x), x)
