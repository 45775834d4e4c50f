"""units: the structured half of select. Groups, scores and amounts -> the indices that each group keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fxprune.couple.axis import Axis, atoms
from fxprune.couple.coupling import Coupling, Group
from fxprune.couple.indices import positions
from fxprune.couple.rules import Dims
from fxprune.errors import PlanError
from fxprune.graph.note import Note, some
from fxprune.plan.patterns import Channels
from fxprune.plan.plan import Binding, Plan, Rule
from fxprune.plan.scores import Scores

from .unit_score import RELATIVE, Slices, has_scales, score_units


@dataclasses.dataclass
class Kept:
    """What a plan's Channels came to.

    keep   group -> indices that stay (int64, ascending), for groups that lose some
    asked  group -> fraction that its rule asked for, for every group that a rule bound
    notes  in words: what a rule's wildcard met and could not use, pools that lose less than was asked, and groups
           that could not be scored as was asked
    """

    keep: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    asked: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[Note] = dataclasses.field(default_factory=list)


@torch.no_grad()
def keep_channels(
    coupling: Coupling,
    tensors: Mapping[str, Tensor],
    plan: Plan,
    binding: Binding,
    given: Mapping[str, Tensor] | None = None,
) -> Kept:
    """Which indices every group keeps. `tensors` are the program's parameters by name; they are only read.

    `given` are scores [size] of the units of groups by name, which take the place of their rules' scores. Ties in the
    scores go to the lowest index first. Raises PlanError for coupled weights that are asked for unequal amounts, for
    all units of a group, and for a weight written out in full whose axis is frozen.
    """
    kept = Kept()
    scaling = _batch_norm_weights(coupling)
    rule_of: dict[Axis, tuple[int, str]] = {}
    for index, rule in enumerate(plan.rules):
        if isinstance(rule.sparsity, Channels):
            _bind(coupling, plan, index, binding.names(index), rule_of, kept)
    for index, rule in enumerate(plan.rules):
        if not isinstance(rule.sparsity, Channels):
            continue
        groups = [coupling.of(atom) for atom, (owner, _) in rule_of.items() if owner == index]
        short: list[str] = []
        slices = {g.name: _members(g, coupling, tensors, scaling) for g in groups}
        kept.notes += _scored_otherwise(index, slices, rule.sparsity)
        alone = rule.scope == "local"
        for pool in _pools(tensors, groups, rule):
            scores = {g.name: _scored(g, slices[g.name], rule.sparsity, given or {}) for g in pool}
            relative = not given and _relative([slices[g.name] for g in pool], rule.sparsity)
            exact = _local(pool, rule.sparsity) if alone else _pooled(pool, scores, rule.sparsity, relative)
            if rule.sparsity.uniform:
                exact = _evened(_alike(pool, tensors), exact)
            counts = {g.name: _aligned(coupling, g, rule.sparsity, exact[g.name]) for g in pool}
            if rule.sparsity.uniform:
                counts = {g.name: max(counts[h.name] for h in like) for like in _alike(pool, tensors) for g in like}
            for group in pool:
                kept.asked[group.name] = (
                    rule.sparsity.count(group.size) / group.size if alone else _share(pool, rule.sparsity)
                )
                if counts[group.name] < group.size:
                    kept.keep[group.name] = _highest(scores[group.name], counts[group.name])
            if alone:
                short += [g.name for g in pool if _is_far_short(g.size, exact[g.name], counts[g.name])]
            else:
                kept.notes += _shortfall(index, pool, rule.sparsity, sum(exact.values()), sum(counts.values()))
        if short:
            held = f"what stays of it is a multiple of {rule.sparsity.align}, and at least {rule.sparsity.min_keep}"
            which = f"{len(short)} of {len(groups)} groups lose much less than was asked"
            kept.notes.append(Note(f"rule {index}: {which}, for {held} (align=, min_keep=): {some(short)}", "missed"))
    order = {group.name: i for i, group in enumerate(coupling)}
    kept.keep = dict(sorted(kept.keep.items(), key=lambda item: order[item[0]]))
    return kept


def _scored(group: Group, slices: list[Slices], how: Channels, given: Mapping[str, Tensor]) -> Tensor:
    return given[group.name] if group.name in given else score_units(slices, how)


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
        Note(f"rule {index} shrinks no output of {len(found)} weights ({why}): {some(found)}", "missed")
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


def _pools(tensors: Mapping[str, Tensor], groups: list[Group], rule: Rule) -> list[list[Group]]:
    """The groups of a rule, those together whose numbers are decided together."""
    if rule.scope == "global":
        return [groups] if groups else []
    assert isinstance(rule.sparsity, Channels)
    if rule.scope == "isomorphic" or rule.sparsity.uniform:
        return _alike(groups, tensors)
    return [[group] for group in groups]


def _alike(groups: Iterable[Group], tensors: Mapping[str, Tensor]) -> list[list[Group]]:
    """Groups by size and by the shapes of their members."""
    alike: dict[object, list[Group]] = {}
    for group in groups:
        shapes = sorted((tuple(tensors[m.name].shape), m.dim) for m in group.members if m.name in tensors)
        alike.setdefault((group.size, tuple(shapes)), []).append(group)
    return list(alike.values())


def _evened(alike: Iterable[list[Group]], exact: Mapping[str, int]) -> dict[str, int]:
    """The numbers that stay, spread evenly over the groups of one shape."""
    return {group.name: round(sum(exact[each.name] for each in like) / len(like)) for like in alike for group in like}


def _members(group: Group, coupling: Coupling, tensors: Mapping[str, Tensor], scaling: Collection[str]) -> list[Slices]:
    """The group's parameters; `scaling` names those that batch-norms multiply by."""
    return [
        Slices(
            m.name,
            tensors[m.name],
            m.dim,
            positions(coupling.tensors[m.name][m.dim], group.axis),
            m.name in scaling,
        )
        for m in group.members
        if m.name in tensors and tensors[m.name].is_floating_point()
    ]


