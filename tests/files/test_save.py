"""What `save` wrote `load` gives back: the same weights bit for bit, outputs, report, selection, refusals."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils import _pytree as pytree

import fxprune
from fxprune import Blocks, Channels, Drop, FxPruneError, Plan, Rule, Unstructured
from fxprune.emit.trainable.module import TrainableModule
from fxprune.errors import FileError, InputError
from fxprune.kernels.native import status
from tests.emit.test_result import MODELS
from tests.own_process import printed
from tests.structured_oracle import Net, randomised

EAGER: dict[str, Any] = {"compile": False, "measure": False}
MOST = Plan([Rule("*.weight", Unstructured(0.8))])


def transform(model: nn.Module, plan: Plan | None, x: Any, *, trainable: bool = False, **options: Any) -> Any:
    given = {} if trainable else {**EAGER, **options}
    return fxprune.transform(model, plan, x, trainable=trainable, options=given, progress=False)


def through(result: Any, folder: Path, **more: Any) -> Any:
    return fxprune.load(fxprune.save(result, folder / "model.safetensors"), progress=False, **more)


def mlp() -> nn.Module:
    return randomised(nn.Sequential(nn.Linear(40, 67), nn.GELU(), nn.Linear(67, 33))).eval()


def cnn() -> nn.Module:
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=2))
    return randomised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))).eval()


def assert_same(loaded: Any, result: Any, *calls: tuple[Any, ...]) -> None:
    """Everything that can be asked of a result has the same answer, to the last bit."""
    for call in calls:
        got, wanted = loaded(*call), result(*call)
        assert pytree.tree_structure(got) == pytree.tree_structure(wanted)
        for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(wanted), strict=True):
            assert torch.equal(a, b) if isinstance(b, Tensor) else a == b
    for ask in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(loaded, ask)()), dict(getattr(result, ask)())
        assert sorted(ours) == sorted(theirs)
        for name, tensor in theirs.items():
            other = ours[name]
            assert torch.equal(other, tensor) and other.stride() == tensor.stride() and other.dtype == tensor.dtype
            assert other.requires_grad == tensor.requires_grad
    assert set(loaded.state_dict()) == set(result.state_dict())
    assert [n.name for n in loaded.graph.nodes] == [n.name for n in result.graph.nodes]
    assert str(loaded.report) == str(result.report)
    assert loaded.selection.words() == result.selection.words()
    assert loaded.meta["settings"] == result.meta["settings"] and loaded.meta["plan"] == result.meta["plan"]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_result_of_any_outputs_comes_back(name: str, trainable: bool, tmp_path: Path) -> None:
    model, x = MODELS[name]().eval(), torch.randn(2, 5, 16)
    result = transform(model, None, (x,), trainable=trainable)
    calls = [(torch.randn(size, 5, 16),) for size in (1, 2, 3)]
    loaded = through(result, tmp_path)
    assert type(loaded(x)) is type(result(x))
    assert_same(loaded, result, *calls)


@pytest.mark.parametrize("layout", ["nonzeros", "bitmap", "dense"])
def test_weights_come_back_as_they_are_packed(layout: str, tmp_path: Path) -> None:
    x = torch.randn(5, 40)
    result = transform(mlp(), MOST, (x,), layout=layout)
    assert {weight.layout for weight in result.report.weights} == {layout}
    assert_same(through(result, tmp_path), result, (x,), (torch.randn(1, 40),), (torch.randn(70, 40),))


@pytest.mark.skipif(not status().available, reason="a net needs the C++ kernels")
def test_a_net_of_convolutions_comes_back(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    result = transform(cnn(), MOST, (x,), layout="nonzeros")
    assert any("net" in str(node.target) for node in result.graph.nodes)
    assert_same(through(result, tmp_path), result, (x,), (torch.randn(3, 3, 9, 9),))


PLANS: dict[str, tuple[Callable[[], nn.Module], Plan, tuple[int, ...]]] = {
    "channels": (cnn, Plan([Rule("*", Channels(0.5, align=1))]), (2, 3, 9, 9)),
    "blocks": (mlp, Plan([Rule("0.weight", Blocks(0.5, (1, 8)))]), (5, 40)),
    "both": (cnn, Plan([Rule("*", Channels(0.5, align=1)), Rule("6.weight", Unstructured(0.5))]), (2, 3, 9, 9)),
}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_every_pattern_comes_back(name: str, trainable: bool, tmp_path: Path) -> None:
    make, plan, shape = PLANS[name]
    x = torch.randn(shape)
    result = transform(make(), plan, (x,), trainable=trainable)
    assert_same(through(result, tmp_path), result, (x,), (torch.randn(1, *shape[1:]),))


def test_channels_last_half_precision_and_complex_tensors_come_back(tmp_path: Path) -> None:
    images = cnn().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9)
    result = transform(images, None, (x,))
    assert any(not p.is_contiguous() for p in result.parameters())
    assert_same(through(result, tmp_path), result, (x,))
    y = torch.randn(5, 40, dtype=torch.bfloat16)
    narrow = transform(mlp().bfloat16(), MOST, (y,))
    assert_same(through(narrow, tmp_path), narrow, (y,))
    wave = Net(lambda m, x: torch.view_as_real(torch.fft.fft(m.l(x)) * m.turn), l=nn.Linear(16, 8)).eval()
    wave.register_buffer("turn", torch.polar(torch.ones(8), torch.arange(8.0)))
    z = torch.randn(2, 16)
    turned = transform(wave, None, (z,))
    assert_same(through(turned, tmp_path), turned, (z,))


def test_tied_weights_stay_one_and_a_dropped_block_stays_gone(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model, ids = Tied().eval(), torch.randint(50, (2, 7))
    result = transform(model, Plan([Drop("blocks.1")]), (ids,), trainable=True)
    loaded = through(result, tmp_path)
    assert_same(loaded, result, (ids,))
    names = [name for name, _ in loaded.named_parameters()]
    assert names == [name for name, _ in result.named_parameters()] and not any("blocks.1" in name for name in names)
    assert len([p for p in loaded.parameters() if p.shape == (50, 16)]) == 1
    assert loaded.report.dropped == result.report.dropped


def test_calibrated_values_and_their_report_come_back(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(6, 40)
    result = fxprune.transform(model, MOST, (x,), calibration=[torch.randn(8, 40)], options=EAGER, progress=False)
    loaded = through(result, tmp_path)
    assert result.selection.values and loaded.selection.fits == result.selection.fits
    assert_same(loaded, result, (x,))


def test_a_selection_is_replayed_from_its_file(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    result = transform(cnn(), PLANS["both"][1], (x,))
    selection = through(result.selection, tmp_path)
    again = fxprune.transform(cnn(), selection=selection, example_inputs=(x,), options=EAGER, progress=False)
    assert torch.equal(again(x), result(x))


def test_a_trainable_result_switches_its_mode_and_trains_on(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 9, 9)
    result = transform(cnn(), PLANS["both"][1], (x,), trainable=True)
    loaded = through(result, tmp_path)
    assert isinstance(loaded, TrainableModule) and not loaded.training
    for mode in (True, False):
        assert torch.equal(loaded.train(mode)(x), result.train(mode)(x))
    for module in (loaded, result):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module.train()(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(loaded.eval()(x), result.eval()(x))
    assert through(result.train(), tmp_path).training


def test_a_loaded_result_refuses_what_the_saved_one_refused(tmp_path: Path) -> None:
    model = Net(lambda m, x, flag=True: m.l(x).sum(1) / x.shape[1] if flag else x, l=nn.Linear(16, 8)).eval()
    result = transform(model, None, (torch.randn(2, 5, 16),))
    loaded = through(result, tmp_path)
    for call in ((torch.randn(2, 6, 16),), (torch.randn(2, 5, 16), False), (torch.randn(2, 5, 16).double(),), ()):
        with pytest.raises(InputError) as wanted:
            result(*call)
        with pytest.raises(InputError) as got:
            loaded(*call)
        assert str(got.value) == str(wanted.value)


def test_a_new_process_needs_neither_the_class_nor_inputs(tmp_path: Path) -> None:
    x = torch.randn(5, 40)
    result = fxprune.transform(mlp(), MOST, (x,), options={"measure": False}, progress=False)
    path = fxprune.save(result, tmp_path / "model.safetensors")
    torch.save({"x": x, "y": result(x)}, tmp_path / "call.pt")
    script = (
        "import sys, torch, fxprune; call = torch.load(sys.argv[2]); fast = fxprune.load(sys.argv[1]);"
        "print((fast(call['x']) - call['y']).abs().max().item(), fast.is_compiled)"
    )
    error, compiled = printed(script, str(path), str(tmp_path / "call.pt")).split()
    assert float(error) < 1e-6 and compiled == "True"


def test_the_header_can_be_read_without_fxprune(tmp_path: Path) -> None:
    from safetensors import safe_open

    result = transform(mlp(), MOST, (torch.randn(5, 40),), layout="nonzeros")
    with safe_open(fxprune.save(result, tmp_path / "model.safetensors"), "pt") as file:
        assert set(result.state_dict()) <= set(file.keys())
        assert file.metadata()["fxprune"] == "1" and '"aten.' not in file.metadata()["sha256"]


@pytest.mark.parametrize("outputs", ["own", "plain"])
def test_a_class_of_outputs_that_is_not_here_is_named(outputs: str, tmp_path: Path) -> None:
    class Answer:
        def __init__(self, y: Tensor) -> None:
            self.y = y

    pytree.register_pytree_node(
        Answer, lambda a: ([a.y], ["y"]), lambda values, _: Answer(*values), serialized_type_name="somewhere.Answer",
        flatten_with_keys_fn=lambda a: ([(pytree.GetAttrKey("y"), a.y)], ["y"]),
    )  # fmt: skip
    try:
        x = torch.randn(2, 16)
        result = transform(Net(lambda m, x: Answer(m.l(x)), l=nn.Linear(16, 8)).eval(), None, (x,))
        path, wanted = fxprune.save(result, tmp_path / "model.safetensors"), result(x).y
        assert torch.equal(fxprune.load(path)(x).y, wanted)
    finally:
        pytree._deregister_pytree_node(Answer)
    if outputs == "plain":
        assert torch.equal(fxprune.load(path, outputs="plain")(x)["y"], wanted)
    else:
        with pytest.raises(FileError, match=r'Answer.*outputs="plain"'):
            fxprune.load(path)


def test_kernels_that_are_not_here_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 40)
    result = transform(mlp(), MOST, (x,), layout="nonzeros")
    path = fxprune.save(result, tmp_path / "model.safetensors")
    torch.save({"x": x, "y": result(x)}, tmp_path / "call.pt")
    script = (
        "import sys, torch, fxprune; call = torch.load(sys.argv[2]); fast = fxprune.load(sys.argv[1], progress=False);"
        "ops = {n.target.namespace for n in fast.graph.nodes if hasattr(n.target, 'namespace')};"
        "print((fast(call['x']) - call['y']).abs().max().item(), 'fxprune' in ops, 'no kernel' in str(fast.report))"
    )
    monkeypatch.setenv("FXPRUNE_NATIVE", "0")
    error, packed, told = printed(script, str(path), str(tmp_path / "call.pt")).split()
    assert float(error) < 1e-5 and packed == "False" and told == "True"


@pytest.mark.skipif(not status().available, reason="layouts that pay need the C++ kernels")
def test_layouts_are_chosen_anew_where_that_is_asked_for(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).eval()
    x = torch.randn(64, 512)
    dense = transform(model, Plan([Rule("*.weight", Unstructured(0.95))]), (x,), layout="dense")
    path = fxprune.save(dense, tmp_path / "model.safetensors")
    again = fxprune.load(path, retune=True, progress=False)
    assert "chosen anew" in str(again.report) and again.selection.words() == dense.selection.words()
    torch.testing.assert_close(again(x), dense(x), rtol=1e-4, atol=1e-4)
    assert again.meta["plan"] == dense.meta["plan"]
    assert "chosen anew" in str(through(again, tmp_path).report)


@pytest.mark.parametrize("trainable", [False, True])
def test_pickle_and_copies_work_and_torch_load_says_what_to_do(trainable: bool, tmp_path: Path) -> None:
    x = torch.randn(5, 40)
    result = transform(mlp(), MOST, (x,), trainable=trainable)
    torch.save(result, tmp_path / "model.pt")
    for other in (
        pickle.loads(pickle.dumps(result)),
        copy.deepcopy(result),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert_same(other, result, (x,))
    with pytest.raises(FileError, match=r"fxprune.save"):
        torch.load(tmp_path / "model.pt")


def _answer(result: Any, x: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(result(x).detach().numpy())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_is_given_a_result(method: str, trainable: bool) -> None:
    x = torch.randn(5, 40)
    result = transform(mlp(), MOST, (x,), trainable=trainable)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_answer, args=(result, x, queue))
    process.start()
    got = torch.from_numpy(queue.get(timeout=120))
    process.join(timeout=60)
    torch.testing.assert_close(got, result(x).detach(), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_saved_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    pending = fxprune.transform(mlp(), MOST, progress=False)
    with pytest.raises(FileError, match=r"cannot save this result yet"):
        fxprune.save(pending, path)
    with pytest.raises(FileError, match=r"cannot save a Linear"):
        fxprune.save(nn.Linear(2, 2), path)  # pyright: ignore
    student = transform(cnn(), PLANS["channels"][1], (torch.randn(2, 3, 9, 9),), trainable=True)
    linear = student.get_submodule("6")
    torch_prune.l1_unstructured(linear, "weight", 0.5)
    with pytest.raises(FileError, match=r'"6.weight".*fxprune.prune.remove'):
        fxprune.save(student, path)
    torch_prune.remove(linear, "weight")
    student.add_module("6", nn.Sequential(linear))
    with pytest.raises(FileError, match=r'module "6".*Sequential'):
        fxprune.save(student, path)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = transform(mlp(), MOST, (torch.randn(5, 40),))
    with pytest.raises(FileError, match=r"it is a folder"):
        fxprune.save(result, tmp_path)
    with pytest.raises(FileError, match=r"there is no folder"):
        fxprune.save(result, tmp_path / "none" / "model.safetensors")
    path = fxprune.save(result, tmp_path / "model.safetensors")
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("fxprune.files.container.save_file", full)
    with pytest.raises(FileError, match=r"No space left"):
        fxprune.save(result, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_selection_for_another_model_is_refused(tmp_path: Path) -> None:
    x = torch.randn(5, 40)
    selection = through(transform(mlp(), MOST, (x,)).selection, tmp_path)
    other = nn.Sequential(nn.Linear(40, 66), nn.GELU(), nn.Linear(66, 33)).eval()
    with pytest.raises(FxPruneError, match=r'"0.weight"'):
        fxprune.transform(other, selection=selection, example_inputs=(x,), options=EAGER, progress=False)
