"""A mutant: a fault of one line, and the test that sees it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault: `old` stands exactly once in `file`, and `new` takes its place. `test` must fail then."""

    file: str
    old: str
    new: str
    breaks: str
    test: str

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.file}: {self.breaks}"
