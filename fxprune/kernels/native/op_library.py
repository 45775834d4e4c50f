"""op_library: the CPU ops as libraries for a process that does not import fxprune, such as a C++ program."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from pathlib import Path

import torch

from fxprune.errors import BuildError

# Each of these registers its ops.
from . import SCHEMAS, attention, bitmap, build, net, tiles  # noqa: F401

SOURCE = build.HERE / "definitions" / "define.cpp"


def op_library(folder: Path) -> list[Path]:
    """Writes two libraries into `folder`: one that defines the ops, and the kernels that it finds beside itself.

    `torch.ops.load_library` of the first, or linking against it, is enough. Neither ends in `.so`: a package of
    AOTInductor takes a file that does for its model. Raises BuildError.
    """
    if platform.system() != "Linux":
        raise BuildError("cannot make a library of the ops", why=f"it is linked for Linux, not {platform.system()}")
    built = build.build()
    kernels = folder / build.soname(built)
    shutil.copyfile(built, kernels)
    texts = json.dumps([*SCHEMAS.values()])
    digest = hashlib.sha256(f"{kernels.name}\0{texts}".encode() + SOURCE.read_bytes()).hexdigest()[:24]
    definitions = folder / f"libfxprune-ops-{digest}.so.1"
    header = folder / "schemas.h"
    header.write_text(f"static const char* const schemas[] = {{{texts[1:-1]}}};\n", encoding="utf-8")
    try:
        build.require_success(_linking(build.compiler(), header, kernels, definitions))
    finally:
        header.unlink()
    return [definitions, kernels]


def _linking(command: list[str], header: Path, kernels: Path, target: Path) -> list[str]:
    torch_folder = Path(torch.__file__).parent
    return [
        *command, *build.flags(), f"-I{torch_folder / 'include'}", "-include", str(header), str(SOURCE),
        "-o", str(target), f"-Wl,-soname,{target.name}",
        # Nothing here calls the kernels: without a word they would not be loaded.
        f"-L{kernels.parent}", "-Wl,--no-as-needed", f"-l:{kernels.name}", "-Wl,-rpath,$ORIGIN",
        # Whoever imports fxprune later finds the ops defined, and they must stay so.
        "-Wl,-z,nodelete", f"-L{torch_folder / 'lib'}", "-ltorch_cpu",
    ]  # fmt: skip
