"""Names of parameters and modules: which ones a pattern matches, and which come near one that matches none."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher
from fnmatch import fnmatchcase


def is_glob(pattern: str) -> bool:
    """Whether a pattern is a wildcard (`*`, `?`, `[...]`), and no name written out in full."""
    return any(mark in pattern for mark in "*?[")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means this name: case counts, and `*` crosses dots."""
    return fnmatchcase(name, pattern) if is_glob(pattern) else name == pattern


def near(pattern: str, names: Iterable[str], limit: int = 5) -> list[str]:
    """The names nearest to a pattern, best first: those holding most of its letters in order, in any case."""
    wanted = "".join(letter for letter in pattern.lower() if letter not in "*?[]")
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(wanted)
    ranked = []
    for name in names:
        matcher.set_seq1(name.lower())
        shared = sum(block.size for block in matcher.get_matching_blocks())
        ranked.append((shared / max(len(wanted), 1), matcher.ratio(), name))
    ranked.sort(key=lambda entry: (-round(entry[0], 2), -entry[1]))
    return [name for held, _, name in ranked[:limit] if held >= 0.7]
