"""export_aoti: an ExportedProgram -> a package of AOTInductor that brings the ops it calls with itself."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fxprune.check.compare import CheckRow
from fxprune.errors import BuildError, FxPruneError
from fxprune.graph import compat
from fxprune.graph.environment import words_of
from fxprune.kernels import native
from fxprune.kernels.native.op_library import op_library

# Options that a package has no use for: a package is called from a thread that may have no CUDA graphs.
_NOT_HERE = ("freezing", "triton.cudagraphs")


def write_package(
    program: ExportedProgram,
    path: Path,
    options: Mapping[str, Any],
    check: Callable[[Callable[..., Any]], Sequence[CheckRow]],
) -> None:
    """Compiles a program into the package `path`, frozen where Inductor then computes the same.

    `check` holds a loaded package against the result. Raises FxPruneError where none is right, and BuildError where an
    op of fxprune has no compiled kernel here.
    """
    ops = sorted({str(n.target) for n in program.graph.nodes if str(n.target).startswith("fxprune.")})
    _require_kernels(ops)
    own = {key: value for key, value in options.items() if key not in _NOT_HERE}
    why, cause = "", None
    with tempfile.TemporaryDirectory() as folder:
        libraries = op_library(Path(folder)) if ops else []
        for freezing in (True, False) if options.get("freezing") else (False,):
            # Whatever a compiler raises; unfrozen is tried next.
            try:
                _compile(program, path, {**own, "freezing": freezing}, libraries)
                rows = check(torch._inductor.aoti_load_package(str(path), run_single_threaded=True))
            except Exception as error:
                why, cause = f"torch says {words_of(error)}", error
                continue
            wrong = next((row for row in rows if not row.ok), None)
            if wrong is None:
                return
            why, cause = f"on the {wrong.call} the compiled code is off by {wrong.off}", None
    raise FxPruneError(
        "cannot export the result as a package of AOTInductor",
        why=why,
        do='Export it as format="pt2", or transform the model with options={"freezing": False} or another layout.',
    ) from cause


def _require_kernels(ops: Sequence[str]) -> None:
    """Raises BuildError for an op that is Python's alone in this process."""
    native.load()
    for op in ops:
        name = op.split(".")[1]
        known = name in native.SCHEMAS
        if not known or not torch._C._dispatch_has_kernel_for_dispatch_key(f"fxprune::{name}", "CPU"):
            raise BuildError(
                "cannot export the result as a package of AOTInductor",
                where=f"fxprune::{name}",
                why="this op has no compiled kernel here" + ("" if known else ", only one in Python"),
                do='Export it as format="pt2", or transform the model with options={"layout": "dense"} and without '
                "masked_matmul.",
            )


def _compile(program: ExportedProgram, path: Path, options: dict[str, Any], libraries: Sequence[Path]) -> None:
    from torch._inductor.package.package import package_aoti

    assert program.example_inputs is not None  # torch.export keeps them
    args, kwargs = program.example_inputs
    with tempfile.TemporaryDirectory() as folder, compat.alone(), compat.quiet_export(), torch.no_grad():
        # What it writes would stay in Inductor's cache, weights and all.
        settings = {**options, "aot_inductor.package": True, "aot_inductor.output_path": folder}
        if libraries:
            settings["aot_inductor.custom_op_libs"] = [_linked(libraries[0])]
        module = program.module(check_guards=False)
        files: Any = torch._inductor.aot_compile(module, args, kwargs, options=settings)
        package_aoti(str(path), [*files, *map(str, libraries)])


def _linked(library: Path) -> str:
    """A library as Inductor takes it, behind its `-l`, with flags that make the code find it in its own folder.

    Inductor has no options for these. The code calls ops by name, so that without a word the linker would leave the
    library out.
    """
    folder = shlex.quote(str(library.parent))
    flags = f"-L{folder} -Wl,-rpath,'$ORIGIN' -Wl,--push-state,--no-as-needed -l:{library.name} -Wl,--pop-state"
    return f"torch_cpu {flags}"
