"""Branches of residual sums that leave: the rest computes what the model does whose branches answer zeros."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune import Channels, Drop, Plan, Rule
from fxprune.capture.capture import capture
from fxprune.shrink.drop.blocks import find_blocks
from tests.oracle import TOLERANCE, assert_close, snapshot
from tests.shrink.branch_models import CASES, LAYER, Branches, first_leaf, forced_to_zero, llama, parallel, tokens
from tests.shrink.drop_models import run
from tests.structured_oracle import EAGER, relative, zeroed


def without(case: Branches, model: Any, plan: Plan | None = None, **more: Any) -> Any:
    """The result of transform without the case's branches."""
    args, kwargs = case.call(2)
    if plan is None and "selection" not in more:
        plan = Plan([Drop(path) for path in case.paths])
    return fxprune.transform(model, plan, args, kwargs, options=EAGER, progress=False, **more)


@functools.cache
def dropped(name: str) -> tuple[Any, Any]:
    """A case's model, and the result of transform."""
    model = CASES[name].make()
    before = snapshot(model)
    result = without(CASES[name], model)
    assert snapshot(model) == before
    return model, result


@pytest.mark.parametrize("name", CASES)
def test_the_rest_computes_what_the_model_with_zeros_does(name: str) -> None:
    case, (model, result) = CASES[name], dropped(name)
    oracle = forced_to_zero(model, case.paths)
    assert result.selection.drop and set(result.selection.drop) == set(case.paths)
    for batch in (2, 5):
        args, kwargs = case.call(batch)
        expected = run(oracle, *args, **kwargs)
        assert_close(run(result, *args, **kwargs), expected)
        # The model must notice that the branches are gone, or the comparison would say nothing.
        dense = first_leaf(run(model, *args, **kwargs))
        assert relative(dense, first_leaf(expected)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_exactly_the_branches_and_what_only_they_read_leave(name: str) -> None:
    case, (model, result) = CASES[name], dropped(name)
    starts = tuple(f"{path}." for path in (*case.paths, *case.gone))
    gone = {name for name, _ in model.named_parameters() if f"{name}.".startswith(starts)}
    assert gone and dict(result.named_parameters()).keys() == dict(model.named_parameters()).keys() - gone
    elements = sum(model.get_parameter(name).numel() for name in gone)
    before, after = result.report.parameters
    assert before - after == elements and sum(result.report.dropped.values()) <= elements


@pytest.mark.parametrize("name", ["llama, one of each", "layer scale", "in place", "parallel, both"])
def test_a_selection_is_replayed_and_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    case, (model, result) = CASES[name], dropped(name)
    file = fxprune.save(result.selection, tmp_path / "selection.safetensors")
    args, kwargs = case.call(3)
    for selection in (result.selection, fxprune.load(file)):
        again = without(case, model, selection=selection)
        assert again.report.dropped == result.report.dropped
        assert torch.equal(first_leaf(run(again, *args, **kwargs)), first_leaf(run(result, *args, **kwargs)))


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    case, (_, result) = CASES["llama, one of each"], dropped("llama, one of each")
    loaded: Any = fxprune.load(fxprune.save(result, tmp_path / "model.safetensors"), progress=False)
    args, kwargs = case.call(2)
    assert_close(run(loaded, *args, **kwargs), run(result, *args, **kwargs))


def test_channels_leave_beside_branches() -> None:
    model, paths = llama(), (f"{LAYER}.self_attn", "model.layers.2.mlp")
    rule = Rule("model.layers.*.weight", Channels(0.5, align=1))
    case = Branches(llama, tokens, paths, ())
    result = without(case, model, Plan([rule, *map(Drop, paths)]))
    assert any(group.kept < group.size for group in result.report.groups)
    args, kwargs = tokens(5)
    assert_close(run(result, *args, **kwargs), run(forced_to_zero(zeroed(model, result), paths), *args, **kwargs))
    without_drop = run(zeroed(model, result), *args, **kwargs)
    assert relative(first_leaf(without_drop), first_leaf(run(result, *args, **kwargs))) > 100 * TOLERANCE


def test_a_pattern_takes_the_attention_of_all_layers() -> None:
    model = llama()
    case = Branches(llama, tokens, tuple(f"model.layers.{i}.self_attn" for i in range(3)), ())
    result = without(case, model, Plan([Drop("*.self_attn")]))
    assert result.selection.drop == case.paths
    args, kwargs = tokens(3)
    assert_close(run(result, *args, **kwargs), run(forced_to_zero(model, case.paths), *args, **kwargs))


def test_gradients_of_a_result_that_trains() -> None:
    case = CASES["layer scale"]
    model = case.make()
    result, oracle = without(case, model, trainable=True), forced_to_zero(model, case.paths)
    args, _ = case.call(4)
    for each in (result, oracle):
        each(*args).square().sum().backward()
    found = {name: parameter.grad for name, parameter in result.named_parameters()}
    assert found and all(grad is not None for grad in found.values())
    for name, grad in found.items():
        assert_close(grad, oracle.get_parameter(name).grad)


def test_two_branches_of_one_sum_end_at_the_next() -> None:
    x = torch.randn(2, 6, 16)
    program = capture(parallel(), (x,), {}).program
    (alone,), both = find_blocks(program, ["attn"]), find_blocks(program, ["attn", "mlp"])
    ends = {(call.entry, call.exit) for block in both for call in block.calls}
    assert len(ends) == 1 and all(block.is_branch for block in both)
    # Alone, a branch is added to the other one.
    assert (alone.calls[0].entry, alone.calls[0].exit) not in ends
    assert [block.parameters for block in both] == [
        sum(p.numel() for p in parallel().get_submodule(path).parameters()) for path in ("attn", "mlp")
    ]
