"""tasks: what a plan asks of each weight and group, before any of them is fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from fxprune.calibration.solvers import SOLVERS
from fxprune.calibration.solvers.problem import Goal
from fxprune.calibration.solvers.units import Units
from fxprune.capture.capture import Capture
from fxprune.couple.coupling import Coupling, Group
from fxprune.graph.note import Note
from fxprune.graph.program import Program, names_of_parameters
from fxprune.graph.weights import Use, uses
from fxprune.plan.matrix import from_matrix, to_matrix
from fxprune.plan.patterns import Blocks, Channels, SemiStructured, Unstructured
from fxprune.plan.plan import Plan, Rule
from fxprune.plan.scores import Scores
from fxprune.select.candidates import candidates
from fxprune.select.decide import choose_selection
from fxprune.select.mask import PackedMask
from fxprune.select.project import score_tiles
from fxprune.select.selection import Selection
from fxprune.select.units import keep_channels

from .batches import Batch
from .fit import Task
from .layer import Layer, find_layers
from .measure_inputs import Watched, measure_inputs
from .padding import Padding
from .unfold import windows_of_use
from .unit_readers import Readers, find_readers, read_one_way, unit_energy

# Scores that a method replaces by its own; any other was asked for, and decides the mask.
_DEFAULT = ("l1", "l2", "norm")


@dataclasses.dataclass
class Asked:
    """What is to be done.

    start   the selection by amounts: masks and kept units that a solver may still change
    layers   the weights to fit in turn, by name, and `tasks` what is asked of each
    early   group -> units that stay, for groups that are decided before anything is fitted
    shared  weights to fit beforehand, on the dense inputs of all their uses
    without weights that are masked or lose inputs and cannot be fitted, and why
    notes   what was met in the plan and could not be used
    """

    start: Selection
    layers: dict[str, Layer]
    tasks: dict[str, Task]
    early: dict[str, Tensor]
    shared: dict[str, Watched]
    without: dict[str, str]
    notes: list[Note]

    def tensors(self) -> dict[str, Tensor]:
        """What stays before anything is fitted, by words that are no names of parameters."""
        masks = {f"mask of {name}": mask.bits for name, mask in self.start.mask.items()}
        return {**masks, **{f"units of {name}": kept for name, kept in self.start.keep.items()}}

    def words(self) -> list[str]:
        """What is asked of each weight, in words."""
        return [f"{name} {task.goal} {task.units and task.units.group}" for name, task in self.tasks.items()]


def read_plan(
    captured: Capture,
    program: Program,
    plan: Plan,
    coupling: Coupling | None,
    method: str,
    batches: Sequence[Batch],
    paddings: Mapping[str, Padding],
) -> Asked:
    """What `plan` asks of a program. `paddings` says how padding lies in inputs.

    Runs the dense model once over the data where amounts are pooled over several weights, where groups of channels
    leave, and for weights that are read at several places. Raises PlanError and InputError as `transform` does.
    """
    decision = choose_selection(captured, program, plan, None, coupling)
    start, notes = decision.selection, decision.notes
    existing = choose_selection(captured, program, Plan([])).selection.mask
    rules, places = _Rules(program, plan, coupling), uses(program)
    groups = [group.name for group in coupling or () if group.name in start.asked]
    readers = find_readers(program, coupling, groups, places) if coupling is not None else {}
    shared: dict[str, Watched] = {}
    if method != "magnitude":
        touched = dict.fromkeys([*start.mask, *(n for found in readers.values() for n in found)])
        read = [n for n in touched if n in places and read_one_way(program, n, places[n])]
        several = [n for n in read if len(places[n]) > 1]
        pooled = [n for n in read if n in start.mask and rules.is_pooled(n)]
        watched = {n: places[n] for n in (*several, *pooled, *(n for found in readers.values() for n in found))}
        seen = measure_inputs(program, watched, set(several), batches, paddings) if watched else {}
        start = _pool_anew(captured, program, plan, coupling, start, rules, seen, places)
        if coupling is not None:
            notes += _rank_units(program, plan, coupling, start, rules, readers, seen, places)
        shared = {name: seen[name] for name in several}
    layers, without = find_layers(program, [*start.mask, *_members(coupling, start)], captured.existing)
    # Where the others can make up for units that leave, these are chosen when it comes to the weight that reads them.
    chooses = method in SOLVERS and SOLVERS[method].refits
    late = _late(coupling, start, rules, readers, layers) if chooses else {}
    decided_late = {units.group for units in late.values()}
    early = {name: kept for name, kept in start.keep.items() if name not in decided_late}
    cuts = coupling.kept(early) if coupling is not None else {}
    shared = {name: found for name, found in shared.items() if name in start.mask or name in cuts}
    tasks = {}
    for name in (*layers, *shared):
        inputs, goal, settled, note = places[name][0].inputs, None, start.mask.get(name), ""
        zeros = 0 if settled is None else settled.numel() - settled.kept()
        staying = dict(cuts.get(name, ())).get(inputs)
        if settled is not None and method != "magnitude":
            goal = rules.goal(name, settled, inputs)
            if goal is not None and _crosses(goal.pattern, program, name, places[name][0]):
                goal, note = None, "its tiles reach from one group into the next, so they were chosen by magnitude"
            settled = settled if goal is None else existing.get(name)
        keep = None if settled is None else settled.unpack()
        tasks[name] = Task(name, inputs, goal, keep, zeros, staying, late.get(name), note)
    lose = {n for n in without if n in places and places[n][0].inputs in dict(cuts.get(n, ()))}
    without = {n: why for n, why in without.items() if n not in shared and (n in start.mask or n in lose)}
    return Asked(start, layers, tasks, early, shared, without, notes)


class _Rules:
    """Which rule each weight got."""

    def __init__(self, program: Program, plan: Plan, coupling: Coupling | None) -> None:
        names = names_of_parameters(program)
        aliases = {other: first for other, first in names.items() if other != first}
        self.binding = plan.bind(candidates(program, coupling), aliases)
        self._rules = plan.rules

    def of(self, name: str) -> Rule | None:
        """The rule that a weight got."""
        index = self.binding.assigned.get(name)
        return None if index is None else self._rules[index]

    def is_pooled(self, name: str) -> bool:
        """Whether a weight shares its amount with others, and leaves the scores to the method."""
        rule = self.of(name)
        return rule is not None and rule.scope == "global" and _by_default(rule)

    def goal(self, name: str, mask: PackedMask, inputs: int) -> Goal | None:
        """What a solver is to reach, as much as `mask` takes; None where the mask itself was asked for."""
        rule = self.of(name)
        if rule is None or not _by_default(rule):
            return None
        if isinstance(rule.sparsity, Unstructured):
            # Of what is zero already one row may have more than its share, which says nothing of the others.
            count = rule.sparsity.count(mask.numel()) if rule.sparsity.per_row else mask.numel() - mask.kept()
            return Goal(rule.sparsity, count)
        if isinstance(rule.sparsity, Blocks):
            return Goal(rule.sparsity, _tiles_gone(mask, rule.sparsity, inputs))
        return Goal(rule.sparsity) if isinstance(rule.sparsity, SemiStructured) else None

    def is_free(self, group: Group) -> bool:
        """Whether the units of a group were asked for by the default score, so that a method may choose others."""
        asking = self._asking(group)
        return bool(asking) and all(_by_default(rule) for rule in asking)

    def shares_units(self, group: Group) -> bool:
        """Whether a group shares its amount with others."""
        return any(rule.scope != "local" for rule in self._asking(group))

    def _asking(self, group: Group) -> list[Rule]:
        found = [rule for member in group.members if (rule := self.of(member.name)) is not None]
        return [rule for rule in found if isinstance(rule.sparsity, Channels)]


def _by_default(rule: Rule) -> bool:
    score = getattr(rule.sparsity, "score", None)
    return isinstance(score, str) and score in _DEFAULT


def _tiles_gone(mask: PackedMask, how: Blocks, inputs: int) -> int:
    """How many tiles of a weight its mask takes whole."""
    matrix = to_matrix(mask.unpack(), inputs).float().unsqueeze(0)
    return int((score_tiles(matrix, how) == 0).sum())


def _crosses(pattern: object, program: Program, name: str, use: Use) -> bool:
    """Whether tiles of a grouped convolution's weight lie in several groups, which are solved apart."""
    windows = windows_of_use(program, name, use) if use.kind == "conv" else None
    if windows is None or not isinstance(pattern, Blocks):
        return False
    return program.get_parameter(name).shape[0] // windows.groups % pattern.shape[0] != 0


