"""Pruning again what was pruned and trained: every kind of graph trains on, round after round."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from fxprune import Channels, Plan, Rule, SemiStructured, Unstructured, prune
from tests.emit.trainable_models import assert_same, net
from tests.structured_oracle import randomised, shrunk


def network() -> Any:
    return randomised(
        nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 64), nn.ReLU())
    )


def train(module: Any, x: Tensor, steps: int = 2) -> None:
    """Steps of an optimiser in train mode, each of which must move every parameter that has a gradient."""
    module.train()
    optimiser = torch.optim.AdamW(module.parameters(), 1e-2)
    for _ in range(steps):
        before = [p.detach().clone() for p in module.parameters()]
        optimiser.zero_grad()
        module(x).square().sum().backward()
        optimiser.step()
        assert all(p.grad is not None for p in module.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    module.eval()


def test_channels_leave_in_rounds() -> None:
    result, x, sizes = network(), torch.randn(8, 16), []
    for _ in range(3):
        result = shrunk(result, x, plan=Plan([Rule("*", Channels(0.25, align=1))]), trainable=True)
        sizes.append(result.get_parameter("0.weight").shape[0])
        train(result, x)
    assert sizes == [48, 36, 27]


@pytest.mark.parametrize("kind", ["symbolic_trace", "export"])
def test_a_graph_module_trains(kind: str) -> None:
    model, x = net(), torch.randn(4, 3, 6, 6)
    graph = torch.fx.symbolic_trace(model) if kind == "symbolic_trace" else torch.export.export(model, (x,)).module()
    result = shrunk(graph, x, plan=None, trainable=True)
    for module in (result, model):
        module.zero_grad()
        module(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_same(result.get_parameter(name).grad, parameter.grad)


ROUNDS: dict[str, tuple[list[Any], list[float]]] = {
    "unstructured": ([Unstructured(0.5), Unstructured(0.7), Unstructured(0.9)], [0.5, 0.7, 0.9]),
    "2:4": ([SemiStructured(2, 4), SemiStructured(2, 4), Unstructured(0.75)], [0.5, 0.5, 0.75]),
}


@pytest.mark.parametrize("masked_matmul", [False, True])
@pytest.mark.parametrize("kind", ROUNDS)
def test_masks_grow_in_rounds(kind: str, masked_matmul: bool) -> None:
    result, x, gone = network(), torch.randn(8, 16), {}
    names = list(result.state_dict())
    for sparsity, zeros in zip(*ROUNDS[kind], strict=True):
        options = {"masked_matmul": masked_matmul}
        result = shrunk(result, x, plan=Plan([Rule("*", sparsity)]), trainable=True, options=options)
        assert [n for n in result.state_dict() if not n.endswith("_keep")] == names
        assert {n for n, _ in result.named_buffers() if "keep" in n} == {"0.weight_keep", "4.weight_keep"}
        train(result, x)
        for name in ("0.weight", "4.weight"):
            zero = result.get_parameter(name) == 0
            assert zero.double().mean() == pytest.approx(zeros, abs=1e-3)
            assert not (gone.get(name, zero) & ~zero).any()
            gone[name] = zero
    fast = shrunk(result, x, plan=None)
    torch.testing.assert_close(fast(x), result(x).detach(), rtol=1e-4, atol=1e-4)


class OwnMask(nn.Module):
    """Multiplies its weight and bias by masks in its own code."""

    def __init__(self, dtype: torch.dtype = torch.float32, persistent: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))
        self.last = nn.Linear(16, 4)
        self.register_buffer("keep", (torch.arange(256).view(16, 16) % 3 > 0).to(dtype), persistent=persistent)
        self.register_buffer("of_bias", torch.arange(16) % 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.linear(x, self.weight * self.keep, self.bias * self.of_bias).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
@pytest.mark.parametrize("persistent", [True, False])
def test_a_mask_of_the_models_own_is_pruned_on_under_its_name(dtype: torch.dtype, persistent: bool) -> None:
    model, x = OwnMask(dtype, persistent).eval(), torch.randn(4, 16)
    for plan, zeros in ((None, 86), (Plan([Rule("weight", Unstructured(0.75))]), 192)):
        result = shrunk(model, x, plan=plan, trainable=True)
        for other in (result, copy.deepcopy(result)):
            assert list(other.state_dict()) == list(model.state_dict())
            assert other.keep.dtype == dtype and other.keep.shape == (16, 16)
            train(other, x)
            assert int((other.weight == 0).sum()) == int((other.keep == 0).sum()) == zeros
            assert int((other.bias == 0).sum()) == int((other.of_bias == 0).sum()) == 8
        assert not (result.keep.bool() & ~model.keep.bool()).any()
    small = shrunk(model, x, plan=Plan([Rule("weight", Channels(0.5, align=1))]), trainable=True)
    assert small.keep.shape == (8, 16) and small.of_bias.shape == (8,)
    train(small, x)


def test_masks_that_no_buffer_holds_stay_products() -> None:
    class Rows(OwnMask):
        def forward(self, x: Tensor) -> Tensor:
            mask = (self.of_bias[:, None] + torch.arange(16)[None]) % 2
            return self.last(nn.functional.linear(x, self.weight * mask, self.bias).relu())

    model, x = Rows().eval(), torch.randn(4, 16)
    result = shrunk(model, x, plan=None, trainable=True)
    assert list(result.state_dict()) == list(model.state_dict())
    assert torch.equal(result.weight, model.weight)


@pytest.mark.parametrize("plan", [None, Plan([Rule("*", Channels(0.25, align=1))])])
def test_pruned_biases_stay_zero(plan: Plan | None) -> None:
    model, x = randomised(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))), torch.randn(8, 16)
    torch_prune.l1_unstructured(model[0], "bias", 0.5)
    result = shrunk(model.eval(), x, plan=plan, trainable=True)
    zero = result.get_parameter("0.bias") == 0
    train(result, x, steps=3)
    assert zero.any() and torch.equal(result.get_parameter("0.bias") == 0, zero)


@pytest.mark.parametrize("name", ["0", ""])
def test_what_prune_masks_of_a_result_trains(name: str) -> None:
    class Scaled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(16, 16), nn.ReLU())
            self.weight = nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight

    x = torch.randn(8, 16)
    result = shrunk(Scaled().eval(), x, plan=None, trainable=True)
    prune.l1_unstructured(result.get_submodule(name), "weight", 0.5)
    full = f"{name}.weight_orig".lstrip(".")
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), result):
        before = other.get_parameter(full).detach().clone()
        train(other, x)
        assert not torch.equal(other.get_parameter(full), before)
        oracle = other.get_parameter(full) * other.get_buffer(full.replace("orig", "mask"))
        again = shrunk(other, x, plan=None, trainable=True)
        assert torch.equal(again.get_parameter(full.removesuffix("_orig")), oracle)
        torch.testing.assert_close(again(x), other(x))
        train(again, x)
        assert torch.equal(again.get_parameter(full.removesuffix("_orig")) == 0, oracle == 0)


@pytest.mark.parametrize("masked_matmul", [False, True])
def test_prune_goes_on_from_a_results_mask(masked_matmul: bool) -> None:
    """An amount is a share of what is left, as where torch prunes what it has pruned before."""
    x, options = torch.randn(8, 16), {"masked_matmul": masked_matmul}
    result = shrunk(network(), x, plan=Plan([Rule("*", Unstructured(0.5))]), trainable=True, options=options)
    own = result.get_parameter("0.weight") != 0
    train(result, x)
    for left in (0.4, 0.32):
        prune.l1_unstructured(result.get_submodule("0"), "weight", 0.2)
        train(result, x)
        kept = result.get_buffer("0.weight_mask") != 0
        assert kept.double().mean() == pytest.approx(left, abs=1e-3) and not bool((kept & ~own).any())
        assert torch.equal(result.get_submodule("0").weight != 0, kept)
    again = shrunk(result, x, plan=None, trainable=True, options=options)
    assert_same(again(x), result(x))
    assert {n for n in again.state_dict() if not n.endswith("_keep")} == set(network().state_dict())
    train(again, x)
    assert torch.equal(again.get_parameter("0.weight") != 0, kept)
    prune.remove(result.get_submodule("0"), "weight")
    train(result, x)
    # Without its hook a result keeps what it kept itself.
    assert torch.equal(result.get_parameter("0.weight") != 0, own)


@pytest.mark.parametrize("functions", [prune, torch_prune], ids=["fxprune", "torch"])
def test_a_results_masks_and_pruning_hooks_go_together(functions: Any) -> None:
    x = torch.randn(8, 16)
    result = shrunk(network(), x, plan=Plan([Rule("*", Unstructured(0.5))]), trainable=True)
    parts = [result.get_submodule(name) for name in ("0", "4")]
    for _ in range(3):
        functions.global_unstructured([(part, "weight") for part in parts], torch_prune.L1Unstructured, amount=0.6)
        train(result, x)
    # torch's own masks keep a module from being copied.
    copies = [copy.deepcopy(result), pickle.loads(pickle.dumps(result))] if functions is prune else []
    for other in (*copies, result):
        assert_same(shrunk(other, x, plan=None)(x), other(x))
        again = shrunk(other, x, plan=None, trainable=True)
        zeros = {name: again.get_parameter(name) == 0 for name in ("0.weight", "4.weight")}
        assert_same(again(x), other(x))
        train(again, x)
        assert all(torch.equal(again.get_parameter(name) == 0, zero) for name, zero in zeros.items())
        smaller = shrunk(other, x, plan=Plan([Rule("*", Channels(0.25, align=1))]), trainable=True)
        train(smaller, x)
        assert smaller.get_parameter("0.weight").shape == (48, 16)


PLANS: dict[str, list[Plan]] = {
    "masks": [Plan([Rule("*", Unstructured(1 - 0.8**n))]) for n in range(1, 6)],
    "channels": [Plan([Rule("*", Channels(0.2, align=1))])] * 5,
    "both": [
        Plan([Rule("*", Channels(0.2, align=1))]),
        Plan([Rule("*", Unstructured(0.3))]),
        Plan([Rule("0.*", Channels(0.2, align=1)), Rule("4.*", Unstructured(0.4))]),
        Plan([Rule("*", Unstructured(0.5))]),
        Plan([Rule("*", Channels(0.1, align=1))]),
    ],
}


@pytest.mark.parametrize("kind", PLANS)
def test_the_usual_loop(kind: str) -> None:
    """Prune, train, five times; the optimiser goes on with the state that it had wherever the shapes allow it."""
    result, x, state = network(), torch.randn(8, 16), None
    sizes: list[int] = []
    for plan in PLANS[kind]:
        before = [p.shape for p in result.parameters()]
        result = shrunk(result, x, plan=plan, trainable=True)
        optimiser = torch.optim.AdamW(result.parameters(), 1e-2)
        if state is not None and before == [p.shape for p in result.parameters()]:
            optimiser.load_state_dict(state)
        result.train()
        for _ in range(3):
            optimiser.zero_grad()
            result(x).square().sum().backward()
            optimiser.step()
        result.eval()
        state = optimiser.state_dict()
        fast = shrunk(result, x, plan=None)
        torch.testing.assert_close(fast(x), result(x), rtol=1e-4, atol=1e-4)
        sizes.append(sum(int((p != 0).sum()) for p in fast.parameters() if p.dim() > 1))
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.55 * sizes[0]


@pytest.mark.parametrize("functions", [prune, torch_prune], ids=["fxprune", "torch"])
def test_the_usual_loop_with_pruning_functions(functions: Any) -> None:
    """Half the channels leave first; then a fifth of what is left is masked, five times."""
    x = torch.randn(8, 16)
    result = shrunk(network(), x, plan=Plan([Rule("0.*", Channels(0.5, align=1))]), trainable=True)
    optimiser = torch.optim.AdamW(result.parameters(), 1e-2)
    for number in range(1, 6):
        for name in ("0", "4"):
            functions.l1_unstructured(result.get_submodule(name), "weight", 0.2)
        again = torch.optim.AdamW(result.parameters(), 1e-2)
        if number > 1:
            again.load_state_dict(optimiser.state_dict())
        optimiser = again
        result.train()
        for _ in range(2):
            optimiser.zero_grad()
            result(x).square().sum().backward()
            optimiser.step()
        result.eval()
        fast = shrunk(result, x, plan=None)
        torch.testing.assert_close(fast(x), result(x), rtol=1e-4, atol=1e-4)
        for name in ("0", "4"):
            kept = result.get_submodule(name).weight_mask.double().mean()
            assert kept == pytest.approx(0.8**number, abs=0.01)
