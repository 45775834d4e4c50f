"""proof: everything that is made from a capture, held against the oracle on every call that a check uses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from fxprune.capture.capture import Capture
from fxprune.couple.removal import Removal
from fxprune.graph.ops import HALF
from fxprune.graph.program import Program
from fxprune.select.selection import Selection

from .calls import Call
from .compare import CheckRow, compare, outputs, refuse
from .oracle import Oracle
from .rounding import within_rounding

_RESULT = "result = pruned model"


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the oracle answers to the calls of a proof, and comparisons with it.

    outputs   the flat outputs of each call, in the precision of the model
    wide      the same in float32 where the model is in half precision and something shrinks: rounding hides nothing
    oracle    what answered them
    unpacked  what the result is made of, before weights were folded or packed, and what is left to apply to it
    allowed   the error that the user allowed by asking for another precision
    """

    proof: Proof
    oracle: Oracle
    outputs: list[list[Any]]
    wide: list[list[Any]]
    is_wide: bool = False
    unpacked: tuple[Program, Selection] | None = None
    allowed: float = 0.0

    def shrunk(self, program: Program, selection: Selection, what: str = "shrunk = zeroed") -> CheckRow:
        """A shrunk program with its masks, held against the oracle: the worst of all calls; half types in float32."""
        shrunk = Oracle(program, selection, wide=torch.float32 if self.is_wide else None)
        rows = [
            self._compared(what, call, expected, shrunk.outputs(call), shrunk)
            for call, expected in zip(self.proof.calls, self.wide, strict=True)
        ]
        # Each row has the tolerance of its own outputs: what is worst is the furthest beyond it.
        return max(rows, key=lambda row: (not row.ok, row.error / row.tolerance if row.tolerance else math.inf))

    def stage(self, name: str, program: Program, left: Selection) -> CheckRow:
        """The program after a stage on the example, with what of the selection is left to apply to it.

        Raises CheckError, which names the stage, where it departs.
        """
        got = Oracle(program, left).outputs(self.proof.example)
        row = compare(f"after {name} = pruned model", self.proof.example, self.outputs[0], got, asked=self.allowed)
        if not row.ok:
            raise refuse(row, f"The stage {name} is at fault: please report it with FXPRUNE_TRACE=<dir>.")
        return row

    def result(self, result: Any) -> list[CheckRow]:
        """The result, as it runs, on the calls of the example's sizes."""
        return self._rows(result, 0, len(self.proof.same_size))

    def at_other_sizes(self, result: Any) -> list[CheckRow]:
        """The result, as it runs, at other sizes: the compiled code, not only its graph."""
        return self._rows(result, len(self.proof.same_size), None)

    def _rows(self, result: Any, first: int, end: int | None) -> list[CheckRow]:
        calls = list(zip(self.proof.calls, self.outputs, strict=True))[first:end]
        return [self._compared(_RESULT, call, expected, outputs(result, call)) for call, expected in calls]

    def _compared(
        self, what: str, call: Call, expected: list[Any], got: list[Any], graph: Oracle | None = None
    ) -> CheckRow:
        """A comparison, which the model's own rounding judges where it fails; `graph` is then held in float64."""
        row = compare(what, call, expected, got, asked=self.allowed)
        if graph is None and self.unpacked is not None:
            graph = Oracle(*self.unpacked)
        if row.ok or graph is None:
            return row
        right, ours = self.oracle.in_float64(), graph.in_float64()
        return within_rounding(
            row,
            call,
            expected,
            got,
            lambda: right.outputs(call),
            lambda: ours.outputs(call),
            lambda seed: self.oracle.nudged(seed).outputs(call),
        )


@dataclasses.dataclass(frozen=True)
class Proof:
    """The calls that everything made from a capture is tried on: those of the example's sizes, and other sizes."""

    captured: Capture
    same_size: tuple[Call, ...]
    other_sizes: tuple[Call, ...] = ()

    @property
    def example(self) -> Call:
        """The user's own call."""
        return self.same_size[0]

    @property
    def calls(self) -> list[Call]:
        """All calls, those of other sizes last."""
        return [*self.same_size, *self.other_sizes]

    def expect(self, selection: Selection, program: Program | None = None, removal: Removal | None = None) -> Expected:
        """Runs the oracle, masking in-graph over the user's storage, and keeps its outputs.

        `program` is what the oracle runs where blocks were dropped: the captured one without them.
        """
        program = program or self.captured.program
        oracle = Oracle(program, selection, removal)
        found = [oracle.outputs(call) for call in self.calls]
        half = any(getattr(n.meta.get("val"), "dtype", None) in HALF for n in program.graph.nodes)
        if removal is None or not half:
            return Expected(self, oracle, found, found)
        wide = Oracle(program, selection, removal, wide=torch.float32)
        return Expected(self, oracle, found, [wide.outputs(call) for call in self.calls], True)
