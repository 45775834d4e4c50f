"""The ops as libraries: they define what Python would, where nobody has, and change nothing where somebody has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxprune.errors import BuildError
from fxprune.kernels import native
from fxprune.kernels.native import build, op_library

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().detail)

# Loads a library, and says of every op what the dispatcher knows.
LOAD = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
"""
SAY = """
for name in sys.argv[2:]:
    op = getattr(torch.ops.fxprune, name).default
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"fxprune::{name}", "CPU")
    print(op._schema, [tag.name for tag in op.tags], has, sep="|")
"""
IMPORT = """
assert "fxprune" not in sys.modules
import fxprune
from fxprune.kernels import native
assert native.load().available, native.load()
"""
COPIES = """
from pathlib import Path
print(len({line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "nonzeros-" in line}))
"""
MULTIPLY = """
import warnings
warnings.simplefilter("error")
from fxprune.lower.layouts.nonzeros import Nonzeros
from fxprune.lower.layouts.site import Site
w = torch.randn(64, 64) * (torch.rand(64, 64) < 0.2)
layout, x = Nonzeros(), torch.randn(3, 64)
site = Site("w", "n", w, None, (3,), "")
torch.testing.assert_close(layout.call(x, layout.pack(site), None, ""), x @ w.T, rtol=1e-4, atol=1e-4)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ops")
    definitions, kernels = op_library.op_library(folder)
    assert sorted(folder.iterdir()) == sorted([definitions, kernels])
    return definitions


def lines(script: str, *arguments: str) -> list[str]:
    """What a process of its own prints; it must say nothing else."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


def expected() -> list[str]:
    return [
        f"{torch._C.parse_schema(f'fxprune::{schema}')}|['needs_fixed_stride_order']|{has_kernel(name)}"
        for name, schema in native.SCHEMAS.items()
    ]


def has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fxprune::{name}", "CPU")


def test_every_op_that_python_registers_is_in_it() -> None:
    assert {"net", "attention", "nonzeros_linear", "bitmap_linear_split", "tiles_linear"} <= native.SCHEMAS.keys()


def test_the_library_comes_first_and_fxprune_after_it(library: Path) -> None:
    script = LOAD + SAY + 'assert "fxprune" not in sys.modules\n' + IMPORT + MULTIPLY + COPIES
    *said, copies = lines(script, str(library), *native.SCHEMAS)
    assert said == expected()
    assert copies == "1"


def test_fxprune_comes_first_and_the_library_after_it(library: Path) -> None:
    script = "import sys\n" + IMPORT + LOAD + SAY + MULTIPLY + COPIES
    *said, copies = lines(script, str(library), *native.SCHEMAS)
    assert said == expected()
    assert copies == "1"


def test_two_libraries_in_one_process(library: Path, tmp_path: Path) -> None:
    """The second is a file of its own, as in a second package."""
    other = op_library.op_library(tmp_path)[0]
    script = LOAD + f"torch.ops.load_library({str(other)!r})\n" + SAY + COPIES
    *said, copies = lines(script, str(library), *native.SCHEMAS)
    assert said == expected()
    assert copies == "1"


def test_another_version_of_an_op_is_refused() -> None:
    script = """
import torch
library = torch.library.Library("fxprune", "FRAGMENT")
library.define("attention(Tensor query) -> Tensor")
try:
    import fxprune
except Exception as error:
    print(type(error).__name__, error)
"""
    (said,) = lines(script)
    assert said.startswith("BuildError cannot define the op fxprune::attention") and "attention(Tensor query)" in said


def test_a_compiler_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build.build()
    broken = tmp_path / "define.cpp"
    broken.write_text("int broken = ;")
    monkeypatch.setattr(build, "build", lambda: built)
    monkeypatch.setattr(op_library, "SOURCE", broken)
    with pytest.raises(BuildError, match="do not compile"):
        op_library.op_library(tmp_path)
