"""channels: the structured half of select. Groups, scores and amounts -> the indices that each group keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .axis import Axis, atoms
from .coupling import Coupling, Group
from .errors import PlanError
from .indices import positions
from .patterns import Channels
from .plan import Binding, Plan
from .score import group_score


@dataclasses.dataclass
class Kept:
    """What a plan's Channels came to.

    keep   group -> indices that stay (int64, ascending), for groups that lose some
    asked  group -> fraction that its rule asked for, for every group that a rule bound
    notes  in words: what a rule's wildcard met and could not use, and pools that lose less than was asked
    """

    keep: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    asked: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


@torch.no_grad()
def keep_channels(coupling: Coupling, tensors: Mapping[str, Tensor], plan: Plan, binding: Binding) -> Kept:
    """Which indices every group keeps. `tensors` are the program's parameters by name; they are only read.

    Ties in the scores go to the lowest index first. Raises PlanError for coupled weights that are asked for unequal
    amounts, for all units of a group, and for a weight written out in full whose axis is frozen.
    """
    kept = Kept()
    rule_of: dict[Axis, tuple[int, str]] = {}
    for index, rule in enumerate(plan.rules):
        if isinstance(rule.sparsity, Channels):
            _bind(coupling, plan, index, binding.names(index), rule_of, kept)
    for index, rule in enumerate(plan.rules):
        if not isinstance(rule.sparsity, Channels):
            continue
        groups = [coupling.of(atom) for atom, (owner, _) in rule_of.items() if owner == index]
        for pool in _pools(coupling, tensors, groups, rule.scope):
            scores = {g.name: group_score(_members(g, coupling, tensors), rule.sparsity) for g in pool}
            alone = rule.scope == "local"
            exact = _local(pool, rule.sparsity) if alone else _pooled(pool, scores, rule.sparsity)
            counts = {g.name: _aligned(coupling, g, rule.sparsity, exact[g.name]) for g in pool}
            for group in pool:
                kept.asked[group.name] = (
                    rule.sparsity.count(group.size) / group.size if alone else _share(pool, rule.sparsity)
                )
                if counts[group.name] < group.size:
                    kept.keep[group.name] = _highest(scores[group.name], counts[group.name])
            if not alone:
                kept.notes += _shortfall(index, pool, rule.sparsity, sum(exact.values()), sum(counts.values()))
    order = {group.name: i for i, group in enumerate(coupling)}
    kept.keep = dict(sorted(kept.keep.items(), key=lambda item: order[item[0]]))
    return kept


def _bind(
    coupling: Coupling, plan: Plan, index: int, names: list[str], rule_of: dict[Axis, tuple[int, str]], kept: Kept
) -> None:
    rule = plan.rules[index]
    how = rule.sparsity
    assert isinstance(how, Channels)
    bound = False
    refused: dict[str, list[str]] = {}
    for name in names:
        axes = coupling.outputs(name) if how.dim is None else [coupling.axis(name, how.dim)]
        found = list(dict.fromkeys(atom for axis in axes for atom in units(axis, how.unit)))
        bound = bound or bool(found)
        if not found:
            why = _frozen_by(axes, how.unit)
            if rule.names_one:
                raise PlanError(
                    f'cannot shrink "{name}"',
                    where=f"rule {index}",
                    why=why,
                    do=f'fxprune.analyze(model, ...).why("{name}", dim) walks the ties to it. Take the rule out, or '
                    "write a wildcard, which passes over such weights.",
                )
            refused.setdefault(why, []).append(name)
        for atom in found:
            _claim(coupling, plan, index, name, atom, rule_of)
    if not bound and names:
        raise PlanError(
            f"rule {index} binds nothing",
            where=f'"{rule.pattern}"',
            why="; ".join(f"{', '.join(found[:3])}: {why}" for why, found in list(refused.items())[:3]),
            do='fxprune.analyze(model, ...) lists every group; unit="mixed" asks for axes that shrink on request.',
        )
    kept.notes += [
        f"rule {index} shrinks no output of {len(found)} weights ({why}): "
        + ", ".join(found[:3] + ["..."] * (len(found) > 3))
        for why, found in refused.items()
    ]


def _claim(
    coupling: Coupling, plan: Plan, index: int, name: str, atom: Axis, rule_of: dict[Axis, tuple[int, str]]
) -> None:
    earlier, by = rule_of.setdefault(atom, (index, name))
    mine, other = plan.rules[index], plan.rules[earlier]
    if earlier != index and (mine.sparsity, mine.scope) != (other.sparsity, other.scope):
        raise PlanError(
            f"rules {earlier} and {index} ask one group for unequal amounts",
            where=f'group "{coupling.of(atom).name}"',
            why=f'"{by}" ({other.sparsity.describe()}) and "{name}" ({mine.sparsity.describe()}) keep the same indices',
            do="Ask for one amount, or let one of the rules pass over the group.",
        )
    size = coupling.of(atom).size
    how = mine.sparsity
    if isinstance(how, Channels) and mine.scope == "local" and isinstance(how.amount, int) and how.amount >= size:
        raise PlanError(
            f"rule {index} asks for {how.amount} units",
            where=f'group "{coupling.of(atom).name}"',
            why=f"it has {size}, and keeps at least {how.min_keep}",
            do=f"Ask for at most {size - how.min_keep}, or for a fraction such as 0.5.",
        )


def units(axis: Axis, unit: str) -> list[Axis]:
    """The atoms that leave when an axis is pruned: of each concatenated part, the outermost (or innermost) that may.

    The innermost is never the outermost as well, nor one around an axis that shrinks on request only: whoever asks for
    head width does not mean heads.
    """
    axis = axis.root()
    if axis.kind == "concat":
        return list(dict.fromkeys(atom for part in axis.parts for atom in units(part, unit)))
    if axis.kind == "product":
        for part in reversed(axis.parts[1:]) if unit == "inner" else axis.parts:
            if found := units(part, unit):
                return found
            if unit == "inner" and any(atom.mixed and not atom.frozen for atom in atoms(part)):
                break
        return []
    if axis.size.number < 2 or axis.frozen:
        return []
    return [axis] if bool(axis.mixed) == (unit == "mixed") else []


def _frozen_by(axes: Sequence[Axis], unit: str) -> str:
    found = [atom for axis in axes for atom in atoms(axis)]
    if not axes:
        return "it makes no axis: no product reads it as a weight"
    for atom in found:
        if atom.frozen:
            return atom.frozen
    for atom in found:
        if atom.mixed and unit != "mixed":
            return f'{atom.mixed}; unit="mixed" asks for it'
    return "no statistic runs over it, and mixed axes were asked for" if found else "it has one index"


def _pools(coupling: Coupling, tensors: Mapping[str, Tensor], groups: list[Group], scope: str) -> Iterable[list[Group]]:
    if scope == "local":
        return [[group] for group in groups]
    if scope == "global":
        return [groups] if groups else []
    alike: dict[object, list[Group]] = {}
    for group in groups:
        shapes = sorted((tuple(tensors[m.name].shape), m.dim) for m in group.members if m.name in tensors)
        alike.setdefault((group.size, tuple(shapes)), []).append(group)
    return alike.values()


def _members(group: Group, coupling: Coupling, tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, int, Tensor]]:
    """The group's parameters with the dimension, and for each of its indices the index of the group or -1."""
    return [
        (tensors[m.name], m.dim, positions(coupling.tensors[m.name][m.dim], group.axis))
        for m in group.members
        if m.name in tensors and tensors[m.name].is_floating_point()
    ]