def _members(coupling: Coupling | None, start: Selection) -> list[str]:
    """The weights that lose units."""
    if coupling is None:
        return []
    return list(dict.fromkeys(member.name for name in start.keep for member in coupling[name].members))


def _pool_anew(
    captured: Capture,
    program: Program,
    plan: Plan,
    coupling: Coupling | None,
    start: Selection,
    rules: _Rules,
    seen: Mapping[str, Watched],
    places: Mapping[str, Sequence[Use]],
) -> Selection:
    """The selection with amounts pooled by what each element gives to its output, as a share of this output."""
    if not any(rules.is_pooled(name) for name in start.mask):
        return start
    values = {}
    for name in start.mask:
        if rules.is_pooled(name):
            weight = program.get_parameter(name).detach()
            energy = weight.double().square()
            if name in seen and seen[name].count:
                inputs = places[name][0].inputs
                matrix = to_matrix(energy, inputs)
                norms = seen[name].norms.square().to(matrix.device)
                by_group = matrix.reshape(norms.shape[0], -1, matrix.shape[1]) * norms.unsqueeze(1)
                energy = from_matrix(by_group.reshape(matrix.shape), weight.shape, inputs)
            whole = float(energy.sum())
            values[name] = energy / whole if whole > 0 else energy
    scores = Scores(values, method="shares of the outputs")
    pooled = [
        dataclasses.replace(rule, sparsity=dataclasses.replace(rule.sparsity, score=scores))
        if rule.scope == "global" and _by_default(rule) and not isinstance(rule.sparsity, Channels)
        else rule
        for rule in plan.rules
    ]
    anew = choose_selection(captured, program, Plan([*pooled, *plan.drops], plan.exclude), None, coupling)
    return dataclasses.replace(start, mask=anew.selection.mask)


