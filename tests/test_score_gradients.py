"""Scores from gradients: each against its formula in float64, on a model that must come out of it as it was."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from fxprune.errors import InputError
from fxprune.gradient_score import fisher, snip, taylor
from fxprune.plan.scores import Scores
from tests.oracle import snapshot

METHODS = [taylor, snip, fisher]
Method = Callable[..., Scores]


def refused(make: Callable[[], object], *words: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert error.value.what and error.value.where and error.value.why and error.value.do
    for word in words:
        assert word in str(error.value), str(error.value)


class Net(nn.Module):
    """Conv, batch-norm, dropout, a tied pair of linears, and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.idle = nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        self.last = self.drop(F.relu(self.norm(self.conv(x)))).mean(-1)
        return self.b(torch.tanh(self.a(self.last))) * scale


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double().eval()


def pairs(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(9)
    return [
        (torch.randn(5 + i, 2, 8, generator=draw).double(), torch.randint(0, 4, (5 + i,), generator=draw))
        for i in range(count)
    ]


def gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    """Every batch's gradients, by ordinary backward on a copy."""
    found = []
    for x, y in batches:
        twin = copy.deepcopy(model)
        F.cross_entropy(twin(x), y).backward()
        named = twin.named_parameters(remove_duplicate=False)
        found.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named})
    return found


