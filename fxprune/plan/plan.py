"""What the user asks for: rules, each a name pattern and a sparsity pattern, and blocks to drop. Knows no graph."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, cast

from tabulate import tabulate

from fxprune.errors import PlanError

from .binding import Binding, Candidate
from .names import is_glob, matches, near
from .patterns import SPARSITIES, Blocks, Channels, SemiStructured, Sparsity, Unstructured
from .scores import SCORE_NAMES, UNIT_SCORE_NAMES, Scores

_SCOPES = ("local", "global", "isomorphic")
_FORMAT = 1  # of the JSON


@dataclass(frozen=True)
class Rule:
    """Apply `sparsity` to every weight whose name matches `pattern`.

    `pattern` is a glob (`*`, `?`, `[...]`, case sensitive) whose `*` crosses dots. scope "local" takes the
    amount from each weight (Channels: each group) by itself, "global" from all that this rule binds, pooled.
    "isomorphic", for Channels only, pools the groups that have the same shape. SemiStructured, and Unstructured with
    per_row, take the same share everywhere and know "local" only.
    """

    pattern: str
    sparsity: Sparsity
    scope: str = "local"

    def __post_init__(self) -> None:
        _check_pattern(self.pattern, "Rule(pattern=...)")
        if not isinstance(self.sparsity, tuple(SPARSITIES.values())):
            raise PlanError(
                "cannot use this sparsity pattern",
                where=f'Rule("{self.pattern}", ...)',
                why=f"{self.sparsity!r} is not a sparsity pattern",
                do=f"Use one of {', '.join(kind.__name__ for kind in SPARSITIES.values())}.",
            )
        if self.scope not in _SCOPES:
            raise PlanError(
                f"unknown scope {self.scope!r}",
                where=f'Rule("{self.pattern}", ...)',
                why='a scope is "local" (each by itself), "global" (pooled) or "isomorphic" (same shapes pooled)',
                do="Use one of these.",
            )
        if self.scope == "isomorphic" and not isinstance(self.sparsity, Channels):
            raise PlanError(
                'cannot use scope "isomorphic"',
                where=f'Rule("{self.pattern}", ...)',
                why=f"it compares groups of one shape, and {type(self.sparsity).__name__} prunes no groups",
                do='Use "local" or "global", or the pattern Channels.',
            )
        if self.scope == "global" and (why := _not_pooled(self.sparsity)):
            raise PlanError(
                'cannot use scope "global"',
                where=f'Rule("{self.pattern}", ...)',
                why=why,
                do='Use "local", or Unstructured or Blocks, which can compare all weights of a rule.',
            )

    @property
    def names_one(self) -> bool:
        """Whether the pattern is a name written out in full, which must be right, and no wildcard."""
        return not is_glob(self.pattern)


@dataclass(frozen=True)
class Drop:
    """Take whole residual blocks, or branches of residual sums, out of the graph.

    `pattern` is the path of a module as in `model.named_modules()`, or a glob whose `*` crosses dots, such as
    "encoder.layer.[35]" or "model.layers.[35].self_attn". A residual block adds to its input, and hands its input on
    once it has left. A branch is a module whose output one sum adds to something else, and nothing else reads: the
    attention or the feed-forward layer of a transformer, without which the sum is its other addend. What only the
    module needed leaves with it, such as a norm in front.
    """

    pattern: str

    def __post_init__(self) -> None:
        _check_pattern(self.pattern, "Drop(pattern=...)", "module's path", "encoder.layer.[35]")


@dataclass(frozen=True)
class Plan:
    """Rules in order (a later one wins), blocks to drop, and patterns that no wildcard may bind.

    Rules and drops are given as one list (drops also as `drops`) and are kept apart. A rule that writes a name out in
    full means it: `exclude` does not take it away. `exclude` speaks of parameters, not of blocks. Raises PlanError for
    anything malformed.
    """

    rules: tuple[Rule, ...] = ()
    exclude: tuple[str, ...] = ()
    drops: tuple[Drop, ...] = ()

    def __init__(
        self, rules: Iterable[Rule | Drop] = (), exclude: Iterable[str] = (), drops: Iterable[Drop] = ()
    ) -> None:
        given = _tuple(rules, (Rule, Drop), "Plan(rules=...)", "Rule(...), Drop(...)")
        # dataclasses.replace hands over every field, so the drops must have an argument of their own.
        given += _tuple(drops, (Drop,), "Plan(drops=...)", "Drop(...)")
        object.__setattr__(self, "rules", tuple(item for item in given if isinstance(item, Rule)))
        object.__setattr__(self, "drops", tuple(item for item in given if isinstance(item, Drop)))
        object.__setattr__(self, "exclude", _tuple(exclude, (str,), "Plan(exclude=...)", '"name"'))
        for pattern in self.exclude:
            _check_pattern(pattern, "Plan(exclude=...)")

    def __str__(self) -> str:
        rows = [(i, r.pattern, r.sparsity.kind, r.sparsity.describe(), r.scope) for i, r in enumerate(self.rules)]
        rows += [("", drop.pattern, "drop", "residual blocks and branches", "") for drop in self.drops]
        rows += [("", pattern, "excluded from wildcards", "", "") for pattern in self.exclude]
        if not rows:
            return "empty plan: no rules"
        return tabulate(rows, headers=("rule", "names", "sparsity", "what", "scope"), disable_numparse=True)

    def bind(self, parameters: Mapping[str, Candidate], aliases: Mapping[str, str] | None = None) -> Binding:
        """Parameters by name, one name for each tensor -> which rule each one gets.

        `aliases` maps the other names of tied parameters to the one in `parameters`; patterns match any of
        them. Raises PlanError for a full name that is unknown, unprunable or of a shape that the pattern does not
        divide, a wildcard that binds nothing, an exclude pattern that matches nothing, and a number of elements or
        tiles larger than the weight or pool.
        """
        names: dict[str, list[str]] = {name: [name] for name in parameters}
        for alias, name in (aliases or {}).items():
            if alias != name and name in names:
                names[name].append(alias)
        known = [alias for group in names.values() for alias in group]
        for pattern in self.exclude:
            if not any(matches(pattern, name) for name in known):
                raise _nothing("an exclude pattern matches nothing", pattern, known)
        won: dict[str, int] = {}
        overridden, skipped, excluded = [], [], []
        for index, rule in enumerate(self.rules):
            matched = [name for name, group in names.items() if any(matches(rule.pattern, n) for n in group)]
            if not matched:
                raise _nothing(f"rule {index} binds nothing", rule.pattern, known)
            if is_glob(rule.pattern):
                removed = [(name, by) for name in matched for by in self._excluding(names[name])[:1]]
                left = [name for name in matched if name not in dict(removed)]
                sparsity = rule.sparsity
                wrong = {n: parameters[n].unusable(sparsity) or parameters[n].passed_over(sparsity) for n in left}
                unusable = [(name, why) for name, why in wrong.items() if why]
                bound = [name for name, why in wrong.items() if not why]
                if not bound:
                    usable = [name for name, candidate in parameters.items() if not candidate.unusable(sparsity)]
                    raise _unusable(index, rule.pattern, unusable, removed, usable)
                skipped += [(index, *pair) for pair in unusable]
                excluded += [(index, *pair) for pair in removed]
            else:
                _check_usable(index, rule, parameters[matched[0]])
                bound = matched
            overridden += [(name, won[name], index) for name in bound if name in won]
            won.update(dict.fromkeys(bound, index))
        assigned = {name: won[name] for name in parameters if name in won}
        binding = Binding(assigned, tuple(overridden), tuple(skipped), tuple(excluded))
        for index, rule in enumerate(self.rules):
            _check_count(index, rule, {name: parameters[name] for name in binding.names(index)})
        return binding

    def blocks(self, paths: Iterable[str]) -> dict[str, Drop]:
        """Module paths, as in `model.named_modules()` -> the paths that are dropped, each with its Drop.

        A path inside another dropped path goes with it and is not listed, nor is the root "" ever. Where two
        drops name one path, the later has it. Raises PlanError for a drop that matches no path.
        """
        known = [path for path in dict.fromkeys(paths) if path]
        matched: dict[str, Drop] = {}
        for drop in self.drops:
            found = [path for path in known if matches(drop.pattern, path)]
            if not found:
                raise _nothing("a drop binds nothing", drop.pattern, known, "module")
            matched.update(dict.fromkeys(found, drop))
        outermost = [path for path in known if path in matched and not any(above in matched for above in _above(path))]
        return {path: matched[path] for path in outermost}

    def _excluding(self, names: Iterable[str]) -> list[str]:
        return [pattern for pattern in self.exclude if any(matches(pattern, name) for name in names)]

    def to_json(self) -> str:
        """The plan as JSON text. Raises PlanError where a score is a function or Scores: only names can be saved."""
        rules = []
        for index, rule in enumerate(self.rules):
            values = {field.name: getattr(rule.sparsity, field.name) for field in fields(rule.sparsity)}
            if values.get("norm") == math.inf:
                values["norm"] = "inf"  # JSON has no infinity
            for later in ("per_row", "uniform"):
                if values.get(later) is False:
                    del values[later]  # plans without it stay readable to versions that did not know it
            if not isinstance(values.get("score", ""), str):
                kind = "Scores" if isinstance(values["score"], Scores) else "a function"
                names = UNIT_SCORE_NAMES if isinstance(rule.sparsity, Channels) else SCORE_NAMES
                raise PlanError(
                    "cannot save the plan",
                    where=f'rule {index}, "{rule.pattern}"',
                    why=f"its score is {kind}, and {kind} cannot be saved",
                    do=f"Name a score ({', '.join(names)}), or save the selection instead of the plan.",
                )
            sparsity = {"kind": rule.sparsity.kind, **values}
            rules.append({"pattern": rule.pattern, "sparsity": sparsity, "scope": rule.scope})
        data: dict[str, Any] = {"fxprune_plan": _FORMAT, "rules": rules, "exclude": list(self.exclude)}
        if self.drops:
            data["drops"] = [drop.pattern for drop in self.drops]
        return json.dumps(data, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. Raises PlanError for any other text."""
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise _unreadable(f"not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("fxprune_plan") != _FORMAT:
            raise _unreadable(f'it does not say "fxprune_plan": {_FORMAT}')
        try:
            drops = _tuple(data.get("drops", ()), (str,), 'the "drops" of Plan.from_json', '"module"')
            rules = [_read_rule(rule) for rule in data["rules"]]
            return cls([*rules, *map(Drop, drops)], data["exclude"])
        except PlanError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _unreadable(f"{type(error).__name__}: {error}") from error


def plan_text(plan: Plan) -> str:
    """A plan as JSON, or in words where JSON has none for its scores."""
    try:
        return plan.to_json()
    except PlanError:
        return str(plan)


def _check_pattern(
    pattern: object, where: str, names: str = "parameter's name", example: str = "encoder.*.weight"
) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise PlanError(
            f"cannot use {pattern!r} as a name pattern",
            where=where,
            why="a pattern is a text that is not empty",
            do=f'Write a {names} or a glob, such as "{example}".',
        )


def _tuple(items: object, kinds: tuple[type, ...], where: str, example: str) -> tuple[Any, ...]:
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise PlanError(
            f"cannot use {items!r}", where=where, why="it is not a list", do=f"Put it into one: [{example}]."
        )
    found = tuple(items)
    for item in found:
        if not isinstance(item, kinds):
            why = f"{item!r} is a {type(item).__name__}"
            raise PlanError("cannot use this list", where=where, why=why, do=f"Fill it with {example}.")
    return found


def _read_rule(data: Mapping[str, Any]) -> Rule:
    values = dict(data["sparsity"])
    kind = values.pop("kind")
    if kind not in SPARSITIES:
        near = get_close_matches(str(kind), SPARSITIES) or list(SPARSITIES)
        raise _unreadable(f'unknown sparsity pattern "{kind}" (near: {", ".join(near)})')
    if values.get("norm") == "inf":
        values["norm"] = math.inf
    return Rule(data["pattern"], cast(Any, SPARSITIES[kind])(**values), data["scope"])


def _unreadable(why: str) -> PlanError:
    do = "Give the text that Plan.to_json wrote."
    return PlanError("cannot read a plan", where="Plan.from_json", why=why, do=do)


def _above(path: str) -> Iterator[str]:
    """Every module path that a path lies inside: "a", "a.b" for "a.b.c"."""
    parts = path.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))