def _rank_units(
    program: Program,
    plan: Plan,
    coupling: Coupling,
    start: Selection,
    rules: _Rules,
    readers: Readers,
    seen: Mapping[str, Watched],
    places: Mapping[str, Sequence[Use]],
) -> list[Note]:
    """Puts into `start` the units that give most to what reads them, where the plan leaves the score open.

    Answers with notes on groups that keep the plan's score. Where one of a pool does, all pooled groups do, for the two
    scores do not compare.
    """
    weights = {name: parameter.detach() for name, parameter in program.named_parameters()}
    dims = {name: places[name][0].inputs for found in readers.values() for name in found}
    free = [name for name in readers if rules.is_free(coupling[name])]
    energies = {name: unit_energy(readers[name], weights, seen, dims) for name in free}
    given = {n: e for n, e in energies.items() if e is not None and len(e) == coupling[n].size}
    lacking = [name for name in free if name not in given]
    pooled = [name for name in free if rules.shares_units(coupling[name])]
    notes = []
    if lacking:
        why = "no linear or convolution sums over them, or none received any input"
        notes.append(Note(f"the units of {', '.join(lacking)} were chosen by their norm: {why}", "fallback"))
    if set(lacking) & set(pooled):
        given = {name: energy for name, energy in given.items() if name not in pooled}
        shared = "the units of all groups that share an amount were chosen by their norm, for some must be"
        notes.append(Note(shared, "fallback"))
    start.keep = keep_channels(coupling, weights, plan, rules.binding, given).keep
    return notes


def _late(
    coupling: Coupling | None, start: Selection, rules: _Rules, readers: Readers, layers: Mapping[str, Layer]
) -> dict[str, Units]:
    """Weight -> the group to decide when it is fitted: one that it alone reads, and one for each weight."""
    late: dict[str, Units] = {}
    for name, kept in start.keep.items():
        assert coupling is not None
        group, found = coupling[name], readers.get(name, {})
        if len(found) != 1 or group.mixed or not rules.is_free(group):
            continue
        ((weight, index),) = found.items()
        counts = index[index >= 0].bincount(minlength=group.size)
        if weight in layers and weight not in late and bool((counts == counts[0]).all()):
            late[weight] = Units(name, index, len(kept))
    return late