def expected(method: Method, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    all_gradients = gradients(model, batches)
    weights = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    mean = {n: sum(g[n] for g in all_gradients) / len(batches) for n in weights}
    if method is taylor:
        return {n: mean[n] * w for n, w in weights.items()}
    if method is fisher:
        return {n: 0.5 * sum(g[n] ** 2 for g in all_gradients) / len(batches) * w**2 for n, w in weights.items()}
    total = sum((mean[n] * p.detach()).abs().sum() for n, p in model.named_parameters())
    return {n: (mean[n] * w).abs() / total for n, w in weights.items()}


def assert_scores(found: Scores, wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32 and not found[name].requires_grad
        torch.testing.assert_close(found[name], value.float(), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 3])
def test_formulas(method: Method, count: int) -> None:
    model, batches = net(), pairs(count)
    found = method(model, batches, F.cross_entropy, progress=False)
    assert_scores(found, expected(method, model, batches))
    assert found.signed == (method is taylor) and found.method == method.__name__
    assert torch.equal(found["a.weight"], found["b.weight"]) and bool(found["a.weight"].any())
    assert found["idle"].tolist() == [0, 0, 0]


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    model, (x, y) = net(), pairs(1)[0]
    found = taylor(model, [(x, y)], F.cross_entropy, progress=False)
    with torch.no_grad():
        before = F.cross_entropy(model(x), y)
        step = 1e-6
        model.conv.weight[1] *= 1 - step
        after = F.cross_entropy(model(x), y)
    torch.testing.assert_close(found["conv.weight"][1].sum().double() * -step, after - before, rtol=1e-4, atol=1e-14)


def test_snips_sum_is_one_with_tied_parameters_counted_once() -> None:
    found = snip(net(), pairs(), F.cross_entropy, progress=False)
    total = sum(float(v.sum()) for name, v in found.items() if name != "b.weight")
    assert total == pytest.approx(1.0, abs=1e-6)


def state(model: nn.Module) -> tuple[Any, ...]:
    grads = {n: None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in model.named_parameters()}
    assert all(not p._backward_hooks for p in model.parameters())
    held = {n: None if g is None else (g[0], g[1].tolist()) for n, g in grads.items()}
    return snapshot(model), held, [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was(method: Method, training: bool) -> None:
    model = net().train(training)
    model.drop.train(not training)
    model.conv.weight.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    model.a.bias.grad = torch.full((4,), 7.0, dtype=torch.float64)
    before = state(model)
    first = method(model, pairs(), F.cross_entropy, progress=False)
    assert state(model) == before
    assert bool(first["conv.weight"].any()) and bool(first["norm.weight"].any())
    assert not hasattr(model, "last") and model.calls == 0
    broken = [*pairs(1), (torch.zeros(3, 5, 8), torch.zeros(3))]
    with pytest.raises(RuntimeError):
        method(model, broken, F.cross_entropy, progress=False)
    refused(lambda: method(model, [*pairs(1), 3], F.cross_entropy, progress=False), "batch 2", "int")
    assert state(model) == before


def test_the_models_own_mode_is_used() -> None:
    model = net()
    model.drop.p = 0.0
    wanted = {}
    for training in (True, False):
        wanted[training] = expected(taylor, model.train(training), pairs())
        assert_scores(taylor(model, pairs(), F.cross_entropy, progress=False), wanted[training])
    assert not torch.equal(wanted[True]["conv.weight"], wanted[False]["conv.weight"])


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_under_no_grad(context: Callable[[], Any]) -> None:
    model, data = net(), pairs()
    with context():
        found = fisher(model, data, F.cross_entropy, progress=False)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
    assert_scores(found, expected(fisher, model, data))


def test_the_loss_may_speak_of_the_model_itself() -> None:
    model, (x, y) = net(), pairs(1)[0]
    model.requires_grad_(False)
    found = taylor(model, [(x, y)], lambda out, _: (model.idle**2).sum() + 0 * out.sum(), progress=False)
    assert found["idle"].tolist() == [2, 2, 2] and not bool(found["conv.weight"].any())


def test_forms_of_batches() -> None:
    model = net()
    data = pairs()
    wanted = expected(taylor, model, data)

    def loader() -> Iterator[Any]:
        with torch.no_grad():  # which a generator leaves on for whoever it yields to
            yield from data

    forms: list[Any] = [
        loader(),
        torch.utils.data.DataLoader(data, batch_size=None),
        tuple(map(list, data)),
        [((x, 1.0), y) for x, y in data],
        [([x], y) for x, y in data],
        [({"x": x, "scale": 1.0}, y) for x, y in data],
    ]
    for batches in forms:
        assert_scores(taylor(model, batches, F.cross_entropy, progress=False), wanted)


def test_a_mapping_is_the_call_and_the_target() -> None:
    seen: list[Any] = []

    def loss(out: Tensor, batch: Any) -> Tensor:
        seen.append(batch)
        return out.square().mean()

    x = pairs(1)[0][0]
    for batch in ({"x": x, "scale": 2.0}, UserDict(x=x, scale=2.0)):
        found = taylor(net(), [batch], loss, progress=False)
        assert seen.pop() is batch
        doubled = taylor(net(), [x], lambda out, _: (2 * out).square().mean(), progress=False)
        assert torch.equal(found["a.weight"], doubled["a.weight"])


def test_a_tensor_is_its_own_target() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 3, bias=False), torch.randn(4, 3)
    wanted = copy.deepcopy(model)
    F.mse_loss(wanted(x), x).backward()
    found = taylor(model, [x], F.mse_loss, progress=False)
    torch.testing.assert_close(found["weight"], wanted.weight.detach() * wanted.weight.grad)


def test_the_progress_bar_is_silent_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    taylor(net(), pairs(), F.cross_entropy)
    assert capfd.readouterr() == ("", "")


def test_hooks_and_parametrizations_are_folded() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)]
    plain = nn.Sequential(*layers).double().eval()
    x, y = torch.randn(6, 4).double(), torch.randint(0, 2, (6,))
    model = copy.deepcopy(plain)
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    parametrizations.weight_norm(model[2])
    with torch.no_grad():
        plain[0].weight.mul_(model[0].weight_mask)
    before = state(model)
    for method in METHODS:
        found = method(model, [(x, y)], F.cross_entropy, progress=False)
        assert_scores(found, expected(method, plain, [(x, y)]))
        assert not bool(found["0.weight"][model[0].weight_mask == 0].any())
    assert state(model) == before
    assert set(found.by_module(model)) >= {(model[0], "weight"), (model[2], "weight"), (model[4], "bias")}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_recurrent_layers_in_evaluation(kind: Any, device: str) -> None:
    """cuDNN refuses gradients there."""
    torch.manual_seed(0)
    twin = kind(3, 4, num_layers=2, dropout=0.5).double().eval()
    x = torch.randn(5, 2, 3).double()
    model = copy.deepcopy(twin).to(device)
    before = state(model)
    found = taylor(model, [x.to(device)], lambda out, _: out[0].square().mean(), progress=False)
    assert state(model) == before and model.dropout == 0.5
    twin(x)[0].square().mean().backward()
    wanted = {n: p.detach() * p.grad for n, p in twin.named_parameters()}
    assert_scores(Scores({n: v.cpu() for n, v in found.items()}), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_adds_up_in_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(1, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.fill_(2.0)
    batches = [torch.tensor([[1.0]]).to(dtype)] + [torch.tensor([[2.0**-12]]).to(dtype)] * 4
    found = taylor(model, batches, lambda out, _: out.sum(), progress=False)
    assert found["weight"].dtype == torch.float32
    assert found["weight"].item() == pytest.approx(2 * (1 + 4 * 2**-12) / 5, rel=1e-6)


def test_squares_of_float16_gradients_do_not_overflow() -> None:
    model = nn.Linear(1, 1, bias=False).half()
    with torch.no_grad():
        model.weight.fill_(0.5)
    found = fisher(model, [torch.tensor([[1000.0]]).half()], lambda out, _: out.sum(), progress=False)
    assert found["weight"].item() == 0.5 * 1000.0**2 * 0.5**2


def test_sparse_gradients() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    ids = torch.tensor([1, 1, 3])
    found = taylor(model, [(ids, None)], lambda out, _: out.sum(), progress=False)
    wanted = model.weight.detach() * torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0]).unsqueeze(1)
    torch.testing.assert_close(found["weight"], wanted)


