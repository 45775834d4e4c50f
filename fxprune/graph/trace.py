"""trace: with FXPRUNE_TRACE=dir, every stage writes the program as it left it, and what it changed."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import torch

from .program import Program


class Trace:
    """Writes `00_capture.txt`, `01_fold.txt`, ... into a directory; does nothing without one."""

    def __init__(self, directory: str | None = None) -> None:
        chosen = directory if directory is not None else os.environ.get("FXPRUNE_TRACE")
        self._directory = Path(chosen) if chosen else None
        self._last: list[str] = []
        self._count = 0

    def write(self, stage: str, program: Program, notes: list[str] | None = None) -> None:
        """Writes the program after `stage`, the lines that changed since the stage before, and `notes` with reasons."""
        if self._directory is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        text = [f"{n.format_node() or n.name}{_shape(n)}" for n in program.graph.nodes]
        change = (
            list(difflib.unified_diff(self._last, text, "before", "after", lineterm="", n=1)) if self._count else []
        )
        parts = [f"# {stage}", *(f"# {note}" for note in notes or []), "", *text]
        if change:
            parts += ["", "# change", *change]
        (self._directory / f"{self._count:02d}_{stage}.txt").write_text("\n".join(parts) + "\n")
        self._last, self._count = text, self._count + 1


def _shape(node: object) -> str:
    value = getattr(node, "meta", {}).get("val")
    return f"   # {value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
