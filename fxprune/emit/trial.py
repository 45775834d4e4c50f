"""trial: forms of one program on their way to be emitted: compiled, held against the oracle, and raced.

A race is between two calls, each timed in a loop: forms of the result against each other, the winner against the user's
model as it runs best. Where that wins, more forms are tried: with the dead channels, not frozen, and eager.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils import _pytree as pytree

from fxprune.capture.capture import Capture
from fxprune.check.calls import Call
from fxprune.check.compare import CheckRow, largest_difference, refuse
from fxprune.check.proof import Expected
from fxprune.errors import warn_once
from fxprune.graph.environment import words_of
from fxprune.graph.note import Note
from fxprune.graph.program import Program, copy_program
from fxprune.lower.lower import Lowered
from fxprune.measure.device import device_of
from fxprune.measure.model_timing import Half, ModelTiming, time_against
from fxprune.measure.race import duel, fastest
from fxprune.measure.ways import has_half, in_bfloat16, ways_of

from .pruned import PrunedModule, emit, own_storage
from .settings import Settings

_GRAPHS = '; mode="reduce-overhead" runs it as a CUDA graph, without launches to wait for'


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to emit a program: the program, Inductor's options or None for eager, and what became of each weight."""

    name: str
    make: Callable[[], Program]
    options: dict[str, Any] | None
    lowered: list[Lowered]

    def others(self) -> list[Form]:
        """The same program not frozen, and not compiled."""
        if self.options is None:
            return []
        live = {key: value for key, value in self.options.items() if key != "freezing"}
        return [dataclasses.replace(self, options=each) for each in (live, None) if each != self.options]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A form that was compiled and found right, how it runs in words, and what it took to get there."""

    form: Form
    result: PrunedModule
    compiled: str
    notes: tuple[Note, ...] = ()
    checks: tuple[CheckRow, ...] = ()


class Trial:
    """Tries forms of a program. `notes` say what was dropped and what was slower."""

    def __init__(
        self,
        captured: Capture,
        example: Call,
        expected: Expected | None,
        settings: Settings,
        on_step: Callable[[str], None],
    ) -> None:
        self._captured, self._expected, self._settings = captured, expected, settings
        self._args, self._kwargs = example.copy()
        self._device = device_of(example.args, example.kwargs)
        self._theirs = {t.data_ptr() for t in (*captured.program.parameters(), *captured.program.buffers())}
        self._on_step = on_step
        self.notes: list[Note] = []

    def first_right(self, forms: Sequence[Form]) -> Candidate:
        """The first form that is right. Raises CheckError where none is."""
        for form in forms:
            found = self._right(self._compiled(form), is_last=form is forms[-1])
            if found is not None:
                return found
        raise AssertionError("unreachable: the last form is right or raises")

    def fastest_right(self, forms: Sequence[Form], fallbacks: Sequence[Form]) -> Candidate:
        """The fastest form of those that are right, else the first of `fallbacks`. Raises CheckError where none is."""
        left = list(forms)
        while left:
            best: Candidate | None = None
            for form in left:
                found = self._compiled(form)
                if best is None or self._is_faster(found, best):
                    best = found
            # A model takes long to compile for other sizes, so that only the winner is.
            right = self._right(best) if best is not None else None
            if right is not None:
                return right
            left = [form for form in left if best is not None and form is not best.form]
        return self.first_right(fallbacks)

    def against(self, user: Any, best: Candidate, more: Sequence[Form]) -> tuple[Candidate, ModelTiming]:
        """The best candidate against the user's model as that runs best; `more` are tried where that is faster."""
        modes = [self._settings.mode] if self._settings.mode not in (None, "default") else []
        ways = ways_of(user, self._args, self._kwargs, self._device, modes)
        if not self._settings.compile:
            ways = {name: make for name, make in ways.items() if name.startswith("eager")}
        champion = fastest(ways, self._device, lambda way: self._on_step(f"your model, {way}"))
        self.notes += [Note(f"your model did not run in {way}: {why}") for way, why in champion.failed.items()]
        timing = time_against(champion, self._call(best), self._device)
        tried = [best]
        for form in more:
            if timing.ratio >= 1.0:
                break
            other = self._compiled(form)
            right = self._right(other) if self._is_faster(other, best) else None
            if right is None:
                continue
            if form.name == "whole":
                slower = f"the smaller model measured slower than the whole one ({timing.ratio:.2f}x)"
                self.notes.append(Note(f"{slower}, so its dead channels stay", "missed"))
            best, timing = right, time_against(champion, self._call(right), self._device)
            tried.append(best)
        if len(tried) > 1:
            # Of several times the first that pleases would be a lucky one.
            timing = time_against(champion, self._call(best), self._device)
        if timing.ratio < 1.0:
            slower = f"the result is no faster than your model as it is ({timing.ratio:.2f}x of {timing.way})"
            self.notes.append(Note(slower, "missed"))
        return best, timing

    def half(self, user: Any, best: Candidate) -> Half | None:
        """The user's float32 model in bfloat16, where the device has units for it and the model runs so."""
        if not self._settings.compile or not has_half(user, self._device):
            return None
        self._on_step("your model, bfloat16")
        try:
            call = in_bfloat16(user, self._args, self._kwargs)
        # Whatever a model raises that does not take another precision.
        except Exception as error:
            self.notes.append(Note(f"your model did not run in bfloat16: {words_of(error)}"))
            return None
        got, want = pytree.tree_leaves(call()), pytree.tree_leaves(user(*self._args, **self._kwargs))
        samples, _ = duel(call, self._call(best), self._device)
        return Half(samples.typical, largest_difference(got, want) if len(got) == len(want) else math.inf)

    def _right(self, found: Candidate, *, is_last: bool = False) -> Candidate | None:
        """A candidate, with its checks, if its code is right at every size. Raises CheckError for the last there is."""
        expected = self._expected
        if expected is not None and found.form.name != "packed":
            # What is not packed is computed as the model has it.
            expected = dataclasses.replace(expected, allowed=0.0)
        for rows in (expected.result, expected.at_other_sizes) if expected is not None else ():
            checks = rows(found.result)
            wrong = next((row for row in checks if not row.ok), None)
            if wrong is not None and is_last:
                raise refuse(wrong, "Please report it with FXPRUNE_TRACE=<dir>.")
            if wrong is not None:
                why = f"the {found.form.name} result ({found.compiled}) was wrong on the {wrong.call} ({wrong.off})"
                self.notes.append(Note(f"{why} and was dropped", "warning"))
                return None
            found = dataclasses.replace(found, checks=(*found.checks, *checks))
        return found

    def _compiled(self, form: Form) -> Candidate:
        """The program emitted as the form says; where it does not compile so, not frozen, or eager at last."""
        self._on_step(f"{form.name}, {self._settings.words(form.options)}")
        program = form.make()
        own_storage(program, self._theirs)
        notes: list[Note] = []
        for each in (form, *form.others()):
            result = emit(copy_program(program), self._captured.entry, each.options)
            how = self._settings.words(each.options)
            if each.options is None:
                return Candidate(form, result, f"{how} (torch.compile failed)" if notes else how, tuple(notes))
            try:
                result(*self._args, **self._kwargs)
                return Candidate(form, result, how, tuple(notes))
            # Whatever a compiler raises; the graph has been run eager before.
            except Exception as error:
                failed = "torch.compile failed, so the graph is emitted eager"
                if "freezing" in each.options:
                    failed = "the graph does not compile frozen, so it is compiled without freezing"
                notes.append(Note(f"{failed}: {words_of(error)}", "fallback"))
                warn_once(str(notes[-1]))
        raise AssertionError("unreachable: the last form is eager")

    def _is_faster(self, new: Candidate, old: Candidate) -> bool:
        """Whether a candidate beats another; that the packed one is slower is told.

        On a busy machine, where either may seem faster, what the layouts were chosen for stands.
        """
        before, after = duel(self._call(old), self._call(new), self._device)
        if not after.beats(before):
            return False
        if old.form.name == "packed" != new.form.name:
            why = f"the whole model measured slower packed ({after.typical / before.typical:.2f}x)"
            launches = self._device is not None and self._settings.mode in (None, "default")
            self.notes.append(Note(f"{why}, so it was emitted dense{_GRAPHS if launches else ''}", "fallback"))
        return True

    def _call(self, found: Candidate) -> Callable[[], Any]:
        return functools.partial(found.result, *self._args, **self._kwargs)
