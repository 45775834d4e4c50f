"""subnormal: the program without the subnormal numbers of its parameters, where it then computes the same."""

from __future__ import annotations

import dataclasses

from fxprune.check.compare import CheckRow
from fxprune.check.proof import Proof
from fxprune.graph.note import Note, some
from fxprune.graph.program import Program
from fxprune.select.selection import Selection
from fxprune.select.subnormal import flush_parameters


@dataclasses.dataclass(frozen=True)
class Flushed:
    """A program, with what is told of its subnormal numbers, and the check that it passed without them."""

    program: Program
    notes: tuple[Note, ...] = ()
    checks: tuple[CheckRow, ...] = ()


def flush_proved(program: Program, proof: Proof | None) -> Flushed:
    """The program with zeros in place of subnormal parameters, held against itself as it was.

    Where it differs they stay: a model may multiply them by something large. Where nothing is checked, only those leave
    that the other elements of a parameter hide.
    """
    flushed, counts = flush_parameters(program, hidden=proof is None)
    if not counts:
        return Flushed(program)
    those = f"{sum(counts.values())} subnormal values in {some(list(counts))}"
    row = proof and proof.expect(Selection(), program).shrunk(flushed, Selection(), "without subnormals = pruned model")
    if row is not None and not row.ok:
        return Flushed(program, (Note(f"{those} stay, and are slow: without them it differs by {row.off}", "missed"),))
    return Flushed(flushed, (Note(f"{those} were taken as zeros"),), () if row is None else (row,))
