"""torch.compile(model, backend="fxprune"): right for every block, size and value of the parameters."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fxprune import FxPruneWarning, backend, errors
from fxprune.backend import fxprune

PACKED = {"layout": "nonzeros"}
# Leaves the compiler out, which takes seconds.
EAGER = {**PACKED, "compile": False}


class Net(nn.Module):
    """Linear, batch-norm (whose eps Dynamo makes an input when dynamic), linear, and arithmetic on the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.norm(self.a(x)))).view(x.shape[0], 2, 32) * x.shape[0]


class Blocks(nn.Module):
    """Blocks of one class with a graph break between them share one compiled frame."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Net() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x).flatten(1)
            torch._dynamo.graph_break()
        return x


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Three(nn.Module):
    """Three linears that read one input, so that they are stored together."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x) + self.v(x)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """A list that grows by what a function of the backend returns, at each call."""
    function, made = getattr(backend, name), []

    def called(*args: Any) -> Any:
        made.append(function(*args))
        return made[-1]

    monkeypatch.setattr(backend, name, called)
    return made


def pruned(model: nn.Module, amount: float = 0.9) -> nn.Module:
    """Hooks left on the first linear of each Net, made permanent on the second."""
    for module in model.modules():
        if isinstance(module, Net):
            prune.l1_unstructured(module.a, "weight", amount)
            prune.l1_unstructured(module.c, "weight", amount)
            prune.remove(module.c, "weight")
            assert module.norm.running_mean is not None
            module.norm.running_mean.normal_()
    return model.eval()


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_equals_the_pruned_model_at_every_batch_size(dynamic: bool | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fxprune")
    model = pruned(Net())
    compiled = torch.compile(model, backend=fxprune, options=PACKED, dynamic=dynamic)
    for batch in (3, 5, 9, 1, 2):
        x = torch.randn(batch, 64)
        assert_equal(compiled(x), model(x))
    assert "a.weight -> nonzeros" in caplog.text and "c.weight -> nonzeros" in caplog.text


def set_storage(weight: Tensor) -> None:
    weight.data.set_((weight.data * 2).untyped_storage(), 0, weight.shape, weight.stride())


def through_numpy(weight: Tensor) -> None:
    weight.numpy()[:] *= 2


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda w: w.mul_(2),
    "data": lambda w: w.data.mul_(2),
    "data replaced": lambda w: setattr(w, "data", w * 2),
    "set_": set_storage,
    "foreach on views": lambda w: torch._foreach_mul_([w.data[:5]], 2),
    "numpy": through_numpy,
    "one sign": lambda w: w.data.view(-1)[w.abs().argmax()].neg_(),
    "two rows swapped": lambda w: w.data.copy_(w[[1, 0, *range(2, len(w))]]),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", ["a.weight_orig", "a.weight_mask", "a.bias", "norm.weight", "c.weight", "c.bias"])
@torch.no_grad()
def test_whoever_writes_to_weights_is_seen(name: str, write: str) -> None:
    model = pruned(Net())
    for bias in (model.get_parameter("a.bias"), model.get_parameter("norm.weight")):
        bias.normal_()
    compiled = torch.compile(model, backend=fxprune, options=EAGER)
    x = torch.randn(4, 64)
    before = compiled(x)
    tensor = dict(model.named_parameters(), **dict(model.named_buffers()))[name]
    if tensor.dim() < 2 and write == "two rows swapped":
        tensor.data[:2] = tensor.data[[1, 0]]
    else:
        WRITES[write](tensor)
    assert_equal(compiled(x), model(x))
    assert not torch.equal(before, model(x)) or name == "a.weight_mask"


@torch.no_grad()
def test_biases_that_are_stored_together_are_seen() -> None:
    model = Three().eval()
    for linear in (model.q, model.k, model.v):
        prune.l1_unstructured(linear, "weight", 0.9)
        prune.remove(linear, "weight")
    compiled = torch.compile(model, backend=fxprune, options=EAGER)
    x = torch.randn(4, 64)
    assert_equal(compiled(x), model(x))
    model.k.bias.data.add_(1)
    assert_equal(compiled(x), model(x))


@torch.no_grad()
def test_what_a_pruning_hook_leaves_on_its_module_is_its_own() -> None:
    model: Any = pruned(Net())
    compiled = torch.compile(model, backend=fxprune, options=EAGER)
    x = torch.randn(4, 64)
    compiled(x)
    model.a.weight.mul_(3)
    assert_equal(compiled(x), model(x))
    compiled(x)
    assert torch.equal(model.a.weight, model.a.weight_orig * model.a.weight_mask)


@torch.no_grad()
def test_constant_weights_are_looked_at_by_version_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "fingerprint", lambda tensor: pytest.fail("weights are not read"))
    model = pruned(Net())
    compiled = torch.compile(model, backend=fxprune, options={**EAGER, "constant_weights": True})
    x = torch.randn(4, 64)
    assert_equal(compiled(x), model(x))
    model.get_parameter("c.weight").mul_(2)
    model.get_parameter("a.weight_orig").mul_(2)
    assert_equal(compiled(x), model(x))


@torch.no_grad()
def test_weights_on_a_gpu_are_packed_where_they_are_constant_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_on_gpu", lambda tensors: True)
    monkeypatch.setattr(backend, "fingerprint", lambda tensor: pytest.fail("a call would wait for the device"))
    monkeypatch.setattr(errors, "_warned", set())
    packings = counted(monkeypatch, "_pack")
    model, x = pruned(Net()), torch.randn(4, 64)
    with pytest.warns(FxPruneWarning, match="constant_weights"):
        compiled = torch.compile(model, backend=fxprune, options=EAGER)
        assert_equal(compiled(x), model(x))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fxprune, options={**EAGER, "constant_weights": True})
    assert_equal(compiled(x), model(x))
    assert [packed is None for packed in packings] == [True, False]


@torch.no_grad()
def test_only_what_is_packed_is_read_and_packed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    packings = counted(monkeypatch, "_pack")
    model = nn.Sequential(nn.Linear(64, 64), pruned(Net())).eval()
    compiled = torch.compile(model, backend=fxprune, options=EAGER)
    x = torch.randn(4, 64)
    compiled(x)
    for _ in range(3):
        model.get_parameter("0.weight").data.mul_(2)
        assert_equal(compiled(x), model(x))
    assert len(packings) == 1


@torch.no_grad()
def test_where_nothing_is_packed_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_Programs", lambda *_: pytest.fail("the graph is Inductor's alone"))
    model, x = Net().eval(), torch.randn(4, 64)
    compiled = torch.compile(model, backend=fxprune)
    assert_equal(compiled(x), model(x))
    model.get_parameter("c.weight").data.mul_(2)
    assert_equal(compiled(x), model(x))


@torch.no_grad()
def test_weights_that_change_keep_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    later = counted(monkeypatch, "_compiled_later")
    model = pruned(Net())
    compiled = torch.compile(model, backend=fxprune, options=PACKED)
    x = torch.randn(4, 64)
    for _ in range(3):
        model.get_parameter("c.weight").data.mul_(2)
        assert_equal(compiled(x), model(x))
    assert later == []


@torch.no_grad()
def test_weights_that_change_again_and_again_run_dense_compiled_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    later, packings = counted(monkeypatch, "_compiled_later"), counted(monkeypatch, "_pack")
    model = pruned(Net())
    compiled = torch.compile(model, backend=fxprune, options=PACKED)
    weight = model.get_parameter("c.weight")
    with pytest.warns(FxPruneWarning, match="changed again and again") as told:
        for step in range(2 * backend.MOST_CHANGES):
            x = torch.randn(4 + step % 3, 64)
            weight.data.mul_(1.1)
            assert_equal(compiled(x), model(x))
    assert len([w for w in told if w.category is FxPruneWarning]) == 1
    assert len(later) == 1 and hasattr(later[0], "_torchdynamo_orig_callable")
    assert len(packings) <= 1 + backend.MOST_CHANGES


@torch.no_grad()
def test_rare_changes_go_on_being_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FEW_CALLS", 2)
    packings = counted(monkeypatch, "_pack")
    model, x = pruned(Net()), torch.randn(4, 64)
    compiled = torch.compile(model, backend=fxprune, options=EAGER)
    for step in range(2 * backend.MOST_CHANGES):
        for _ in range(2):
            assert_equal(compiled(x), model(x))
        model.get_parameter("c.weight").data.mul_(1.1)
        assert len(packings) == 1 + step


@torch.no_grad()
def test_the_oldest_program_goes_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(errors, "_warned", set())
    model, x = pruned(Blocks()), torch.randn(4, 64)
    compiled = torch.compile(model, backend=fxprune, options=EAGER)
    with pytest.warns(FxPruneWarning, match="changed again and again"):
        for _ in range(backend.MOST_CHANGES):
            assert_equal(compiled(x), model(x))


@pytest.mark.parametrize("amounts", [(0.9, 0.9, 0.9), (0.9, 0.5, 0.0)], ids=["alike", "of other sparsity"])
@torch.no_grad()
def test_blocks_that_share_a_frame_keep_their_own_weights_and_are_compiled(
    amounts: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    later = counted(monkeypatch, "_compiled_later")
    model = Blocks()
    for block, amount in zip(model.blocks, amounts, strict=True):
        pruned(block, amount)
    compiled = torch.compile(model.eval(), backend=fxprune, options=PACKED)
    for batch in (4, 7, 4):
        x = torch.randn(batch, 64)
        assert_equal(compiled(x), model(x))
    # What differs in values alone shares what was compiled; nothing runs eager.
    assert (later == []) is (len(set(amounts)) == 1)
    assert all(hasattr(program, "_torchdynamo_orig_callable") for program in later)


@torch.no_grad()
def test_blocks_that_differ_in_a_number_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    later = counted(monkeypatch, "_compiled_later")
    model = pruned(Blocks())
    for eps, norm in zip((1e-5, 1.0, 2.0), [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)], strict=True):
        norm.eps = eps
    compiled = torch.compile(model, backend=fxprune, options=PACKED, dynamic=True)
    for batch in (4, 7):
        x = torch.randn(batch, 64)
        assert_equal(compiled(x), model(x))
    assert all(hasattr(program, "_torchdynamo_orig_callable") for program in later)


@torch.no_grad()
def test_parameters_that_are_replaced_are_let_go() -> None:
    model: Any = pruned(Net())
    compiled = torch.compile(model, backend=fxprune, options=EAGER)
    x = torch.randn(4, 64)
    compiled(x)
    old = weakref.ref(model.c.weight)
    for _ in range(3):
        model.c.weight = nn.Parameter(model.c.weight * 2)
        assert_equal(compiled(x), model(x))
    gc.collect()
    assert old() is None


@torch.no_grad()
def test_modules_of_one_function_keep_their_own_weights() -> None:
    class Shift(nn.Module):
        """Its parameter has the name of the others' linear."""

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(64))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a

    shift, first, second = Shift(), pruned(Net()), pruned(Net())
    compiled = torch.compile(lambda x: first(shift(x)) + second(x), backend=fxprune, options=PACKED)
    x = torch.randn(4, 64)
    assert_equal(compiled(x), first(shift(x)) + second(x))


