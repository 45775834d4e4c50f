"""export to torch.export's format: what is loaded computes what the result computes, at any size that it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import fxprune
from fxprune import Plan, Rule, Unstructured
from fxprune.files.export import export
from fxprune.kernels.native import bitmap, status, tiles  # noqa: F401
from tests.files.export_models import CASES, QUICK, cnn, mlp, shrunk, tagger

LAYOUTS = ["nonzeros", "bitmap", *(["tiles"] if tiles.isa() else [])]
needs_kernels = pytest.mark.skipif(not status().available, reason=status().detail)


def same(got: Any, want: Any) -> None:
    (a, spec), (b, other) = pytree.tree_flatten(got), pytree.tree_flatten(want)
    assert spec == other
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def loaded(path: Path) -> Any:
    return torch.export.load(path).module()


def ops(module: Any) -> set[str]:
    return {str(n.target).split(".")[1] for n in module.graph.nodes if str(n.target).startswith("fxprune.")}


@pytest.mark.parametrize("name", CASES)
def test_what_is_loaded_equals_the_result(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    result = case.result()
    path = export(result, tmp_path / "model.pt2", progress=False)
    module = loaded(path)
    for args, kwargs in case.calls:
        same(module(*args, **kwargs), result(*args, **kwargs))


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_weights_stay_packed(layout: str, tmp_path: Path) -> None:
    case = mlp()
    dtype = torch.bfloat16 if layout == "tiles" else torch.float32
    calls = [((args[0].to(dtype),), {}) for args, _ in case.calls]
    result = case._replace(model=case.model.to(dtype), calls=calls).result(layout=layout)
    module = loaded(export(result, tmp_path / "model.pt2", progress=False))
    assert any(op.startswith(layout) for op in ops(module)), ops(module)
    for args, kwargs in calls:
        same(module(*args, **kwargs), result(*args, **kwargs))


@needs_kernels
def test_a_net_stays_one_call(tmp_path: Path) -> None:
    case = cnn()
    result = case.result(layout="nonzeros")
    assert "net" in ops(result)
    module = loaded(export(result, tmp_path / "model.pt2", progress=False))
    assert ops(module) == ops(result)
    for args, kwargs in case.calls:
        same(module(*args, **kwargs), result(*args, **kwargs))


@needs_kernels
def test_another_process_runs_it_once_fxprune_is_imported(tmp_path: Path) -> None:
    case = mlp()
    result = case.result(layout="nonzeros")
    path = export(result, tmp_path / "model.pt2", progress=False)
    (x,), _ = case.calls[2]
    torch.save((x, result(x)), tmp_path / "call.pt")
    script = (
        "import sys, torch, fxprune; x, want = torch.load(sys.argv[2]);"
        "got = torch.export.load(sys.argv[1]).module()(x); torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)"
    )
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "call.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


class Reads(torch.nn.Module):
    """A model that is one thing for short inputs and another for long ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, t, 16] -> the same."""
        return self.layer(x) if x.shape[1] > 4 else self.layer(x) * 2


def test_it_refuses_what_the_result_refuses(tmp_path: Path) -> None:
    x = torch.randn(3, 6, 16)
    auto = torch.export.Dim.AUTO
    plan = Plan([Rule("*.weight", Unstructured(0.5))])
    shapes = ({0: auto, 1: auto},)
    result: Any = fxprune.transform(Reads().eval(), plan, (x,), dynamic_shapes=shapes, options=QUICK, progress=False)
    module = loaded(export(result, tmp_path / "model.pt2", progress=False))
    same(module(torch.ones(2, 9, 16)), result(torch.ones(2, 9, 16)))
    for wrong in (torch.ones(2, 3, 16), torch.ones(2, 9, 15), torch.ones(2, 9, 16, dtype=torch.float64)):
        with pytest.raises(fxprune.FxPruneError):
            result(wrong)
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            module(wrong)


@pytest.mark.parametrize("training", [False, True])
def test_a_result_that_trains_is_exported_in_its_mode(training: bool, tmp_path: Path) -> None:
    case = shrunk()
    result = case.result(trainable=True)
    result.train(training)
    module = loaded(export(result, tmp_path / "model.pt2", progress=False))
    args, _ = case.calls[2]
    assert result.training is training
    same(module(*args), result(*args))


def test_the_result_is_left_as_it_was(tmp_path: Path) -> None:
    case = shrunk()
    result = case.result(trainable=True).train()
    before = {name: value.clone() for name, value in result.state_dict().items()}
    export(result, tmp_path / "model.pt2", progress=False)
    assert result.training and all(p.requires_grad for p in result.parameters())
    for name, value in result.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_users_own_call_is_taken(tmp_path: Path) -> None:
    case = tagger()
    result = case.result()
    args, kwargs = case.calls[2]
    module = loaded(export(result, tmp_path / "m.pt2", example_inputs=args, kwargs=kwargs, progress=False))
    args, kwargs = case.calls[1]
    same(module(*args, **kwargs), result(*args, **kwargs))


def test_bert(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    ids, mask = torch.randint(50, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    plan = Plan([Rule("encoder.*.weight", Unstructured(0.6))])
    kwargs = {"input_ids": ids, "attention_mask": mask}
    result: Any = fxprune.transform(model, plan, kwargs=kwargs, options=QUICK, progress=False)
    module = loaded(export(result, tmp_path / "bert.pt2", progress=False))
    ids = torch.randint(50, (3, 12))
    mask = (torch.arange(12) < torch.tensor([[12], [5], [1]])).long()
    got, want = module(input_ids=ids, attention_mask=mask), result(input_ids=ids, attention_mask=mask)
    assert type(got) is type(want)
    same(dict(got), dict(want))


def test_a_batch_of_one_is_taken_where_the_result_takes_it(tmp_path: Path) -> None:
    """torch.export fixes such a batch's strides by a condition, which the result was found right without."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    quick = {"compile": False, "measure": False}
    result = fxprune.transform(layer, None, [(x,), (torch.randn(2, 7, 16),)], options=quick, progress=False)
    path = fxprune.export(result, tmp_path / "model.pt2", progress=False)
    program = torch.export.load(path).module()
    for shape in ((1, 5, 16), (3, 1, 16), (1, 1, 16), (2, 9, 16)):
        given = torch.randn(shape)
        torch.testing.assert_close(program(given), result(given), rtol=1e-5, atol=1e-5)
