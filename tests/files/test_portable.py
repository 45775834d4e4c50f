"""Weights in a library's own format are saved in the open one, and are put back where the library is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import FileError
from fxprune.files import portable
from fxprune.files.container import read, write
from fxprune.lower.layouts.cusparselt import CuSparseLt
from fxprune.lower.layouts.gpu import op
from tests.files.test_save import transform
from tests.lower.test_gpu_layouts import NAMES, layout_of, weight_for


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuSPARSELt stands here for any format: the weight, negated."""
    monkeypatch.setattr(CuSparseLt, "split", lambda self, weight: (-weight,))
    monkeypatch.setattr(CuSparseLt, "join", lambda self, tensors, shape: -tensors[0])


def packed(name: str) -> Any:
    """A result of one linear whose weight [32, 64] is in a layout of GPUs."""
    model = nn.Sequential(nn.Linear(64, 32)).half().eval()
    with torch.no_grad():
        model[0].weight.copy_(weight_for("semi24" if name == "cusparselt" else name, 32, 64))
    result = transform(model, None, (torch.randn(3, 64).half(),), layout="dense")
    weight = result.get_parameter("0.weight").detach().clone()
    node = next(node for node in result.graph.nodes if node.target is torch.ops.aten.linear.default)
    module = result.get_submodule("0")
    del module._parameters["weight"]
    layout = layout_of(name)
    module.add_module("weight", nn.Module())
    for key, value in zip(layout.tensors, layout.split(weight), strict=True):
        module.weight.register_buffer(key, value)
    with result.graph.inserting_before(node):
        reads = [result.graph.get_attr(f"0.weight.{key}") for key in layout.tensors]
        call = result.graph.call_function(op, (node.args[0], reads, node.args[2], name, [32, 64], ""))
    node.replace_all_uses_with(call)
    result.graph.erase_node(node)
    result.graph.eliminate_dead_code()
    result.recompile()
    return result


@pytest.mark.usefixtures("library")
def test_a_librarys_format_is_saved_in_the_open_one(tmp_path: Path) -> None:
    result = packed("cusparselt")
    x = torch.randn(3, 64).half()
    state = {name: value.clone() for name, value in result.state_dict().items()}
    open_one = portable.portable(result)
    assert {"0.weight.values", "0.weight.meta", "0.bias"} == set(open_one.state_dict())
    assert torch.equal(open_one(x), result(x))
    # The user's own stays as it was.
    assert all(torch.equal(value, state[name]) for name, value in result.state_dict().items())
    path = fxprune.save(result, tmp_path / "model.safetensors")
    loaded = fxprune.load(path, progress=False)
    # Here is no GPU, so that a layout of the machine's own has taken its place.
    torch.testing.assert_close(loaded(x), result(x), rtol=1e-2, atol=1e-2)
    assert torch.cuda.is_available() or "no kernel here" in str(loaded.report)


@pytest.mark.usefixtures("library")
def test_it_is_put_back() -> None:
    result = packed("cusparselt")
    x: Tensor = torch.randn(3, 64).half()
    wanted, compressed = result(x), result.get_buffer("0.weight.compressed").clone()
    nodes = [node for node in result.graph.nodes if node.target is op]
    portable._change(result, nodes, "semi24")
    assert "0.weight.meta" in result.state_dict() and torch.equal(result(x), wanted)
    portable.restore(result)  # Without a GPU nothing is done.
    assert "0.weight.meta" in result.state_dict()
    row = result.report.weights[0]
    row.lowered = dataclasses.replace(row.lowered, choice=dataclasses.replace(row.lowered.choice, layout="cusparselt"))
    portable.restore(result)
    assert torch.cuda.is_available() or "there is no cuSPARSELt here" in str(result.report)
    portable._change(result, nodes, "cusparselt")
    assert torch.equal(result.get_buffer("0.weight.compressed"), compressed) and torch.equal(result(x), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_of_gpus_are_saved_looked_at_and_loaded_without_one(name: str, tmp_path: Path) -> None:
    result, x = packed(name), torch.randn(3, 64).half()
    path = fxprune.save(result, tmp_path / "model.safetensors")
    loaded = fxprune.load(path, progress=False)
    torch.testing.assert_close(loaded(x), result(x), rtol=1e-2, atol=1e-2)
    document, tensors = read(path)
    key = "0.weight.meta" if name == "semi24" else "0.weight.bits" if name == "bitmap" else "0.weight.columns"
    tensors[key].view(-1)[0] = ~tensors[key].view(-1)[0]
    write(path, document, tensors)
    with pytest.raises(FileError, match="cannot use a packed weight"):
        fxprune.load(path, progress=False)
