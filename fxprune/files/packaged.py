"""packaged: a package of compiled code beside a saved result, so that a loaded one has nothing to compile.

The file itself holds no code. The package is code, made for this processor and this torch, and runs only where the
reader asks for it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxprune.capture.entry import EntryCheck
from fxprune.emit.pruned import PrunedModule, Result
from fxprune.errors import FileError, FxPruneError
from fxprune.graph import compat
from fxprune.graph.environment import words_of
from fxprune.graph.note import Note
from fxprune.kernels.native import build

from .export import export


def package_of(path: str | os.PathLike[str]) -> Path:
    """Where the package of the result at `path` lies."""
    return Path(path).with_suffix(".aoti.pt2")


def write_package(result: Result, path: str | os.PathLike[str], progress: bool) -> dict[str, str]:
    """Compiles the package of a result; returns what it takes to run it, and its checksum. Raises FxPruneError."""
    if not isinstance(result, PrunedModule):
        raise FileError(
            "cannot compile the result",
            why="one that trains is not compiled",
            do="Leave out compiled=True, and torch.compile what you load.",
        )
    package = export(result, package_of(path), format="aoti", progress=progress)
    return {**_here(), "sha256": _sum(package)}


def run_package(result: PrunedModule, path: str | os.PathLike[str], made: dict[str, str] | None) -> None:
    """Makes a loaded result run its package; where that cannot be, its report says that it will compile, and why."""
    run, why = None, "it was saved without compiled=True"
    if made is not None:
        run, why = _loaded(result, package_of(path), made)
    if run is None:
        note = Note(f"it compiles at its first call: {why}", "fallback")
        result.meta["report"].notes.append(note)
        return
    vars(result)["_run"] = run
    result.meta["report"].notes.append(Note("it runs the package of compiled code that was saved beside it"))


def _loaded(result: PrunedModule, package: Path, made: dict[str, str]) -> tuple[Callable[..., Any] | None, str]:
    """What runs a package, or why it is not run."""
    if not package.is_file():
        return None, f'there is no "{package.name}" beside the file'
    if other := [name for name, value in _here().items() if made.get(name) != value]:
        return None, f"its package was made for another {' and another '.join(other)}"
    if _sum(package) != made.get("sha256"):
        return None, f'"{package.name}" is not what was saved with it'
    try:
        with compat.quiet_export():
            call = torch._inductor.aoti_load_package(str(package))
    # Whatever torch makes of a package that it does not like.
    except Exception as error:
        return None, f"torch says {words_of(error)}"
    entry: EntryCheck = result.meta["entry"]

    def run(*args: Any, **kwargs: Any) -> Any:
        entry.check(args, kwargs)
        args, kwargs = entry.bound(args, kwargs)
        return call(*args, **kwargs)

    return run, ""


def _here() -> dict[str, str]:
    """What compiled code is for."""
    return {"processor": hashlib.sha256(build.cpu().encode()).hexdigest()[:16], "torch": torch.__version__}


def _sum(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise FxPruneError(f'cannot read "{file}"', why=error.strerror or str(error)) from error