@torch.no_grad()
def test_a_model_that_keeps_state_stays_dense_and_keeps_it(caplog: pytest.LogCaptureFixture) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = pruned(Net()), nn.Buffer(torch.zeros(64))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(x.sum(0))
            return self.net(x) + (self.seen * 2).sum()

    model, x = Counts().eval(), torch.randn(4, 64)
    compiled = torch.compile(model, backend=fxprune, options=PACKED)
    for calls in (1, 2, 3):
        got = compiled(x)
        torch.testing.assert_close(model.seen, calls * x.sum(0))
        assert_equal(got, model.net(x) + (model.seen * 2).sum())
    assert "it writes to its parameters or buffers" in caplog.text


def test_inference_tensors_are_taken() -> None:
    for options in (EAGER, {**EAGER, "constant_weights": True}):
        torch._dynamo.reset()
        with torch.inference_mode():
            model, x = pruned(Net()), torch.randn(4, 64)
            compiled = torch.compile(model, backend=fxprune, options=options)
            assert_equal(compiled(x), model(x))


def test_with_gradients_the_graph_stays_dense_and_trains(caplog: pytest.LogCaptureFixture) -> None:
    model = pruned(Net())
    x = torch.randn(4, 64)
    expected = torch.autograd.grad(model(x).square().sum(), [model.get_parameter("c.weight")])
    compiled: Any = torch.compile(model, backend=fxprune)
    got = torch.autograd.grad(compiled(x).square().sum(), [model.get_parameter("c.weight")])
    assert_equal(got[0], expected[0])
    assert "gradients are enabled" in caplog.text


