"""Dropped blocks that share: a module called more than once or held under two names, and a tied weight."""

from __future__ import annotations

import copy

import torch
import transformers as hf
from torch import Tensor, nn

from tests.oracle import assert_close
from tests.shrink.drop_models import (
    TEXT,
    Apply,
    Between,
    D,
    Pre,
    checked,
    dropped,
    find_block,
    ids,
    program_of,
    refused,
    replaced,
    run,
)


def test_a_reused_module_leaves_with_all_of_its_calls() -> None:
    model = hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16))
    path = "encoder.albert_layer_groups.0"
    x = ids(2)
    program = program_of(model, x)
    block = find_block(program, path)
    assert [call.entry for call in block.calls[1:]] == [call.exit for call in block.calls[:-1]]
    assert len(block.calls) == 3
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
