"""computed: the program with weights that forward computes from parameters, computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from fxprune.check.compare import CheckRow
from fxprune.check.proof import Proof
from fxprune.graph.computed import fold_weights
from fxprune.graph.note import Note, some
from fxprune.graph.program import Program
from fxprune.select.selection import Selection


@dataclasses.dataclass(frozen=True)
class Computed:
    """A program, the names of the weights that it computed, what is told of them, and the check that it passed."""

    program: Program
    names: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    checks: tuple[CheckRow, ...] = ()


def compute_proved(program: Program, kept: Collection[str], proof: Proof | None) -> Computed:
    """The program with parameters in place of the weights that it computes from them, held against itself as it was.

    A weight stays computed where one of `kept`, names of parameters, could then no longer be pruned by itself.
    """
    folded, names = fold_weights(program, kept)
    if not names:
        return Computed(program)
    those = f"weights that forward computes from parameters ({some(names)})"
    row = proof and proof.expect(Selection(), program).shrunk(folded, Selection(), "weights computed once = your model")
    if row is not None and not row.ok:
        told = f"{those} stay computed: once for all they differ by {row.off}"
        return Computed(program, notes=(Note(told, "missed"),))
    told = f"{those} were computed once: what is pruned is what they come to"
    return Computed(folded, tuple(names), (Note(told),), () if row is None else (row,))
