"""The modules of a result that trains: layers that are layers, and parts that say what they are not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import fxprune
from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.emit.trainable.parts import MaskedConv2d, MaskedLinear, Part
from fxprune.errors import FxPruneError
from tests.oracle import assert_close, zeroed

PLANS = {"channels": Channels(0.5, align=1), "masks": Unstructured(0.5)}


class Net(nn.Module):
    """Convolutions in containers, a linear that is called twice, and layers that are more than their op."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        second = nn.Sequential(nn.Conv2d(8, 8, (3, 1), padding="same", dilation=2, groups=2), nn.ReLU())
        self.layer = nn.Sequential(first, nn.Identity(), second)
        self.round = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.twice, self.cosine, self.head = nn.Linear(8, 8), Cosine(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.round(self.layer(x)).mean((2, 3))
        return self.head(self.cosine(self.twice(F.relu(self.twice(x)))))


class Cosine(nn.Linear):
    """A linear layer of normalised inputs."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=-1), self.weight, self.bias)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 12, 12)


def trains(model: nn.Module, sparsity: Any, x: Tensor, pattern: str = "*") -> Any:
    plan = None if sparsity is None else Plan([Rule(pattern, sparsity)])
    return fxprune.transform(model, plan, (x,), trainable=True, progress=False)


@pytest.fixture(params=PLANS)
def result(request: pytest.FixtureRequest) -> Any:
    return trains(Net().eval(), PLANS[request.param], images())


def test_layers_are_layers(result: Any) -> None:
    for name in ("layer.0.0", "layer.2.0"):
        conv, own = result.get_submodule(name), Net().get_submodule(name)
        assert isinstance(conv, nn.Conv2d) and isinstance(own, nn.Conv2d)
        for setting in ("kernel_size", "stride", "dilation", "padding", "padding_mode"):
            assert getattr(conv, setting) == getattr(own, setting)
        assert conv.weight.shape == (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        assert (conv.bias is None) == (own.bias is None)
    for name in ("twice", "head"):
        linear = result.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        assert linear.weight.shape == (linear.out_features, linear.in_features)
    assert {type(m) for n, m in result.named_modules() if n in ("round", "cosine", "layer", "layer.0.1")} == {Part}
    # Names are in the model's order, with its own masks behind their weights.
    own = [n for n, _ in Net().named_parameters()]
    assert [n for n, _ in result.named_parameters()] == own


def test_masked_layers_keep_their_zeros() -> None:
    x = images(4)
    model = Net().eval()
    result = trains(model, Unstructured(0.5), x)
    assert type(result.twice) is MaskedLinear and type(result.layer[0][0]) is MaskedConv2d
    optimiser = torch.optim.SGD(result.parameters(), 0.1, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        result(x).square().sum().backward()
        optimiser.step()
    zeros = {name: ~mask.unpack() for name, mask in result.selection.mask.items()}
    assert not any(result.get_parameter(name)[zero].abs().sum() for name, zero in zeros.items())
    assert zeros["twice.weight"].float().mean() == 0.5
    assert_close(trains(model, Unstructured(0.5), x)(x), zeroed(model, result)(x).detach())


def test_hooks_of_layers_run(result: Any) -> None:
    seen: list[str] = []
    for name in ("layer.0.0", "twice"):
        result.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
        result.get_submodule(name).register_full_backward_hook(lambda *_, name=name: seen.append(f"{name} back"))
    result(images().requires_grad_()).sum().backward()
    assert seen == ["layer.0.0", "twice", "twice", "twice back", "twice back", "layer.0.0 back"]


@pytest.mark.parametrize("remade", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["copy", "pickle"])
def test_copies_have_layers_of_their_own(result: Any, remade: Callable[[Any], Any]) -> None:
    other, x = remade(result), images(3)
    assert torch.equal(other(x), result(x))
    assert [type(m) for m in other.modules()][1:] == [type(m) for m in result.modules()][1:]
    with torch.no_grad():
        other.head.bias.add_(1)
    torch.testing.assert_close(other(x), result(x) + 1)


def test_a_layer_can_be_exchanged(result: Any) -> None:
    x = images()
    features: list[Tensor] = []
    result.head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    result(x)
    result.head = nn.Linear(result.head.in_features, 7)
    assert torch.equal(result(x), result.head(features[0]))


def test_dynamic_quantization_takes_linears() -> None:
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), torch.randn(4, 16)
    result = trains(model, Channels(0.5), x)
    quantized = torch.ao.quantization.quantize_dynamic(result, {nn.Linear})
    assert type(quantized.get_submodule("0")).__module__.startswith("torch.ao.nn.quantized")
    torch.testing.assert_close(quantized(x), result(x), rtol=0.05, atol=0.05)


def test_another_round_finds_layers(result: Any) -> None:
    again = trains(result, Channels(0.5, align=1), images())
    assert type(again.layer[0][0]) is type(result.layer[0][0])
    assert again.layer[0][0].out_channels == result.layer[0][0].out_channels // 2
    assert type(again.twice) is type(result.twice)


def test_what_a_part_refuses(result: Any) -> None:
    layer = result.layer
    assert layer[0] is result.get_submodule("layer.0") and layer["2"][0] is result.get_submodule("layer.2.0")
    for touch in (
        lambda: layer(images()),
        lambda: layer.register_forward_hook(print),
        lambda: layer.register_forward_pre_hook(print),
        lambda: layer.register_full_backward_hook(print),
        lambda: layer.register_full_backward_pre_hook(print),
        lambda: layer[1],
        lambda: layer[-1],
        lambda: list(layer),
        lambda: nn.utils.spectral_norm(result.cosine),
    ):
        with pytest.raises(FxPruneError, match=r'part "(layer|cosine)" of a result that trains'):
            touch()


def test_pruning_and_parametrizations_of_parts_and_layers(result: Any) -> None:
    x = images()
    for name in ("twice", "cosine"):
        module = result.get_submodule(name)
        prune.random_unstructured(module, "weight", 0.9)
        before = result(x)
        module.weight_mask.zero_()
        assert not torch.equal(result(x), before)
        assert not bool(module.weight.any())
        prune.remove(module, "weight")
    assert torch.equal(result(x)[0], result(x)[1])
    other = parametrizations.weight_norm(trains(Net().eval(), Channels(0.5), x).head)
    assert isinstance(other, nn.Linear)


class Tied(nn.Module):
    """An embedding, and a head of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def test_tied_weights_stay_tied() -> None:
    ids = torch.randint(11, (2, 5))
    result = trains(Tied().eval(), Unstructured(0.5), ids, "table.weight")
    assert result.head.weight is result.table.weight
    plain = trains(Tied().eval(), None, ids)
    assert type(plain.head) is nn.Linear and plain.head.weight is plain.table.weight


def test_an_exported_model_has_layers() -> None:
    model, x = Net().eval(), images()
    result = trains(torch.export.export(model, (x,)), Channels(0.5), x)
    assert isinstance(result.layer[0][0], nn.Conv2d) and isinstance(result.head, nn.Linear)
