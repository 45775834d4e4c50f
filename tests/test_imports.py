"""The plan of the house, read off the code: rooms import what the table puts directly beneath them, and nothing else.

A room is a file at the top of fxprune (`transform`), a folder there with all that is in it (`lower`), or
`triton_kernels`. The package's own `__init__` lists the public names, so it stands above all rooms.
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
TOP = "__init__"
MOST_NAMES = 22
MOST_FLOORS = 10

# room -> what it imports, from the highest floor down.
BENEATH = {
    "cli": "transform select measure plan errors",
    "files": "transform emit own_class shrink check lower select capture kernels measure graph errors",
    "backend": "emit lower select capture kernels graph errors",
    "transform": "calibration emit shrink check lower select capture couple kernels graph plan errors",
    "calibration": "shrink check select capture couple graph plan errors",
    "emit": "shrink check lower select capture couple kernels measure graph plan errors",
    "own_class": "shrink check select capture couple graph errors",
    "analyze": "check capture couple graph errors",
    "shrink": "check select couple graph plan errors",
    "check": "select capture couple graph errors",
    "lower": "select capture kernels measure graph errors",
    "prune": "select graph plan errors",
    "gradient_score": "capture graph plan errors",
    "select": "capture couple kernels graph plan errors",
    "capture": "graph errors",
    "couple": "graph errors",
    "kernels": "graph errors triton_kernels",
    "measure": "graph errors",
    "graph": "errors",
    "plan": "errors",
    "errors": "",
    "triton_kernels": "",
}


def room_of(module: str) -> str:
    """`fxprune.lower.layouts.site` -> `lower`, `fxprune` -> TOP."""
    _, _, rest = module.partition(".")
    return rest.split(".")[0] or TOP


def sources() -> dict[str, Path]:
    """Return module name -> file, for all of fxprune and triton_kernels."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / KERNELS, f"{PACKAGE}.{KERNELS}")):
        for path in sorted(folder.rglob("*.py")):
            names = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *(names[:-1] if names[-1] == TOP else names)))] = path
    return found


SOURCES = sources()


def imported(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """Yield every module that a file imports, also inside functions and for types only, with the line."""
    package = module.split(".") if path.name == f"{TOP}.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in SOURCES else base), node.lineno


def edges(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """Yield the modules of the project that a file imports, with the line."""
    for name, line in imported(module, path):
        top = name.split(".")[0]
        if top in (PACKAGE, KERNELS):
            yield (name if top == PACKAGE else f"{PACKAGE}.{name}"), line


def floors(beneath: dict[str, set[str]]) -> dict[str, int]:
    """Return the length of the longest chain of imports that begins at each name; raises on a circle."""
    found: dict[str, int] = {}

    def floor(name: str, chain: tuple[str, ...]) -> int:
        assert name not in chain, f"a circle: {' -> '.join((*chain[chain.index(name) :], name))}"
        if name not in found:
            found[name] = 1 + max((floor(other, (*chain, name)) for other in sorted(beneath[name])), default=0)
        return found[name]

    for name in beneath:
        floor(name, ())
    return found


def between_rooms() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {room_of(module): set() for module in SOURCES}
    for module, path in SOURCES.items():
        found[room_of(module)] |= {room_of(name) for name, _ in edges(module, path)} - {room_of(module)}
    return found


def test_few_names_stand_at_the_top() -> None:
    names = {p.stem for p in (ROOT / PACKAGE).iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert len(names) <= MOST_NAMES, sorted(names)


def test_rooms_stand_on_few_floors_and_in_no_circle() -> None:
    found = floors(between_rooms())
    assert max(found.values()) <= MOST_FLOORS, sorted(found.items(), key=lambda item: -item[1])


def test_files_stand_in_no_circle() -> None:
    """Also none inside a room. A package's `__init__` counts where its names are imported from it."""
    beneath: dict[str, set[str]] = {
        module: {name for name, _ in edges(module, path) if name in SOURCES and name != module}
        for module, path in SOURCES.items()
    }
    floors(beneath)


@pytest.mark.parametrize("module", [name for name in SOURCES if room_of(name) != TOP])
def test_rooms_import_what_is_beneath_them(module: str) -> None:
    room = room_of(module)
    assert room in BENEATH, f"{room} is new: give it a row in BENEATH that says what it imports"
    allowed = {room, *BENEATH[room].split()}
    wrong = [
        f"{SOURCES[module].relative_to(ROOT)}:{line} imports {name}"
        for name, line in edges(module, SOURCES[module])
        if room_of(name) not in allowed
    ]
    assert not wrong, f"{room} imports from {sorted(allowed)} only: {wrong}"


def test_the_table_says_nothing_that_is_not_so() -> None:
    found = between_rooms()
    del found[TOP]
    assert {room: set(names.split()) for room, names in BENEATH.items()} == found


def test_the_reader_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "import fxprune.plan.plan\n"
        "from fxprune import errors, Plan\n"
        "from . import dense\n"
        "from .. import fold\n"
        "from ...plan.plan import Rule\n"
        "def f():\n    from fxprune.triton_kernels import x\n"
    )
    found = [room_of(name) for name, _ in edges("fxprune.lower.layouts.sample", path)]
    assert sorted(found) == sorted(["plan", "errors", TOP, "lower", "lower", "plan", KERNELS])


def test_floors_are_counted_and_circles_found() -> None:
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 3, "b": 2, "c": 1}
    with pytest.raises(AssertionError, match="a -> b -> a"):
        floors({"a": {"b"}, "b": {"a"}})


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", KERNELS} | sys.stdlib_module_names
    for module, path in SOURCES.items():
        if room_of(module) != KERNELS:
            continue
        for name, line in imported(module, path):
            inside = name.startswith(f"{PACKAGE}.{KERNELS}")
            assert inside or name.split(".")[0] in allowed, f"{path}:{line} imports {name}"


def test_only_capture_exports() -> None:
    """Others may name torch.export's types; one module calls it."""
    call = re.compile(r"torch\.export\.export\w*\(|from torch\.export import .*\bexport\b")
    calling = [name for name, path in SOURCES.items() if call.search(path.read_text(encoding="utf-8"))]
    assert calling == ["fxprune.capture.capture"]
