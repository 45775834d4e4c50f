"""report: what happened to every weight and why, how exact the result is, and how fast."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections import Counter
from collections.abc import Collection, Mapping

from tabulate import tabulate

from fxprune.check.compare import CheckRow
from fxprune.couple.coupling import Coupling
from fxprune.couple.removal import Cuts, removal
from fxprune.graph.note import Note
from fxprune.graph.program import Program
from fxprune.lower.layouts.site import Choice
from fxprune.lower.lower import Lowered
from fxprune.measure.model_timing import ModelTiming
from fxprune.select.selection import Fit, Recovery, Selection
from fxprune.shrink.dead.dead import ROUTES, Dead

from .runtimes import Runtimes, runtimes_of


@dataclasses.dataclass
class WeightReport:
    """One weight: its sparsity as asked and reached, and what it was lowered to."""

    name: str
    shape: tuple[int, ...]
    asked: float | None
    reached: float
    lowered: Lowered

    @property
    def layout(self) -> str:
        """Name of the layout taken."""
        return self.lowered.choice.layout

    @property
    def refused(self) -> dict[str, str]:
        """Layouts refused, with the reason."""
        return self.lowered.choice.refused


@dataclasses.dataclass
class GroupReport:
    """One group of coupled axes: its size, how many indices stay, and why it could not lose any."""

    name: str
    size: int
    kept: int
    members: int
    asked: float | None
    reason: str


@dataclasses.dataclass
class Report:
    """Everything transform did, for people (`print(report)`) and for programs (the fields)."""

    model: str
    weights: list[WeightReport] = dataclasses.field(default_factory=list)
    checks: list[CheckRow] = dataclasses.field(default_factory=list)
    timing: ModelTiming | None = None
    notes: list[Note] = dataclasses.field(default_factory=list)
    kernels: str = ""
    compiled: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    groups: list[GroupReport] = dataclasses.field(default_factory=list)
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    removed: dict[str, Cuts] = dataclasses.field(default_factory=dict)
    dead: Dead | None = None
    parameters: tuple[int, int] | None = None
    fits: dict[str, Fit] = dataclasses.field(default_factory=dict)
    recovery: Recovery | None = None
    pending: bool = False

    def tell_groups(
        self, program: Program, coupling: Coupling, selection: Selection, literals: Collection[str]
    ) -> None:
        """What became of each group, and which slices of which tensors were removed as zeros, whatever they held.

        `literals` are tensors that are not the model's own. Slices that were dead are no zeros: a constant stands in.
        """
        staying = selection.staying
        self.groups = [
            GroupReport(
                group.name,
                group.size,
                len(staying.get(group.name, ())) or group.size,
                len(group.members),
                selection.asked.get(group.name),
                group.frozen or group.mixed,
            )
            for group in coupling
        ]
        leaving = removal(coupling, selection.keep)
        tensors = {**dict(program.named_parameters(remove_duplicate=False)), **dict(program.named_buffers())}
        names = [name for name in leaving.kept if name in tensors and name not in literals]
        self.removed = {name: leaving.removed(name, tensors[name]) for name in names}

    def __getitem__(self, name: str) -> WeightReport:
        """The entry of one weight by name. Raises KeyError, with the names that are near."""
        found = {w.name: w for w in self.weights}
        if name not in found:
            close = difflib.get_close_matches(str(name), found, 3)
            near = f"Near it: {', '.join(close)}." if close else "See report.weights for the names."
            raise KeyError(f"no weight of this report is called {name!r}. {near}")
        return found[name]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the reported weights before."""
        return sum(w.lowered.dense_bytes for w in self.weights)

    @property
    def bytes(self) -> int:
        """Bytes of the reported weights in their layouts."""
        return sum(w.lowered.bytes for w in self.weights)

    @property
    def runtimes(self) -> Runtimes:
        """Which runtimes load a result of this form, whether it is faster there, and why not; prints as a table."""
        smaller = any(group.kept < group.size for group in self.groups) or bool(self.dropped)
        return runtimes_of(shrunk=smaller, layouts={weight.layout for weight in self.weights})

    def __str__(self) -> str:
        if self.pending:
            return f"{self.model}: pending; the first call transforms it for that call's inputs"
        parts = [self._summary()]
        if self.weights:
            parts.append(_weights_table(self.weights))
        if self.groups:
            parts.append(_groups_table(self.groups))
        if self.dead is not None and self.dead.slices:
            parts.append(_dead_table(self.dead))
        if noted := [(name, fit.method, fit.note) for name, fit in self.fits.items() if fit.note]:
            parts.append(tabulate(noted, headers=("weight", "fitted by", "note"), disable_numparse=True))
        if self.checks:
            parts.append(_checks_table(self.checks))
        if self.notes:
            parts.append("Notes\n" + "\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts)

    def _summary(self) -> str:
        packed = sum(w.layout != "dense" for w in self.weights)
        told = [f"{len(self.weights)} pruned weights: {packed} packed, {len(self.weights) - packed} dense"]
        if self.groups:
            smaller = sum(group.kept < group.size for group in self.groups)
            told = [f"{smaller} of {len(self.groups)} groups smaller", *(told if self.weights else [])]
        if self.dropped:
            told.append(f"{len(self.dropped)} blocks dropped")
        lines = [f"{self.model}: " + "; ".join(told)]
        if self.parameters is not None:
            before, after = self.parameters
            lines.append(f"parameters: {before:,} before, {after:,} after: {1 - after / max(before, 1):.1%} removed")
        if self.dead is not None and self.dead.routes:
            lines.append(_dead_line(self.dead))
        if self.fits:
            lines.append(_fits_line(self.fits))
        if self.recovery is not None:
            lines.append(f"trained: {self.recovery}")
        if self.weights:
            lines.append(f"weights: {_megabytes(self.dense_bytes)} dense, {_megabytes(self.bytes)} as stored")
        if self.timing is not None:
            lines.append(f"model:   {self.timing}")
            lines += _half_line(self.timing)
        lines += [f"kernels: {self.kernels}", f"emitted: {self.compiled}"]
        if self.seconds:
            spent = ", ".join(f"{stage} {s:.1f} s" for stage, s in self.seconds.items() if s >= 0.05)
            lines.append(f"took:    {spent or 'under 0.1 s'}")
        return "\n".join(lines)


def _half_line(timing: ModelTiming) -> list[str]:
    """What the dense model takes in bfloat16, for a machine that has units for it."""
    half = timing.half
    if half is None:
        return []
    ratio = timing.pruned / half.seconds
    faster = f"{ratio:.2f}x as fast as this" if ratio > 1 else f"this is {1 / ratio:.2f}x as fast"
    off = f"its outputs are off by {half.error:.0e}"
    return [f"         in bfloat16 the dense model takes {1e3 * half.seconds:.3g} ms ({faster}); {off}"]


def weight_reports(selection: Selection, lowered: list[Lowered]) -> list[WeightReport]:
    """One entry for each weight that was looked at, in the model's order."""
    return [
        WeightReport(
            w.name,
            tuple(selection.mask[w.name].shape),
            selection.asked.get(w.name),
            selection.reached(w.name),
            w,
        )
        for w in lowered
    ]


def _weights_table(weights: list[WeightReport]) -> str:
    # What refuses every weight alike, such as a layout for another device, is said once.
    shared = set.intersection(*(set(w.lowered.choice.refused.items()) for w in weights)) if len(weights) > 1 else set()
    rows = []
    for w in weights:
        choice = w.lowered.choice
        # The first size alone; of the layouts that were tried, the one taken or else the fastest.
        times = {t.layout: t for t in choice.timings if t.tokens == choice.timings[0].tokens}
        dense = times.pop("dense", None)
        taken = times.get(choice.layout) or min(times.values(), key=lambda t: t.measured, default=None)
        why = _refusals({name: why for name, why in choice.refused.items() if (name, why) not in shared}) or choice.why
        rows.append(
            (
                w.name,
                "x".join(map(str, w.shape)),
                "-" if w.asked is None else f"{w.asked:.1%}",
                f"{w.reached:.1%}",
                choice.layout,
                f"{1e3 * dense.measured:.3f}" if dense else "-",
                f"{1e3 * taken.measured:.3f}" if taken else "-",
                f"{1e3 * taken.predicted:.3f}" if taken else "-",
                why + _timed(choice) + _growth(w.lowered),
            )
        )
    headers = ("weight", "shape", "asked", "zeros", "layout", "dense ms", "sparse ms", "predicted", "why")
    table = tabulate(rows, headers=headers, disable_numparse=True)
    return f"{table}\nall of these: {_refusals(dict(sorted(shared)))}" if shared else table


def _timed(choice: Choice) -> str:
    """What to tell of figures that are another weight's, or that were hard to take."""
    alike = " (timed on a weight alike)" if choice.reused else ""
    return alike if choice.steady else f"{alike} (timed while others wanted the cores, or samples disagreed)"


def _growth(lowered: Lowered) -> str:
    """What to tell of a weight that takes more bytes than it took."""
    ratio = lowered.bytes / max(1, lowered.dense_bytes)
    return f"; it takes {ratio:.2f}x the bytes of the dense weight" if ratio > 1 else ""


def _refusals(refused: Mapping[str, str]) -> str:
    """Which layouts could not be taken, those with one reason together."""
    reasons: dict[str, list[str]] = {}
    for name, why in refused.items():
        reasons.setdefault(why, []).append(name)
    return "; ".join(f"no {', '.join(names)}: {why}" for why, names in reasons.items())


def _groups_table(groups: list[GroupReport]) -> str:
    """Groups that a rule bound or that lost dead indices; where rules bound any, the others are counted by reason."""
    shown = [g for g in groups if g.asked is not None or g.kept < g.size]
    rows = [
        (g.name, g.size, g.kept, "-" if g.asked is None else f"{g.asked:.1%}", f"{1 - g.kept / g.size:.1%}", g.members)
        for g in shown
    ]
    headers = ("group", "size", "kept", "asked", "removed", "members")
    reasons = Counter(g.reason.split(" (")[0].split(' "')[0] for g in groups if g.reason)
    rest = "".join(f"\n{count} groups keep all: {reason}" for reason, count in reasons.most_common())
    return tabulate(rows, headers=headers, disable_numparse=True) + (rest if any(g.asked for g in groups) else "")


def _fits_line(fits: Mapping[str, Fit]) -> str:
    """How well calibration fitted the weights: the error of their outputs as a share of the outputs' spread."""
    methods = ", ".join(f"{count} by {method}" for method, count in Counter(f.method for f in fits.values()).items())
    errors = sorted(math.sqrt(fit.error) for fit in fits.values() if fit.error == fit.error)
    rows = max(fit.rows for fit in fits.values())
    spread = f"; outputs off by {errors[len(errors) // 2]:.0%} (median), {errors[-1]:.0%} (most)" if errors else ""
    return f"fitted:  {methods}, on up to {rows:,} rows{spread}"


def _dead_line(dead: Dead) -> str:
    """How many dead indices left by which route."""
    routes = ", ".join(f"{dead.routes[route]} {route}" for route in ROUTES if dead.routes[route])
    maps = f"; the maps hold {dead.map_elements:,} numbers" if dead.map_elements else ""
    return f"dead:    {sum(dead.routes.values())} channels left without a trace: {routes}{maps}"


def _dead_table(dead: Dead) -> str:
    """What became of the slices that masks left without anything."""
    rows = [(s.name, s.dim, s.zero, s.left, s.why if s.left < s.zero else "") for s in dead.slices]
    return tabulate(rows, headers=("weight", "dim", "zero slices", "left", "why the rest stay"), disable_numparse=True)


def _checks_table(checks: list[CheckRow]) -> str:
    rows = [(c.what, c.call, f"{c.error:.1e}", f"{c.tolerance:.0e}", c.verdict) for c in checks]
    headers = ("check", "on", "max relative error", "allowed", "")
    return tabulate(rows, headers=headers, disable_numparse=True)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
