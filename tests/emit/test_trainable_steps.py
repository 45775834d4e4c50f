"""Trainable results against the model that they came from: the same gradients and steps in both modes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.couple.couple import couple
from fxprune.graph.program import Program
from fxprune.shrink.shrink import shrink
from tests.emit.trainable_models import Forward, assert_same, assert_same_state, emitted, images, net, seeded, trainable
from tests.emit.trainable_models import compiled_code_does_not_pile_up as compiled_code_does_not_pile_up
from tests.oracle import snapshot


@pytest.mark.parametrize("training", [True, False])
def test_steps_are_those_of_the_model(training: bool) -> None:
    model = net()
    result, oracle = trainable(model, images()), copy.deepcopy(model)
    start = copy.deepcopy(result)
    modules = [m.train(training) for m in (result, oracle)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.01) for m in modules]
    for step in range(4):
        x, target = images(5), torch.randn(5, 8)
        for module, optimizer in zip(modules, optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(step)
            (module(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(result.state_dict()), dict(oracle.state_dict()), rtol=1e-5, atol=1e-6)
    for (name, moved), still in zip(result.named_parameters(), start.parameters(), strict=True):
        assert not torch.allclose(moved, still, atol=1e-4), name


def test_gradients_stop_where_the_model_stops_them() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.back, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                low, high = self.norm(self.back(x)).chunk(2, -1)
                with torch.enable_grad():
                    inner = self.head(x)
            y = self.head(x + torch.cat([high, low], -1)) * inner.detach()
            return y, inner

    model = Frozen().eval()
    result, oracle = trainable(model, torch.randn(4, 8)), copy.deepcopy(model)
    for mode in (True, False):
        x = torch.randn(5, 8)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        for module, leaf in ((result.train(mode), ours), (oracle.train(mode), theirs)):
            y, inner = module(leaf)
            (y.square() + inner).sum().backward()
        assert result.get_parameter("back.weight").grad is None
        assert_same(ours.grad, theirs.grad)
        for name, parameter in oracle.named_parameters():
            grad = result.get_parameter(name).grad
            assert (grad is None) == (parameter.grad is None)
            if grad is not None:
                assert_same(grad, parameter.grad)


def test_a_shrunk_program_trains_as_the_smaller_model() -> None:
    def network(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout2d(0.3),
            nn.Conv2d(width, width, 3, groups=width), nn.BatchNorm2d(width, momentum=None), nn.Conv2d(width, 4, 1),
        ).eval()  # fmt: skip

    model, kept = network(8), torch.tensor([0, 2, 3, 5, 6])
    with torch.no_grad():
        for number in (1, 5):
            model[number].running_mean.normal_(), model[number].weight.uniform_(0.5, 2), model[number].bias.normal_()

    def cut(program: Program) -> Program:
        return shrink(program, couple(program), {"0.weight[0]": kept})

    result, smaller = trainable(model, images(), edit=cut), network(5)
    for (name, small), big in zip(smaller.state_dict().items(), model.state_dict().values(), strict=True):
        of_output = name.startswith("6.")
        value = big[:, kept] if name == "6.weight" else big if of_output or not big.dim() else big[kept]
        small.copy_(value)
    assert_same_state(result, smaller)
    for mode in (False, True, False):
        x = images(5)
        got, expected = seeded(result.train(mode), x), seeded(smaller.train(mode), x)
        assert_same(got, expected)
        got.square().sum().backward(), expected.square().sum().backward()
        for name, parameter in smaller.named_parameters():
            torch.testing.assert_close(result.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-5)
    assert_same_state(result, smaller)


def test_a_compiled_step_is_the_models() -> None:
    model, x = net(), images()
    # A compiled dropout draws in its own way.
    model.drop.p = 0.0
    result, oracle = trainable(model, x).train(), copy.deepcopy(model).train()
    torch.compile(result, backend="aot_eager")(x).square().sum().backward()
    oracle(x).square().sum().backward()
    assert_same_state(result, oracle)
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(result.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-5)


def test_autocast_acts_as_on_the_model() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        return m.last(m.drop(y * y.square().mean(-1, keepdim=True).rsqrt()).to(torch.float32))

    model = Forward(forward, last=nn.Linear(8, 8), drop=nn.Dropout(0.5)).eval()
    x = torch.randn(4, 8)
    result, oracle = trainable(model, x), copy.deepcopy(model)
    for mode in (True, False):
        result.train(mode), oracle.train(mode)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = seeded(result, x), seeded(oracle, x)
        assert got.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(got, expected)
        got.float().sum().backward(), expected.float().sum().backward()
    assert torch.equal(result.get_parameter("linear.weight").grad, oracle.linear.weight.grad)
    assert result(x).dtype == torch.float32


def test_bert_trains_as_itself() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    ids, mask, labels = torch.randint(0, 50, (4, 6)), torch.ones(4, 6, dtype=torch.int64), torch.tensor([0, 1, 2, 0])
    mask[0, 4:] = 0
    before = snapshot(model)
    result, notes = emitted(model, input_ids=ids, attention_mask=mask)
    assert notes == [] and snapshot(model) == before
    oracle = copy.deepcopy(model)
    losses = []
    for module in (result, oracle):
        optimizer = torch.optim.AdamW(module.train().parameters(), 1e-2)
        torch.manual_seed(1)
        for _ in range(12):
            optimizer.zero_grad()
            loss = F.cross_entropy(module(input_ids=ids, attention_mask=mask).logits, labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    # Adam's first steps are signs: a gradient that rounds about zero moves a weight by the whole rate either way.
    torch.testing.assert_close(losses[:12], losses[12:], rtol=1e-3, atol=1e-3)
    assert losses[11] < 0.5 * losses[0]
    with torch.no_grad():
        got, expected = (m.eval()(input_ids=ids, attention_mask=mask).logits for m in (result, oracle))
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
