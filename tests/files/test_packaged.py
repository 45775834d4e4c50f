"""A result saved with its compiled code answers without compiling; where the code is not for here, it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.errors import FileError
from fxprune.files import packaged
from fxprune.kernels.native import status
from tests.files.test_save import MOST, cnn, mlp, transform

pytestmark = pytest.mark.skipif(not status().available, reason="a package needs a C++ compiler")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    result = fxprune.transform(
        mlp(), MOST, (torch.randn(5, 40),), options={"measure": False, "layout": "nonzeros"}, progress=False
    )
    path = tmp_path_factory.mktemp("files") / "model.safetensors"
    return fxprune.save(result, path, compiled=True, progress=False), result


def compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it compiles")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", refuse)


def test_a_loaded_package_answers_without_compiling(saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path, result = saved
    wanted = {size: result(x) for size in (5, 1, 33) for x in [torch.ones(size, 40)]}
    compiles_nothing(monkeypatch)
    loaded = fxprune.load(path, compiled=True, progress=False)
    for size, y in wanted.items():
        torch.testing.assert_close(loaded(torch.ones(size, 40)), y, rtol=1e-6, atol=1e-6)
    with pytest.raises(fxprune.FxPruneError, match="captured for"):
        loaded(torch.ones(5, 41))
    assert "runs the package" in str(loaded.report)
    with pytest.raises(AssertionError, match="it compiles"):
        fxprune.load(path, progress=False)(torch.ones(5, 40))


def test_weights_that_are_loaded_into_it_are_used(saved: tuple[Path, Any]) -> None:
    path, result = saved
    loaded = fxprune.load(path, compiled=True, progress=False)
    state = {name: torch.zeros_like(value) if "bias" in name else value for name, value in result.state_dict().items()}
    loaded.load_state_dict(state)
    assert (loaded(torch.ones(5, 40)) - result(torch.ones(5, 40))).abs().max() > 1e-3


@pytest.mark.parametrize("what", ["gone", "changed", "another processor", "none saved"])
def test_code_that_is_not_for_here_is_not_run(
    what: str, saved: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, result = saved
    here = tmp_path / "model.safetensors"
    here.write_bytes(path.read_bytes())
    packaged.package_of(here).write_bytes(packaged.package_of(path).read_bytes() + b"1" * (what == "changed"))
    if what == "gone":
        packaged.package_of(here).unlink()
    if what == "another processor":
        monkeypatch.setattr(packaged.build, "cpu", lambda: "another")
    if what == "none saved":
        fxprune.save(result, here)
    loaded = fxprune.load(here, compiled=True, progress=False)
    (note,) = [note for note in loaded.report.notes if note.startswith("it compiles at its first call")]
    assert {"gone": "there is no", "changed": "not what was saved", "none saved": "saved without"}.get(
        what, what
    ) in note
    x = torch.ones(5, 40)
    assert torch.equal(loaded.forward(x), result.forward(x))


def test_a_result_that_trains_has_no_compiled_code(tmp_path: Path) -> None:
    student = transform(cnn(), None, (torch.randn(2, 3, 9, 9),), trainable=True)
    with pytest.raises(FileError, match="one that trains is not compiled"):
        fxprune.save(student, tmp_path / "model.safetensors", compiled=True)
    assert not list(tmp_path.iterdir())
