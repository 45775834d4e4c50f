"""Trainable results in train and eval mode: each computes what the model that they came from does in it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fxprune.graph.program import Program, copy_program
from tests.emit.trainable_models import (
    Forward,
    Net,
    assert_same,
    assert_same_state,
    emitted,
    images,
    net,
    seeded,
    trainable,
)
from tests.emit.trainable_models import compiled_code_does_not_pile_up as compiled_code_does_not_pile_up
from tests.oracle import snapshot

aten = torch.ops.aten


def guarded_dropout(m: Any, x: Tensor) -> Tensor:
    return x.sigmoid() + (F.dropout(x, 0.3) if m.training else x).exp()


def attention_dropout(m: Any, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.4 if m.training else 0.0, is_causal=True)
    return y.transpose(1, 2).contiguous().view(y.shape[0], -1)


def attention_of_heads(m: Any, x: Tensor) -> Tensor:
    # What attention returns is laid out by kernel, and the kernel by mode: in eval mode `contiguous` has nothing to do.
    x = x.unflatten(-1, (2, 4)).transpose(1, 2)
    y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.4 if m.training else 0.0)
    return y.transpose(1, 2).contiguous().view(y.shape[0], 5, 8)


def used_twice(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.norm(x).relu())


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: Forward(used_twice, norm=nn.BatchNorm1d(5)),
    "batch norm over all batches": lambda: Forward(used_twice, norm=nn.BatchNorm1d(5, momentum=None)),
    "batch norm without scale": lambda: Forward(used_twice, norm=nn.BatchNorm1d(5, affine=False)),
    "instance norm": lambda: Forward(used_twice, norm=nn.InstanceNorm1d(5, track_running_stats=True)),
    "dropout": lambda: Forward(lambda m, x: m.drop(x).sin() + m.drop(x), drop=nn.Dropout(0.4)),
    "dropout in place": lambda: Forward(lambda m, x: m.drop(x + 1).sin(), drop=nn.Dropout(0.4, inplace=True)),
    "dropout of channels": lambda: Forward(lambda m, x: m.drop(x).sin(), drop=nn.Dropout1d(0.4)),
    "alpha dropout": lambda: Forward(lambda m, x: m.drop(x), drop=nn.AlphaDropout(0.4)),
    "dropout of alpha features": lambda: Forward(lambda m, x: m.drop(x), drop=nn.FeatureAlphaDropout(0.4)),
    "dropout in train mode only": lambda: Forward(guarded_dropout),
    "rrelu": lambda: Forward(lambda m, x: m.act(x), act=nn.RReLU()),
    "a number by mode": lambda: Forward(lambda m, x: x * (0.5 if m.training else 1.0) + 0.25),
    "attention": lambda: Forward(attention_dropout),
    "attention of heads": lambda: Forward(attention_of_heads),
    "multi-head attention": lambda: Forward(
        lambda m, x: m.mha(x, x, x, need_weights=False)[0], mha=nn.MultiheadAttention(8, 2, 0.3, batch_first=True)
    ),
    "attention with weights": lambda: Forward(
        lambda m, x: m.mha(x, x, x), mha=nn.MultiheadAttention(8, 2, 0.3, batch_first=True)
    ),
    "transformer": lambda: Forward(
        lambda m, x: m.layer(x), layer=nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
    ),
    "lstm": lambda: Forward(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(8, 8, 2, dropout=0.4, batch_first=True)),
}


def is_random(kind: str) -> bool:
    return "norm" not in kind and "number" not in kind


@pytest.mark.parametrize("kind", VARIANTS)
def test_both_modes_compute_what_the_models_do(kind: str) -> None:
    model, x = VARIANTS[kind]().eval(), torch.randn(3, 5, 8)
    result, oracle = trainable(model, x), copy.deepcopy(model)
    assert not result.training
    assert_same(seeded(result, x), seeded(oracle, x))
    # A second size, so that what train mode draws follows the batch.
    for x in (torch.randn(3, 5, 8), torch.randn(6, 5, 8)):
        for mode in (True, False, True):
            result.train(mode), oracle.train(mode)
            got, expected = seeded(result, x), seeded(oracle, x)
            assert_same(got, expected)
            assert_same_state(result, oracle)
            leaf, wanted = (t[0] if isinstance(t, tuple) else t for t in (got, expected))
            result.zero_grad(), oracle.zero_grad()
            leaf.square().sum().backward(), wanted.square().sum().backward()
            for name, parameter in oracle.named_parameters():
                assert_same(result.get_parameter(name).grad, parameter.grad)
    for mode in (True, False):
        first, second = (torch.utils._pytree.tree_leaves(result.train(mode)(x))[0] for _ in range(2))
        assert torch.equal(first, second) is not (mode and is_random(kind))


def test_a_batch_norm_refuses_to_learn_from_one_value() -> None:
    x = torch.randn(1, 3, 8)
    model = Forward(lambda m, x: m.norm(x.mean(1)), norm=nn.BatchNorm1d(8)).eval()
    result = trainable(model, x)
    assert_same(result(x), model(x))
    before = copy.deepcopy(result.train().state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        result(x)
    assert_same(dict(result.state_dict()), {**before, "norm.num_batches_tracked": torch.tensor(1)})
    assert_same(result(torch.cat([x, -x])), copy.deepcopy(model).train()(torch.cat([x, -x])))


def test_a_train_method_that_sets_flags_does_not_reach_the_users_model() -> None:
    class Freezes(Net):
        def train(self, mode: bool = True) -> Freezes:
            super().train(mode)
            self.norm.eval()
            self.conv.weight.requires_grad_(not mode)
            return self

    model = Freezes().eval()
    before = snapshot(model)
    result, notes = emitted(model, images())
    assert snapshot(model) == before
    assert len(notes) == 1 and "batch_norm" in notes[0] and "as in eval mode" in notes[0]
    x, oracle = images(), copy.deepcopy(model).train()
    assert_same(seeded(result.train(), x), seeded(oracle, x))
    assert_same_state(result, oracle)


def test_modes_survive_edits_of_the_program() -> None:
    model = nn.Sequential(VARIANTS["attention with weights"](), nn.Identity()).eval()
    model = Forward(
        lambda m, x: m.last(attention_dropout(m, m.mha(x, x, x)[0])), mha=model[0].mha, last=nn.Dropout(0.5)
    )

    def edit(program: Program) -> Program:
        program = copy_program(program)
        attention, last = (
            next(n for n in program.graph.nodes if n.target is target)
            for target in (aten.scaled_dot_product_attention.default, aten.dropout.default)
        )
        attention.update_kwarg("scale", 8**-0.5)
        last.replace_all_uses_with(last.args[0])
        program.graph.erase_node(last)
        return program

    x = torch.randn(3, 5, 8)
    result, oracle = trainable(model.eval(), x, edit=edit), copy.deepcopy(model)
    oracle.last = nn.Identity()
    assert_same(seeded(result.train(), x), seeded(oracle.train(), x))


def test_a_model_with_other_ops_in_train_mode_is_switched_by_its_flags() -> None:
    class Stochastic(Net):
        def __init__(self, drops: bool) -> None:
            super().__init__()
            self.drops, self.still = drops, nn.BatchNorm2d(8)
            self.mean = nn.BatchNorm2d(8, momentum=None)

        def train(self, mode: bool = True) -> Stochastic:
            super().train(mode)
            self.still.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            x = self.still(self.conv(x))
            if self.training and self.drops:
                x = x * torch.rand(x.shape[0], 1, 1, 1).lt(0.5)
            q = self.mean(self.norm(x)).flatten(2)
            y = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if self.training else 0.0)
            return self.second(self.drop(self.first(y.mean(2))).relu())

    model = Stochastic(True).eval()
    result, notes = emitted(model, images())
    assert len(notes) == 1 and "where eval mode has conv2d" in notes[0] and "by their flags" in notes[0]
    oracle, x = Stochastic(False).eval(), images()
    oracle.load_state_dict(model.state_dict())
    for mode in (True, False, True):
        assert_same(seeded(result.train(mode), x), seeded(oracle.train(mode), x))
        assert_same_state(result, oracle)


def test_an_exported_program_is_switched_by_its_flags() -> None:
    model, x = net(), images()
    exported = torch.export.export(model, (x,))
    result, notes = emitted(exported, x)  # pyright: ignore
    assert len(notes) == 1 and "by their flags" in notes[0]
    assert_same(seeded(result.train(), x), seeded(copy.deepcopy(model).train(), x))
    assert result.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("way", ["torch.compile", "module.compile"])
def test_compiled_results_follow_the_mode(way: str) -> None:
    model, x = net(), images()
    result, oracle = trainable(model, x), copy.deepcopy(model)
    counter = CompileCounter()
    module = torch.compile(result, backend=counter, fullgraph=True) if way == "torch.compile" else result
    if way == "module.compile":
        result.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        for mode in (False, True):
            module.train(mode)
            assert_same(seeded(module, x), seeded(oracle.train(mode), x))
    # One graph a mode: going back and forth compiles nothing anew.
    assert counter.frame_count == 2
    assert_same_state(result, oracle)
    assert_same(seeded(copy.deepcopy(result), x), seeded(oracle, x))
    assert_same(seeded(pickle.loads(pickle.dumps(result)), x), seeded(result, x))
