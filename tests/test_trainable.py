"""Trainable results against the model that they came from: the same numbers, gradients and steps in both modes."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fxprune import admit
from fxprune.capture import Program, capture
from fxprune.couple import couple
from fxprune.errors import InputError
from fxprune.mask import PackedMask
from fxprune.modes import training_modes
from fxprune.passes.edit import copy_program
from fxprune.passes.shrink import shrink
from fxprune.trainable import TrainableModule, emit_trainable, origin_of
from tests.oracle import snapshot

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def compiled_code_does_not_pile_up() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def emitted(
    model: nn.Module,
    *args: Any,
    masks: dict[str, PackedMask] | None = None,
    edit: Callable[[Program], Program] = lambda program: program,
    **kwargs: Any,
) -> tuple[Any, list[str]]:
    """The model as a TrainableModule, and the notes of its modes."""
    with admit.untouched(model) if isinstance(model, nn.Module) else contextlib.nullcontext():
        captured = capture(model, args, kwargs)
    modes, notes = training_modes(model, captured, args, kwargs)
    program = edit(captured.program)
    return emit_trainable(program, captured.entry, modes, origin_of(model, captured), masks), notes


def trainable(model: nn.Module, *args: Any, **more: Any) -> Any:
    result, notes = emitted(model, *args, **more)
    assert notes == []
    return result


def seeded(module: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return module(*args, **kwargs)


def assert_same(a: Any, b: Any) -> None:
    """The same kernels on the same numbers: what rounding order may change, and no more."""
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], rtol=1e-6, atol=1e-6, msg=name)


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}


class Net(nn.Module):
    """A convolution with its norm, dropout, a tied pair, a buffer that is not saved and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(8), persistent=False)
        self.register_buffer("shift", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu().mean((2, 3)) * self.scale + self.shift
        return self.second(self.drop(self.first(y)).relu())


def net() -> Net:
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 6, 6)


class Forward(nn.Module):
    """A function of (module, x) as a forward; `parts` are its submodules."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.linear = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.linear(x))


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
    assert {n for n in result.state_dict() if n.endswith("_mask")} == {"first.weight_mask", "conv.weight_mask"}
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
        assert torch.equal(result.get_buffer(f"{name}_mask"), kept)


def test_a_mask_of_another_shape_is_refused() -> None:
    for name, shape in (("first.weight", (1, 8)), ("nowhere.weight", (8, 8))):
        with pytest.raises(InputError, match=name):
            emitted(net(), images(), masks={name: PackedMask.ones(shape)})


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


def test_it_sits_in_other_modules() -> None:
    model, x = net(), images()
    outer = nn.Sequential(trainable(model, x), nn.Linear(8, 2))
    oracle = nn.Sequential(copy.deepcopy(model), copy.deepcopy(outer[1]))
    for mode in (True, False):
        assert_same(seeded(outer.train(mode), x), seeded(oracle.train(mode), x))
    assert_same_state(outer, oracle)
    with pytest.raises(InputError):
        outer(torch.randn(4, 3, 7, 6))


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