def _local(pool: list[Group], how: Channels) -> dict[str, int]:
    return {group.name: group.size - how.count(group.size) for group in pool}


def _share(pool: list[Group], how: Channels) -> float:
    total = sum(group.size for group in pool)
    return how.count(total) / total


def _shortfall(index: int, pool: list[Group], how: Channels, exact: int, final: int) -> list[str]:
    """A note where fewer units of a pool leave than were asked for: `exact` stay before alignment, `final` after."""
    total = sum(group.size for group in pool)
    asked = how.count(total)
    if total - final >= asked:
        return []
    why = []
    if total - exact < asked:
        why.append(f"each group keeps at least min_keep={how.min_keep}")
    if final > exact:
        why.append(f"widths are multiples of align={how.align}")
    text = f"rule {index} asked for {asked} of the {total} units of {_named(pool)}, and {total - final} leave"
    return [f"{text}: {', and '.join(why)}"]


def _named(pool: list[Group]) -> str:
    if len(pool) == 1:
        return f'the group "{pool[0].name}"'
    return f'the {len(pool)} groups of "{pool[0].name}" and others'


def _pooled(pool: list[Group], scores: Mapping[str, Tensor], how: Channels) -> dict[str, int]:
    """Units that stay in each group when the lowest of the whole pool go; each group's scores over their mean."""
    total = sum(group.size for group in pool)
    wanted = how.count(total)
    if isinstance(how.amount, int) and wanted >= total:
        held = f"it has {total}, and" if len(pool) == 1 else f"together they have {total}, and each"
        raise PlanError(
            f"asked for {how.amount} units",
            where=_named(pool),
            why=f"{held} keeps at least {how.min_keep}",
            do="Ask for fewer, or for a fraction such as 0.5.",
        )
    values, owners = [], []
    for index, group in enumerate(pool):
        score = scores[group.name].double()
        # The best of each group stay whatever they are compared with.
        order = torch.sort(score, stable=True).indices[: max(0, group.size - how.min_keep)]
        values.append(score[order] / (score.mean() if score.mean() > 0 else 1.0))
        owners.append(torch.full((len(order),), index))
    ranked = torch.sort(torch.cat(values), stable=True).indices[:wanted]
    removed = torch.bincount(torch.cat(owners)[ranked], minlength=len(pool))
    return {group.name: group.size - int(count) for group, count in zip(pool, removed)}


def _aligned(coupling: Coupling, group: Group, how: Channels, count: int) -> int:
    exact = dataclasses.replace(how, amount=group.size - count)
    return exact.keep_count(group.size, _multiple(coupling, group, how.align))


def _multiple(coupling: Coupling, group: Group, align: int) -> int:
    """The number of units whose widths add up to a multiple of `align` in every axis that a product writes."""
    result = 1
    for axis in coupling.written_with(group.axis):
        width = _width(axis, group.axis)
        result = math.lcm(result, align // math.gcd(align, width))
    return result


def _width(axis: Axis, atom: Axis) -> int:
    """How many indices of the innermost concatenated part around `atom` belong to one index of it."""
    axis = axis.root()
    if axis is atom:
        return 1
    for part in axis.parts:
        if atom in atoms(part):
            inner = _width(part, atom)
            return inner if axis.kind == "concat" else inner * (axis.size.number // part.root().size.number)
    return 1


def _highest(score: Tensor, count: int) -> Tensor:
    """The indices of the `count` highest scores, ascending; among equals the lowest index goes first."""
    order = torch.sort(score, stable=True).indices
    return order[len(order) - count :].sort().values.cpu()
