"""Trainable results as modules: the model's names, ties and flags, in copies, under masks and inside other modules."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.emit.trainable.module import TrainableModule
from fxprune.errors import InputError
from fxprune.select.mask import PackedMask
from tests.emit.trainable_models import (
    assert_same,
    assert_same_state,
    emitted,
    images,
    net,
    seeded,
    storages,
    trainable,
)
from tests.emit.trainable_models import compiled_code_does_not_pile_up as compiled_code_does_not_pile_up
from tests.oracle import snapshot
from tests.structured_oracle import shrunk


def test_the_users_model_is_not_touched() -> None:
    model = net()
    model.norm.weight.requires_grad_(False)
    before = snapshot(model)
    result = trainable(model, images())
    assert snapshot(model) == before
    assert not storages(result) & storages(model)
    result.train()(images()).sum().backward()
    with torch.no_grad():
        for value in [*result.parameters(), *result.buffers()]:
            value.add_(1)
    assert snapshot(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_names_ties_flags_and_saved_buffers() -> None:
    model = net()
    model.conv.bias.requires_grad_(False)
    result = trainable(model, images())
    for other in (result, copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert isinstance(other, TrainableModule)
        flags = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
        assert {n: p.requires_grad for n, p in other.named_parameters(remove_duplicate=False)} == flags
        assert all(type(p) is nn.Parameter and p.is_leaf for p in other.parameters())
        assert other.get_parameter("first.weight") is other.get_parameter("second.weight")
        assert sum(1 for _ in other.parameters()) == sum(1 for _ in model.parameters())
        assert {n for n, _ in other.named_buffers()} == {n for n, _ in model.named_buffers()}
        assert_same_state(other, model)
        other.load_state_dict({n: torch.full_like(v, 2) for n, v in model.state_dict().items()})
        assert all((p == 2).all() for p in other.parameters())
    other.train()(images()).sum().backward()
    assert other.get_parameter("conv.bias").grad is None and other.get_parameter("conv.weight").grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_copies_and_pickles_go_on_as_the_result(training: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.BatchNorm1d(8, momentum=None), nn.Dropout(0.5)).eval()
    result = trainable(model, images()).train(training)
    result.meta["report"] = "the report"
    result(images())
    buffer = io.BytesIO()
    torch.save(result, buffer)
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        copies = [copy.deepcopy(result), pickle.loads(pickle.dumps(result)), torch.load(buffer, weights_only=False)]
    copies.append(pickle.loads(pickle.dumps(copy.deepcopy(copies[1]))))
    fresh = trainable(model, images())
    fresh.load_state_dict(result.state_dict())
    copies.append(fresh.train(training))
    fresh.meta["report"] = "the report"
    x = images(6)
    expected = seeded(result, x), seeded(result.train(not training), x)
    result.train(training)
    for other in copies:
        assert isinstance(other, TrainableModule) and other.report == "the report"
        assert other.training is training and not storages(other) & storages(result)
        assert [n.name for n in other.graph.nodes] == [n.name for n in result.graph.nodes]
        assert_same((seeded(other, x), seeded(other.train(not training), x)), expected)
        assert other.training is not training
        with pytest.raises(InputError):
            other(torch.randn(2, 3, 5, 6))


def test_parametrized_and_pruned_weights_train() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.prune.l1_unstructured(model[1], "weight", 0.5)
    model[2].requires_grad_(False)
    nn.utils.parametrizations.weight_norm(model[2])
    before = snapshot(model)
    x = torch.randn(3, 8)
    result = trainable(model, x)
    assert snapshot(model) == before
    assert_same(result(x), model(x))
    flags = [p.requires_grad for _, p in sorted(result.named_parameters())]
    assert flags == [True] * 4 + [False] * 2


def test_masked_weights_stay_zero() -> None:
    model = net()
    model.conv.weight.requires_grad_(False)
    keep = {n: torch.rand_like(model.get_parameter(n)) > 0.5 for n in ("first.weight", "conv.weight")}
    result = trainable(model, images(), masks={n: PackedMask.pack(k) for n, k in keep.items()})
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in keep.items():
            oracle.get_parameter(name).mul_(kept)
            assert not torch.signbit(result.get_parameter(name)[~kept]).any()
    x = images()
    assert_same(seeded(result.train(), x), seeded(oracle.train(), x))
    result = pickle.loads(pickle.dumps(copy.deepcopy(result)))
    assert {n for n in result.state_dict() if n.endswith("_keep")} == {"first.weight_keep", "conv.weight_keep"}
    assert result.get_parameter("second.weight") is result.get_parameter("first.weight")
    optimizer = torch.optim.AdamW(result.parameters(), 0.1, weight_decay=0.1)
    before = copy.deepcopy(result)
    for _ in range(5):
        optimizer.zero_grad()
        result(images()).square().sum().backward()
        assert (result.get_parameter("first.weight").grad[~keep["first.weight"]] == 0).all()
        optimizer.step()
    for name, kept in keep.items():
        weight = result.get_parameter(name)
        assert (weight[~kept] == 0).all()
        assert torch.equal(weight, before.get_parameter(name)) == (name == "conv.weight")
        assert torch.equal(result.get_buffer(f"{name}_keep"), kept)


def test_a_mask_of_another_shape_is_refused() -> None:
    for name, shape in (("first.weight", (1, 8)), ("nowhere.weight", (8, 8))):
        with pytest.raises(InputError, match=name):
            emitted(net(), images(), masks={name: PackedMask.pack(torch.ones(shape, dtype=torch.bool))})


def test_it_sits_in_other_modules() -> None:
    model, x = net(), images()
    outer = nn.Sequential(trainable(model, x), nn.Linear(8, 2))
    oracle = nn.Sequential(copy.deepcopy(model), copy.deepcopy(outer[1]))
    for mode in (True, False):
        assert_same(seeded(outer.train(mode), x), seeded(oracle.train(mode), x))
    assert_same_state(outer, oracle)
    with pytest.raises(InputError):
        outer(torch.randn(4, 3, 7, 6))


@pytest.mark.parametrize("sparsity", [None, Channels(0.5, align=1), Unstructured(0.5)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_result_made_without_gradients_trains(mode: Any, sparsity: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    plan = None if sparsity is None else Plan([Rule("*", sparsity)])
    with mode():
        result = shrunk(model, torch.randn(4, 8), plan=plan, trainable=True)
    assert any(row.what == "gradients = pruned model's" for row in result.report.checks)
    result.train()(torch.randn(4, 8)).square().sum().backward()
    assert all(p.grad is not None for p in result.parameters())
