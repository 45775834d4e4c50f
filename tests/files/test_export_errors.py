"""What cannot be exported is refused with what is wrong, and a file that was there stays as it was."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import FxPruneError, Plan, Rule, Unstructured
from fxprune.errors import BuildError, FileError, InputError
from fxprune.files import export as module_of_export
from fxprune.files.export import export
from fxprune.files.writing import written
from tests.files.export_models import QUICK, mlp

PLAN = Plan([Rule("*.weight", Unstructured(0.5))])


@pytest.fixture(scope="module")
def result() -> Any:
    return mlp().result(layout="dense")


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(
    ("name", "format", "says"),
    [
        ("model", None, "it has no suffix"),
        ("model.zip", None, "its suffix is '.zip'"),
        ("model.pt2", "atoi", "unknown format 'atoi'. Did you mean 'aoti'?"),
        ("model.pt2", "xml", "Known: pt2, onnx, aoti."),
        ("model.onnx", "pt2", "wants a name that ends in .pt2"),
        ("model.so", "aoti", "wants a name that ends in .pt2"),
        (os.path.join("none", "model.pt2"), None, "there is no folder"),
    ],
)
def test_names_and_formats(name: str, format: str | None, says: str, result: Any, tmp_path: Path) -> None:
    with pytest.raises((FileError, InputError)) as raised:
        export(result, tmp_path / name, format=format, progress=False)
    assert says in str(raised.value)
    assert not left(tmp_path)


def test_a_folder_is_no_file(result: Any, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").mkdir()
    with pytest.raises(FileError, match="it is a folder"):
        export(result, tmp_path / "model.pt2", progress=False)


def test_a_model_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot export a Linear"):
        export(nn.Linear(2, 2), tmp_path / "model.pt2")


def test_a_pending_result_is_refused(tmp_path: Path) -> None:
    shell = fxprune.transform(nn.Sequential(nn.Linear(4, 4)).eval(), PLAN, options=QUICK, progress=False)
    with pytest.raises(FxPruneError, match="cannot export this result yet"):
        export(shell, tmp_path / "model.pt2", progress=False)
    shell(torch.ones(2, 4))
    export(shell, tmp_path / "model.pt2", progress=False)
    assert left(tmp_path) == ["model.pt2"]


def test_a_call_that_the_result_refuses_is_refused(result: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="captured for"):
        export(result, tmp_path / "model.pt2", example_inputs=(torch.ones(2, 41),), progress=False)
    with pytest.raises(InputError, match="without argument"):
        export(result, tmp_path / "model.pt2", kwargs={}, progress=False)


class Scaled(nn.Module):
    """A model that takes a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, times: int) -> Tensor:
        """x [n, 8] -> x W^T times `times`."""
        return self.layer(x) * times


def test_a_number_that_may_change_is_refused(tmp_path: Path) -> None:
    auto = torch.export.Dim.AUTO
    call = (torch.randn(3, 8), 5)
    result: Any = fxprune.transform(
        Scaled().eval(), PLAN, call, dynamic_shapes=({0: auto}, auto), options=QUICK, progress=False
    )
    with pytest.raises(InputError, match="times: it is any int"):
        export(result, tmp_path / "model.pt2", progress=False)


def test_a_result_on_another_device_is_refused(tmp_path: Path) -> None:
    result = mlp().result(layout="dense").to("meta")
    with pytest.raises(InputError, match="its weights are on meta, and it was made for inputs on cpu"):
        export(result, tmp_path / "model.pt2", progress=False)


def test_an_op_without_a_compiled_kernel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.files import export_aoti

    result = mlp().result(layout="nonzeros")
    if "fxprune." not in str([n.target for n in result.graph.nodes]):
        pytest.skip("no C++ kernels")
    monkeypatch.setattr(export_aoti.native, "SCHEMAS", {})
    with pytest.raises(BuildError, match="has no compiled kernel here, only one in Python"):
        export(result, tmp_path / "model.pt2", format="aoti", progress=False)


def test_what_fails_leaves_the_old_file(result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pt2").write_text("old")

    def fail(program: Any, path: Path) -> None:
        Path(path).write_text("half")
        raise RuntimeError("disk")

    monkeypatch.setattr(module_of_export.torch.export, "save", fail)
    with pytest.raises(RuntimeError, match="disk"):
        export(result, tmp_path / "model.pt2", progress=False)
    assert left(tmp_path) == ["model.pt2"] and (tmp_path / "model.pt2").read_text() == "old"


def test_what_was_written_wrong_is_not_kept(result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pt2").write_text("old")
    load = torch.export.load

    def wrong(path: Any) -> Any:
        program = load(path)
        for value in program.state_dict.values():
            value.data.mul_(1.01)
        return program

    monkeypatch.setattr(module_of_export.torch.export, "load", wrong)
    with pytest.raises(fxprune.errors.CheckError, match="exported = graph"):
        export(result, tmp_path / "model.pt2", progress=False)
    assert left(tmp_path) == ["model.pt2"] and (tmp_path / "model.pt2").read_text() == "old"


def test_written_moves_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for text in ("one", "two"):
        with written(path) as temporary:
            assert temporary.name == "a.bin" and temporary != path
            temporary.write_text(text)
            temporary.with_name("a.bin.data").write_text(f"{text} beside")
        assert path.read_text() == text and (tmp_path / "a.bin.data").read_text() == f"{text} beside"
        assert left(tmp_path) == ["a.bin", "a.bin.data"]


def test_written_keeps_rights_and_follows_links(tmp_path: Path) -> None:
    path, link = tmp_path / "a.bin", tmp_path / "link.bin"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    with written(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_written_says_that_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"), written(tmp_path / "a.bin"):
        pass
    assert not left(tmp_path)
