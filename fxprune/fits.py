"""fits: how calibration fitted one weight, and what training it afterwards brought."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fit:
    """What became of one weight in calibration.

    method  the solver, or "magnitude" where none could be used
    error   the squared difference of its outputs from what they should be, over their variance; NaN where unknown
    rows    how many rows of inputs (tokens, places of an image) it was fitted on
    note    what went otherwise than asked, in words
    """

    method: str
    error: float = float("nan")
    rows: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What `recover` did: steps taken, seconds spent, and the loss on data it did not train on, before and after.

    `note` is what went otherwise than asked, in words.
    """

    steps: int
    seconds: float
    before: float
    after: float
    note: str = ""

    def __str__(self) -> str:
        did = f"{self.steps} steps in {self.seconds:.0f} s, loss {self.before:.4g} before and {self.after:.4g} after"
        return f"{did}; {self.note}" if self.note else did