@torch.no_grad()
def test_under_autocast_the_graph_stays_dense_and_follows_it(caplog: pytest.LogCaptureFixture) -> None:
    model, x = pruned(Net()), torch.randn(4, 64)
    compiled = torch.compile(model, backend=fxprune, options=PACKED)
    assert_equal(compiled(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = compiled(x), model(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    # Two roundings to bfloat16 a layer, in another order than eager's.
    assert float((got - expected).abs().max()) <= 5e-2 * float(expected.abs().max())
    assert_equal(compiled(x), model(x))
    assert "autocast is on" in caplog.text


@torch.no_grad()
@torch.no_grad()
def test_a_fast_path_that_hides_weights_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    layer, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 5, 32)
    for linear in (layer.linear1, layer.linear2):
        linear.weight.mul_(torch.rand_like(linear.weight) < 0.1)
    packed = counted(monkeypatch, "_pack")
    with pytest.warns(FxPruneWarning, match="set_fastpath_enabled"):
        assert_equal(torch.compile(layer, backend=fxprune, options=EAGER)(x), layer(x))
    assert packed == [None]
    torch._dynamo.reset()
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert_equal(torch.compile(layer, backend=fxprune, options=EAGER)(x), layer(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert packed[-1] is not None


@torch.no_grad()
def test_an_op_that_makes_tensors_of_its_numbers_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y * torch.cosine_similarity(y, x, dim=-1)[:, None]

    model, x = Alike().eval(), torch.randn(3, 64)
    packed = counted(monkeypatch, "_pack")
    prune.l1_unstructured(model.linear, "weight", 0.9)
    assert_equal(torch.compile(model, backend=fxprune, options=EAGER)(x), model(x))
    assert len(packed) == 1 and packed[0] is not None


def test_unknown_option_is_refused() -> None:
    compiled = torch.compile(pruned(Net()), backend=fxprune, options={"layuot": "dense"})
    # Dynamo wraps what a backend raises, and keeps its words.
    with pytest.raises(
        torch._dynamo.exc.BackendCompilerFailed, match=r"unknown option 'layuot'. Did you mean 'layout'\?"
    ):
        compiled(torch.randn(2, 64))
