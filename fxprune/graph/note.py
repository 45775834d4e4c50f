"""note: a sentence that a stage has for the user, and how much it matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Level = Literal["info", "missed", "fallback", "warning"]


class Note(str):
    """A sentence of the report.

    level  "info"      what was found or done
           "missed"    a gain that was not to be had: something stays as large or as slow as it was
           "fallback"  a way that is slower, or right for fewer calls, was taken
           "warning"   something was not checked, or is not as it looks
    """

    level: Level

    def __new__(cls, text: str, level: Level = "info") -> Note:
        note = super().__new__(cls, text)
        note.level = level
        return note


def some(names: Sequence[str]) -> str:
    """The first three names, and dots for the others."""
    return ", ".join([*names[:3], *["..."] * (len(names) > 3)])