def _batch_norm_weights(coupling: Coupling) -> set[str]:
    """The parameters by which batch-norms multiply the channels of activations."""
    found = set()
    for node, call in coupling.ruled.items():
        if node.target is torch.ops.aten.batch_norm.default:
            x, weight = call.arguments["input"], call.arguments["weight"]
            # What has a source is a parameter or made of one: a batch-norm over such is a weight's standardisation.
            if isinstance(weight, Dims) and weight.source and not x.source:
                found.add(weight.source)
    return found


def _scored_otherwise(index: int, slices: Mapping[str, list[Slices]], how: Channels) -> list[Note]:
    """Notes on groups that a rule's score does not fit, or not in full."""
    if how.score == "bn_scale":
        if lacking := [name for name, members in slices.items() if not has_scales(members)]:
            which = f"{len(lacking)} ({some(lacking)})"
            return [Note(f"rule {index} scores {which} by L{how.norm:g} norm: no batch-norm scales their channels")]
    if isinstance(how.score, Scores):
        given = how.score
        if lacking := sorted({m.name for members in slices.values() for m in members if m.name not in given}):
            which = f"{len(lacking)} ({some(lacking)})"
            lack = f"rule {index}: the scores of {given.method} have nothing on {which}, which do not count"
            return [Note(lack, "warning")]
    return []


def _relative(slices: Iterable[list[Slices]], how: Channels) -> bool:
    """Whether the scores of a pool of groups only mean something against their own group's."""
    if how.score == "bn_scale":
        return not all(has_scales(members) for members in slices)
    return isinstance(how.score, str) and how.score in RELATIVE


def _local(pool: list[Group], how: Channels) -> dict[str, int]:
    return {group.name: group.size - how.count(group.size) for group in pool}


def _share(pool: list[Group], how: Channels) -> float:
    total = sum(group.size for group in pool)
    return how.count(total) / total


def _is_far_short(size: int, exact: int, final: int) -> bool:
    """Whether alignment leaves less than three quarters of what was asked for: `exact` would stay, and `final` do."""
    return size - final < 0.75 * (size - exact)


def _shortfall(index: int, pool: list[Group], how: Channels, exact: int, final: int) -> list[Note]:
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
    return [Note(f"{text}: {', and '.join(why)}", "missed")]


def _named(pool: list[Group]) -> str:
    if len(pool) == 1:
        return f'the group "{pool[0].name}"'
    return f'the {len(pool)} groups of "{pool[0].name}" and others'


def _pooled(pool: list[Group], scores: Mapping[str, Tensor], how: Channels, relative: bool) -> dict[str, int]:
    """Units that stay in each group when the lowest of the whole pool go.

    `relative`: by each group's scores over their mean, not by the scores themselves.
    """
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
        values.append(score[order] / (score.mean() if relative and score.mean() > 0 else 1.0))
        owners.append(torch.full((len(order),), index, device="cpu"))
    ranked = torch.sort(torch.cat(values), stable=True).indices[:wanted]
    removed = torch.bincount(torch.cat(owners)[ranked], minlength=len(pool))
    return {group.name: group.size - int(count) for group, count in zip(pool, removed)}


def _aligned(coupling: Coupling, group: Group, how: Channels, count: int) -> int:
    exact = dataclasses.replace(how, amount=group.size - count)
    return exact.keep_count(group.size, coupling.multiple(group.axis, how.align))


def _highest(score: Tensor, count: int) -> Tensor:
    """The indices of the `count` highest scores, ascending; among equals the lowest index goes first."""
    order = torch.sort(score, stable=True).indices
    return order[len(order) - count :].sort().values.cpu()