def _not_pooled(sparsity: Sparsity) -> str:
    if isinstance(sparsity, SemiStructured):
        return f"{sparsity.n} of every {sparsity.m} stay in every weight, so there is nothing to pool"
    if isinstance(sparsity, Unstructured) and sparsity.per_row:
        return "with per_row every row loses the same share, so there is nothing to pool"
    return ""


def _check_usable(index: int, rule: Rule, candidate: Candidate) -> None:
    if why := candidate.unusable(rule.sparsity):
        so = f" as {rule.sparsity.describe()}" if candidate.prunable else ""
        raise PlanError(
            f"cannot bind rule {index}",
            where=f'"{rule.pattern}" {list(candidate.shape)}',
            why=f"this parameter cannot be pruned{so}: {why}",
            do="Take the rule out, or write a wildcard, which passes over such parameters.",
        )


def _check_count(index: int, rule: Rule, bound: Mapping[str, Candidate]) -> None:
    how = rule.sparsity
    if not isinstance(how, (Unstructured, Blocks)):
        return
    noun, sizes = ("tiles" if isinstance(how, Blocks) else "elements"), {}
    for name, candidate in bound.items():
        shape = candidate.shape
        if isinstance(how, Unstructured):
            sizes[f'"{name}" {list(shape)}'] = math.prod(shape)
        elif candidate.role != "unknown":
            sizes[f'"{name}" {list(shape)}'] = how.tiles(shape, candidate.inputs)
    if rule.scope == "global" and sizes:
        sizes = {f'the {len(sizes)} weights of "{rule.pattern}"': sum(sizes.values())}
    for where, size in sizes.items():
        if how.count(size) > size:
            raise PlanError(
                f"rule {index} asks for {how.amount} {noun}",
                where=where,
                why=f"there are only {size}",
                do=f"Ask for at most {size}, or for a fraction such as 0.9.",
            )


def _unusable(
    index: int,
    pattern: str,
    unusable: list[tuple[str, str]],
    removed: list[tuple[str, str]],
    usable: list[str],
) -> PlanError:
    met = [f"{name} ({reason})" for name, reason in unusable]
    met += [f'{name} (excluded by "{by}")' for name, by in removed]
    more = f" and {len(met) - 5} more" if len(met) > 5 else ""
    why = f"it matches only what cannot be used: {', '.join(met[:5])}{more}"
    return PlanError(f"rule {index} binds nothing", where=f'"{pattern}"', why=why, do=_suggest(pattern, usable))


def _nothing(what: str, pattern: str, names: list[str], kind: str = "parameter") -> PlanError:
    asked = "matches this pattern" if is_glob(pattern) else f"has this {'path' if kind == 'module' else 'name'}"
    why = f"none of the {len(names)} {kind}s {asked}"
    return PlanError(what, where=f'"{pattern}"', why=why, do=_suggest(pattern, names, kind))


def _suggest(pattern: str, names: Iterable[str], kind: str = "parameter") -> str:
    found = near(pattern, names)
    return f"Near it: {', '.join(found)}." if found else f"See dict(model.named_{kind}s()) for the names."
