"""Kernels compiled ahead of time: every one compiles without a GPU, and the committed table is of these sources."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import aot

ROOT = Path(__file__).resolve().parents[2]


ONE = "from benchmarks import aot; print(aot.table([aot.compiled(next(aot.builds()), aot.TARGETS[0])]))"


def compiled(arguments: Sequence[str]) -> set[tuple[str, ...]]:
    """The kernels and targets in the table that a process of its own, without the interpreter, prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {tuple(line.split()[:2]) for line in done.stdout.splitlines()}


def test_a_kernel_compiles() -> None:
    build = next(aot.builds())
    assert (f"{build.module}.{build.kernel}", f"sm_{aot.TARGETS[0]}") in compiled(["-c", ONE])


@pytest.mark.slow
def test_every_kernel_compiles_for_both_targets() -> None:
    kernels = {f"{build.module}.{build.kernel}" for build in aot.builds()}
    assert {(kernel, f"sm_{target}") for kernel in kernels for target in aot.TARGETS} <= compiled(
        ["-m", "benchmarks.aot", "--quick"]
    )


def test_no_kernel_is_left_out() -> None:
    """A kernel is a jitted function that writes; what others call is compiled with them."""
    found = set()
    for file in aot.KERNELS.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "jit" for d in node.decorator_list):
                if re.search(r"tl\.(store|atomic_\w+)\(", ast.unparse(node)):
                    found.add((file.stem, node.name))
    assert found == {(build.module, build.kernel) for build in aot.builds()}


def test_the_committed_table_is_of_these_sources() -> None:
    held = json.loads((aot.RESULTS / "aot.json").read_text())
    modules = {build.module for build in aot.builds()}
    assert held["sources"] == {module: aot.digest(module) for module in modules}, "run `make aot`"
    wanted = {(f"{b.module}.{b.kernel}", b.label, f"sm_{t}") for b in aot.builds() for t in aot.TARGETS}
    assert {(row["kernel"], row["build"], row["target"]) for row in held["rows"]} == wanted
