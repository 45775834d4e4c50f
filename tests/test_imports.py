"""Imports go down only: each part of fxprune may import what stands beneath it, and no other part.

A part is a module of fxprune (`plan`), a folder of it (`layouts`, all its files alike) or `triton_kernels`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fxprune"
KERNELS = "triton_kernels"

# part -> the parts directly beneath it; what those may import, it may import too.
BENEATH = {
    "cli": "demo",
    "demo": "demo_data transform",
    "demo_data": "errors",
    "backend": "transform from_dynamo",
    "from_dynamo": "capture",
    "prune": "plan threshold",
    "analyze": "admit check",
    "transform": "structure deliver pending trace calibration",
    "calibration": "decide",
    "structure": "decide prove",
    "deliver": "emit prove measure settings trainable",
    "decide": "admit channels report",
    "pending": "admit emit",
    "prove": "admit report",
    "settings": "layouts",
    "emit": "report",
    "trainable": "modes report graph_data masked_linear",
    "masked_linear": "kernels",
    "modes": "admit check align",
    "align": "regions",
    "regions": "",
    "graph_data": "",
    "report": "check passes",
    "check": "select weights removal",
    "measure": "timing compat errors",
    "trace": "capture",
    "admit": "plan weights couple",
    "passes": "layouts select weights removal",
    "layouts": "native kernels timing errors",
    "native": "errors",
    "channels": "coupling plan score",
    "removal": "coupling",
    "couple": "coupling weights",
    "alias": "",
    "coupling": "rules capture",
    "rules": "indices",
    "indices": "axis",
    "axis": "",
    "select": "plan project score threshold fits",
    "fits": "",
    "project": "patterns",
    "plan": "binding names",
    "binding": "patterns",
    "names": "",
    "patterns": "channel_pattern matrix",
    "channel_pattern": "pattern_values unit_score",
    "pattern_values": "score",
    "matrix": "",
    "gradient_score": "admit",
    "unit_score": "score",
    "score": "threshold errors",
    "threshold": "mask kernels",
    "weights": "capture",
    "capture": "alias entry existing constant_masks",
    "constant_masks": "alias",
    "entry": "compat errors",
    "existing": "errors",
    "mask": "",
    "kernels": "triton_kernels",
    "timing": "",
    "compat": "",
    "errors": "",
    "triton_kernels": "",
}
# The package's own __init__ lists the public names, so it stands above everything and nothing may import it.
TOP = "__init__"


def beneath(part: str) -> set[str]:
    """Return every part that `part` may import."""
    found: set[str] = set()
    waiting = BENEATH[part].split()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += BENEATH[name].split()
    return found


def part_of(module: str) -> str:
    """`fxprune.layouts.site` -> `layouts`, `fxprune` -> TOP."""
    _, _, rest = module.partition(".")
    return rest.split(".")[0] or TOP


def sources() -> dict[str, Path]:
    """Return module name -> file, for all of fxprune and triton_kernels."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / KERNELS, f"{PACKAGE}.{KERNELS}")):
        for path in sorted(folder.rglob("*.py")):
            names = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *names))] = path
    return found


SOURCES = sources()


def is_module(name: str) -> bool:
    return name in SOURCES or f"{name}.__init__" in SOURCES


def imported(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """Yield every module that a file imports, also inside functions and for types only, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # One dot is the file's own package, which is its name without the last part.
                package = module.split(".")[: -node.level]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if is_module(full) else base), node.lineno


def edges(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """Yield the parts of fxprune that a file imports, with the line."""
    for name, line in imported(module, path):
        top = name.split(".")[0]
        if top == PACKAGE:
            yield part_of(name), line
        elif top == KERNELS:
            yield KERNELS, line


def test_the_table_has_no_cycle() -> None:
    for part in BENEATH:
        assert part not in beneath(part), f"{part} stands beneath itself"


@pytest.mark.parametrize("module", [name for name in SOURCES if part_of(name) != TOP])
def test_imports_go_down(module: str) -> None:
    part = part_of(module)
    assert part in BENEATH, f"{part} is new: give it a row in BENEATH that says what it may import"
    allowed = beneath(part) | {part}
    wrong = [
        f"{SOURCES[module].relative_to(ROOT)}:{line} imports {target}"
        for target, line in edges(module, SOURCES[module])
        if target not in allowed
    ]
    assert not wrong, f"{part} may import {sorted(allowed)}: {wrong}"


def test_the_reader_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "import fxprune.plan\n"
        "from fxprune import errors, Plan\n"
        "from . import site\n"
        "from .. import compat\n"
        "from ..plan import Rule\n"
        "def f():\n    from fxprune.triton_kernels import x\n"
    )
    found = [part for part, _ in edges("fxprune.layouts.sample", path)]
    wanted = ["plan", "errors", TOP, "layouts", "compat", "plan", KERNELS]
    assert sorted(found) == sorted(wanted)


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", KERNELS} | sys.stdlib_module_names
    for module, path in SOURCES.items():
        if part_of(module) != KERNELS:
            continue
        for name, line in imported(module, path):
            inside = name.startswith(f"{PACKAGE}.{KERNELS}")
            assert inside or name.split(".")[0] in allowed, f"{path}:{line} imports {name}"


def test_only_capture_exports() -> None:
    """Others may name torch.export's types; one module calls it."""
    call = re.compile(r"torch\.export\.export\w*\(|from torch\.export import .*\bexport\b")
    calling = [name for name, path in SOURCES.items() if call.search(path.read_text(encoding="utf-8"))]
    assert calling == ["fxprune.capture"]
