"""The programs that people write with torch.nn.utils.prune, unchanged but for the import, and then transform."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
import fxprune.prune as prune
from fxprune.prune import channels, elements, functions, method, pooled

QUICK = {"compile": False, "measure": False}


@pytest.mark.parametrize("module", [functions, pooled, elements, channels, method], ids=lambda module: module.__name__)
def test_examples_print_what_they_say(module: ModuleType) -> None:
    names = {"torch": torch, "nn": nn, "prune": prune}
    failed, ran = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0 and (ran > 0 or module not in (functions, pooled))


def test_every_public_name_is_there() -> None:
    import torch.nn.utils.prune as theirs

    own = [name for name, value in vars(theirs).items() if getattr(value, "__module__", "") == theirs.__name__]
    assert len(own) > 20
    assert all(hasattr(prune, name) and getattr(prune, name) is not getattr(theirs, name) for name in own)
    assert fxprune.prune is prune


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 16, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def transformed(model: nn.Module, x: Tensor) -> None:
    """The result computes what the pruned model computes, and knows its zeros."""
    model.eval()
    fast = fxprune.transform(model, example_inputs=(x,), options=QUICK, progress=False)
    with torch.no_grad():
        expected = model(x)
        assert (fast(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert fast.selection.mask or fast.report.parameters[1] < fast.report.parameters[0]


X = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_one_layer() -> None:
    torch.manual_seed(0)
    model = LeNet()
    module = model.conv1
    prune.random_unstructured(module, name="weight", amount=0.3)
    assert list(dict(module.named_buffers())) == ["weight_mask"]
    prune.l1_unstructured(module, name="bias", amount=3)
    prune.ln_structured(module, name="weight", amount=0.5, n=2, dim=0)
    assert [hook._tensor_name for hook in module._forward_pre_hooks.values()] == ["bias", "weight"]
    assert set(model.state_dict()) >= {"conv1.weight_orig", "conv1.weight_mask", "conv1.bias_orig", "conv1.bias_mask"}
    transformed(model, X)
    prune.remove(module, "weight")
    transformed(model, X)


def test_every_layer_and_remove() -> None:
    torch.manual_seed(0)
    model = LeNet()
    for _, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, name="weight", amount=0.2)
        elif isinstance(module, nn.Linear):
            prune.l1_unstructured(module, name="weight", amount=0.4)
    transformed(model, X)
    for _, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            prune.remove(module, "weight")
    assert not dict(model.named_buffers())
    zeros = [(model.get_submodule(n).weight == 0).float().mean().item() for n in ("conv2", "fc1")]
    assert zeros == pytest.approx([0.2, 0.4], abs=1e-3)
    transformed(model, X)


def test_after_every_epoch() -> None:
    torch.manual_seed(0)
    model = LeNet()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    target = torch.tensor([3, 1, 4])
    pairs = [(model.conv1, "weight"), (model.conv2, "weight"), (model.fc1, "weight"), (model.fc2, "weight")]
    size = sum(getattr(*pair).numel() for pair in pairs)
    remaining, losses = size, []
    for _ in range(3):
        for _ in range(4):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(X), target)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=0.3)
        remaining -= round(0.3 * remaining)
        assert sum(int(getattr(m, f"{n}_mask").sum()) for m, n in pairs) == remaining
    assert losses[-1] < losses[0]
    transformed(model, X)
    for module, name in pairs:
        prune.remove(module, name)
    assert sum(int((getattr(*pair) != 0).sum()) for pair in pairs) == remaining
