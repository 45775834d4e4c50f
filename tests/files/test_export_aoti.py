"""export as a package of AOTInductor: it runs where fxprune is never imported, in Python and in C++, at any size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from fxprune.files.export import export
from fxprune.kernels.native import status, tiles
from tests.files.export_models import Case, cnn, mlp, shrunk, tagger

pytestmark = pytest.mark.skipif(not status().available, reason=status().detail)
COMPILER = shutil.which("g++")

# Runs each call of a file in a process without fxprune, then imports it and runs them again.
PYTHON = """
import sys
import torch
from torch.utils import _pytree as pytree
package, calls = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
calls = torch.load(calls)
def run():
    for args, kwargs, want in calls:
        got = pytree.tree_leaves(model(*args, **kwargs))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
run()
again = torch._inductor.aoti_load_package(package)
del again
assert "fxprune" not in sys.modules
import fxprune
from fxprune.kernels import native
assert native.load().available
run()
copies = {line.split()[-1] for line in open("/proc/self/maps") if "nonzeros" in line}
assert len(copies) <= 1, copies
del model
run_python = torch.ops.fxprune.nonzeros_linear.default
print("right", run_python._schema.name)
"""

# Reads inputs and expected outputs, by name, from a file of torch.jit's pickle.
RUNNER = r"""
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>
#include <fstream>
#include <iostream>

int main(int, char** arguments) {
  std::ifstream file(arguments[2], std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  auto calls = torch::pickle_load(bytes).toGenericDict();
  torch::inductor::AOTIModelPackageLoader loader(arguments[1]);
  auto got = loader.run({calls.at("x").toTensor()});
  if (got.size() != 1 || !torch::allclose(got[0], calls.at("y").toTensor(), 1e-5, 1e-5)) return 1;
  std::cout << "right" << std::endl;
}
"""


def packed(layout: str) -> Callable[[], tuple[Case, Any]]:
    def made() -> tuple[Case, Any]:
        case = mlp()
        dtype = torch.bfloat16 if layout == "tiles" else torch.float32
        case = case._replace(model=case.model.to(dtype), calls=[((a[0].to(dtype),), k) for a, k in case.calls])
        return case, case.result(layout=layout)

    return made


def check(case: Case, result: Any, path: Path) -> None:
    """Runs the package in a process of its own on the calls of a case."""
    calls = [(args, kwargs, pytree.tree_leaves(result(*args, **kwargs))) for args, kwargs in case.calls]
    torch.save(calls, path.with_suffix(".calls"))
    command = [sys.executable, "-c", PYTHON, str(path), str(path.with_suffix(".calls"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 and "right" in done.stdout, done.stderr
    assert "Warning" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, Path]:
    case, result = packed("nonzeros")()
    path = export(result, tmp_path_factory.mktemp("aoti") / "mlp.pt2", format="aoti", progress=False)
    return case, result, path


def test_a_packed_model_runs_without_fxprune(package: tuple[Case, Any, Path]) -> None:
    check(*package)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no g++")
def test_a_packed_model_runs_in_cpp(package: tuple[Case, Any, Path], tmp_path: Path) -> None:
    case, result, path = package
    source, program = tmp_path / "runner.cpp", tmp_path / "runner"
    source.write_text(RUNNER)
    folder = Path(torch.__file__).parent
    include = [f"-I{folder / 'include'}", f"-I{folder / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    library = [f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    command = [str(COMPILER), "-O0", "-std=c++20", *include, "-o", str(program), str(source), *library, "-ltorch"]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert built.returncode == 0, built.stderr
    for args, _ in case.calls:
        call = tmp_path / "call.pt"
        torch.save({"x": args[0], "y": result(args[0])}, call, _use_new_zipfile_serialization=True)
        # torch::pickle_load reads the pickle within the archive.
        done = subprocess.run(
            [str(program), str(path), str(call)], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0 and "right" in done.stdout, done.stderr


OTHERS: dict[str, Callable[[], tuple[Case, Any]]] = {
    "bitmap": packed("bitmap"),
    "tiles": packed("tiles"),
    "a net": lambda: (cnn(), cnn().result(layout="nonzeros")),
    "frozen": lambda: (shrunk(), shrunk().result(compile=True)),
    "a dict, by name": lambda: (tagger(), tagger().result()),
    "trains": lambda: (shrunk(), shrunk().result(trainable=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_results_run_without_fxprune(name: str, tmp_path: Path) -> None:
    if name == "tiles" and not tiles.isa():
        pytest.skip("no AVX-512")
    case, result = OTHERS[name]()
    check(case, result, export(result, tmp_path / "model.pt2", format="aoti", progress=False))
    assert os.listdir(tmp_path).count("model.pt2") == 1
