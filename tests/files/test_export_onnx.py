"""export to ONNX: onnxruntime computes what the result computes, zeros as dense weights, at any size that it takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune import FxPruneError, FxPruneWarning, Plan, Rule, Unstructured, errors
from fxprune.errors import InputError
from fxprune.files.export import export
from fxprune.kernels.native import status
from tests.files.export_models import CASES, QUICK, Case, mlp, shrunk, tagger


@pytest.fixture
def onnx() -> Any:
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnx")


def run(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The file in onnxruntime; inputs in the order of the call."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    fed = {put.name: value.numpy() for put, value in zip(session.get_inputs(), values, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, fed)]


def check(case: Case, result: Any, path: Path) -> None:
    for args, kwargs in case.calls:
        want = pytree.tree_leaves(result(*args, **kwargs))
        for a, b in zip(run(path, args, kwargs), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def axes(values: Any) -> dict[str, list[Any]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_computes_the_same(name: str, onnx: Any, tmp_path: Path) -> None:
    case = CASES[name]()
    result = case.result()
    check(case, result, export(result, tmp_path / "model.onnx", progress=False))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_names_are_the_models_own(onnx: Any, tmp_path: Path) -> None:
    path = export(tagger().result(), tmp_path / "model.onnx", progress=False)
    graph = onnx.load(path).graph
    assert axes(graph.input) == {"ids": ["batch", 9], "mask": ["batch", 9]}
    assert axes(graph.output) == {"logits": ["batch", 9, 7], "pooled": ["batch", 48]}


class Curved(nn.Module):
    """What torch answers for a GELU of one row is one row, whatever the size stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        # As multi-head attention lays out what it answers.
        x = x.transpose(0, 1)
        x = x.reshape(-1, 8).view(x.shape[0], -1, 8).transpose(0, 1)
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize("given", [False, True])
def test_a_batch_of_one_stays_dynamic_through_every_op(given: bool, onnx: Any, tmp_path: Path) -> None:
    model, x = Curved().eval(), torch.randn(1, 5, 8)
    result: Any = fxprune.transform(model, None, (x,), options=QUICK, progress=False)
    path = export(result, tmp_path / "model.onnx", example_inputs=(x,) if given else None, progress=False)
    sizes = axes(onnx.load(path).graph.value_info)
    assert sizes and all("batch" in size for size in sizes.values() if len(size) == 3), sizes
    for batch in (1, 3):
        y = torch.randn(batch, 5, 8)
        torch.testing.assert_close(run(path, (y,), {})[0], model(y), rtol=1e-5, atol=1e-5)


class Two(nn.Module):
    """Two sizes that vary, one argument that is fixed, and outputs in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x: Tensor, turn: bool, y: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, t, 8], y [m, 8] -> [n, t, 6] and [m, 6]."""
        return self.layer(x), -self.layer(y) if turn else self.layer(y)


def test_sizes_have_names_and_constants_are_none_of_its_inputs(onnx: Any, tmp_path: Path) -> None:
    auto = torch.export.Dim.AUTO
    call = (torch.randn(2, 3, 8), True, torch.randn(5, 8))
    shapes = ({0: auto, 1: auto}, None, {0: auto})
    plan = Plan([Rule("*.weight", Unstructured(0.5))])
    result: Any = fxprune.transform(Two().eval(), plan, call, dynamic_shapes=shapes, options=QUICK, progress=False)
    path = export(result, tmp_path / "model.onnx", progress=False)
    graph = onnx.load(path).graph
    assert axes(graph.input) == {"x": ["batch", "x_dim_1", 8], "y": ["y_dim_0", 8]}
    assert list(axes(graph.output)) == ["output_0", "output_1"]
    other = (torch.randn(4, 7, 8), True, torch.randn(3, 8))
    check(Case(result, plan, [(call, {}), (other, {})]), result, path)


@pytest.mark.skipif(not status().available, reason=status().detail)
@pytest.mark.parametrize(("name", "layout"), [("mlp", "nonzeros"), ("mlp", "bitmap"), ("cnn", "nonzeros")])
def test_packed_weights_are_stored_dense(
    name: str, layout: str, onnx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    case = CASES[name]()
    result = case.result(layout=layout)
    assert "fxprune." in str([n.target for n in result.graph.nodes])
    with pytest.warns(FxPruneWarning, match="ONNX has no packed weights"):
        path = export(result, tmp_path / "model.onnx", progress=False)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    check(case, result, path)
    assert "fxprune." in str([n.target for n in result.graph.nodes])


def test_a_result_that_trains_is_exported_in_eval_mode_only(onnx: Any, tmp_path: Path) -> None:
    case = shrunk()
    result = case.result(trainable=True)
    check(case, result, export(result, tmp_path / "model.onnx", progress=False))
    with pytest.raises(InputError, match="training mode"):
        export(result.train(), tmp_path / "model.onnx", progress=False)


class Counts(nn.Module):
    """A model that hands out a number beside a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        """x [n, 8] -> [n, 8] and 3."""
        return self.layer(x), 3


def test_an_output_that_is_no_tensor_is_refused(onnx: Any, tmp_path: Path) -> None:
    plan = Plan([Rule("*.weight", Unstructured(0.5))])
    result: Any = fxprune.transform(Counts().eval(), plan, (torch.randn(2, 8),), options=QUICK, progress=False)
    with pytest.raises(InputError, match="an output of the model is 3"):
        export(result, tmp_path / "model.onnx", progress=False)
    assert not list(tmp_path.iterdir())


def test_masks_as_bits_are_exported_as_what_they_compute(onnx: Any, tmp_path: Path) -> None:
    case = mlp()
    result = case.result(trainable=True, masked_matmul=True)
    check(case, result, export(result, tmp_path / "model.onnx", progress=False))


def test_without_onnx_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = mlp().result()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "onnx" in name else find(name, *a))
    with pytest.raises(FxPruneError, match=r"onnx and onnxscript are not installed.*pip install fxprune\[onnx\]"):
        export(result, tmp_path / "model.onnx", progress=False)
    assert not list(tmp_path.iterdir())
