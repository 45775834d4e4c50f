"""What is installed is what stands in the repository, and it also works uninstalled from a checkout."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fxprune

ROOT = Path(__file__).resolve().parent.parent
# An editable install answers imports through a finder of its own; without it, only the checkout can.
UNINSTALLED = (
    "import sys;"
    "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')];"
    "sys.path.insert(0, sys.argv[1]);"
    "import fxprune.triton_kernels as k, fxprune;"
    "print(k.__file__); print(fxprune.__file__)"
)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and newer read TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def source_folders() -> dict[str, str]:
    """Return dotted package -> folder, for every folder that holds Python files to install."""
    found = {}
    for top, prefix in (("fxprune", "fxprune"), ("triton_kernels", "fxprune.triton_kernels")):
        for folder in {path.parent for path in (ROOT / top).rglob("*.py")}:
            inner = folder.relative_to(ROOT / top).parts
            found[".".join((prefix, *inner))] = "/".join((top, *inner))
    return found


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    setuptools = project["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(source_folders())
    assert setuptools["package-dir"] == {"fxprune.triton_kernels": "triton_kernels"}


def test_every_package_has_an_init() -> None:
    folders = source_folders().values()
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").exists()] == []


def test_data_files_are_listed(project: dict[str, Any]) -> None:
    data = project["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data["fxprune"] and (ROOT / "fxprune" / "py.typed").exists()
    native = ROOT / "fxprune" / "kernels" / "native"
    listed = {path for pattern in data["fxprune.kernels.native"] for path in native.glob(pattern)}
    others = {path for path in native.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert listed == others


def test_public_names_exist() -> None:
    assert [name for name in fxprune.__all__ if not hasattr(fxprune, name)] == []
    assert len(set(fxprune.__all__)) == len(fxprune.__all__)


def test_entry_points_exist(project: dict[str, Any]) -> None:
    table = project["project"]
    for target in (*table["scripts"].values(), *table["entry-points"]["torch_dynamo_backends"].values()):
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_kernels_import_from_the_package() -> None:
    module = importlib.import_module("fxprune.triton_kernels")
    assert module.__file__ is not None
    assert Path(module.__file__).name == "__init__.py"


def test_kernels_import_uninstalled(tmp_path: Path) -> None:
    command = [sys.executable, "-c", UNINSTALLED, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels, package = done.stdout.split()
    assert Path(kernels) == ROOT / "triton_kernels" / "__init__.py"
    assert Path(package) == ROOT / "fxprune" / "__init__.py"


def test_the_torch_pin_is_in_the_supported_range(project: dict[str, Any]) -> None:
    def version(requirements: Sequence[str], prefix: str) -> tuple[int, ...]:
        text = next(line.removeprefix(prefix) for line in requirements if line.startswith(prefix))
        return tuple(int(part) for part in text.split("."))

    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert version(pins, "torch==") >= version(project["project"]["dependencies"], "torch>=")
