"""trace: with FXPRUNE_TRACE=dir, every stage writes the program as it left it, and what it changed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch

from .environment import variable
from .program import Program


class Trace:
    """Writes `00_capture.txt`, `01_couple.txt`, ... into a directory; does nothing without one."""

    def __init__(self, directory: str | None = None) -> None:
        chosen = directory if directory is not None else variable("FXPRUNE_TRACE")
        self._directory = Path(chosen) if chosen else None
        self._last: list[str] | None = None
        self._count = 0

    def write(self, stage: str, program: Program | None, told: Sequence[str] = ()) -> None:
        """Writes what a stage told, the program after it, and the lines in which that differs from the one before."""
        if self._directory is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        text = [] if program is None else [f"{n.format_node() or n.name}{_shape(n)}" for n in program.graph.nodes]
        before = text if self._last is None else self._last
        change = list(difflib.unified_diff(before, text, "before", "after", lineterm="", n=1))
        lines = [line for each in told for line in each.splitlines()]
        parts = [f"# {stage}", *(f"# {line}" for line in lines), "", *text]
        if change:
            parts += ["", "# change", *change]
        (self._directory / f"{self._count:02d}_{stage}.txt").write_text("\n".join(parts) + "\n")
        self._last, self._count = None if program is None else text, self._count + 1


def _shape(node: object) -> str:
    value = getattr(node, "meta", {}).get("val")
    return f"   # {value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