def test_integer_parameters_have_no_score() -> None:
    model = net()
    model.table = nn.Parameter(torch.arange(3), requires_grad=False)
    assert "table" not in taylor(model, pairs(), F.cross_entropy, progress=False)


def loss_of(answer: Callable[[Tensor], Any]) -> Callable[[Any, Any], Any]:
    return lambda out, _: answer(out)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda out: out.sum(1), ["batch 1", "torch.float64 [5]", "not a scalar"]),
        (lambda out: 3.0, ["batch 1", "float, not a scalar"]),
        (lambda out: out.argmax(), ["torch.int64", "not a scalar"]),
        (lambda out: out.detach().sum(), ["does not depend"]),
        (lambda out: out.sum() * float("nan"), ['"conv.weight" [4, 2, 3], batch 1', "NaN or infinite"]),
        (lambda out: out.sum() * 1e300 * 1e300, ["NaN or infinite"]),
    ],
)
def test_bad_losses(method: Method, loss: Callable[[Tensor], Any], words: list[str]) -> None:
    refused(lambda: method(net(), pairs(), loss_of(loss), progress=False), method.__name__, *words)


def test_bad_batches() -> None:
    anything: Any
    for anything, words in (
        ([], ["there were none"]),
        (iter(()), ["there were none"]),
        (torch.ones(2, 2, 8), ["Tensor", "[batch]"]),
        ({"x": torch.ones(2, 2, 8)}, ["dict", "[batch]"]),
        (3, ["int is no series"]),
        ([(1, 2, 3)], ["batch 1", "tuple of 3"]),
        ([None], ["batch 1", "NoneType"]),
    ):
        refused(lambda given=anything: taylor(net(), given, F.cross_entropy, progress=False), *words)


def test_bad_models() -> None:
    anything: Any = F.relu
    refused(lambda: taylor(anything, pairs(), F.cross_entropy), "function", "plain torch.nn.Module")
    refused(lambda: taylor(torch.compile(net()), pairs(), F.cross_entropy), "OptimizedModule")
    refused(lambda: taylor(net().to("meta"), pairs(), F.cross_entropy), '"idle"', "meta")


@pytest.mark.parametrize("method", METHODS)
def test_a_group_norm_over_an_image_in_channels_last_ends_nothing(method: Method) -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 6), nn.Flatten()).eval()
    images, labels = torch.randn(5, 4, 6, 6), torch.randint(0, 3, (5,))
    plain, last = (
        method(model, [(x, labels)], F.cross_entropy) for x in (images, images.to(memory_format=torch.channels_last))
    )
    torch.testing.assert_close({n: last[n] for n in last}, {n: plain[n] for n in plain})
