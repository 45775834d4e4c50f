"""config: the configs of transformers models follow, so that from_pretrained loads what save_pretrained writes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.check.proof import Expected
from fxprune.graph.note import some
from fxprune.graph.program import owner

from .attributes import held_objects, numbers
from .sizes import Sizes
from .trial import try_out

# How many configs are tried: each is a model built on the meta device.
_MOST_BUILT = 96
_MOST_FILLED = 6
# What a change is about: the names that lead to an object inside the config, the attribute, and an item of it.
_Where = tuple[tuple[str, ...], str, Any]
_Changes = dict[_Where, Any]


@dataclasses.dataclass(frozen=True)
class LostLayers:
    """A list of modules that had `count` elements and lost those numbered `gone`."""

    count: int
    gone: tuple[int, ...]


def follow_configs(
    own: nn.Module, model: nn.Module, sizes: Sizes, lost: Sequence[LostLayers], expected: Expected
) -> list[str]:
    """Makes the configs of transformers models in `own` say its widths, in place; notes on those that cannot.

    A config is right if its class makes of it a model with the very shapes of `own`, which then answers alike. Where it
    has the shapes and answers otherwise, numbers without a shape follow too, as how many heads a width is split in.
    """
    notes = []
    for path in _pretrained(own):
        part = own.get_submodule(path)
        search = _Search(part, _config(model.get_submodule(path)), sizes, lost)
        search.run()
        with _undone_unless_right(part) as undo:
            if search.misfits:
                if search.is_built:
                    _sync(part, search.build(search.changes, "meta"), only_configs=True)
                notes.append(_cannot_say(path, part, search.misfits))
            else:
                built, why = _built(own, path, part, search, expected)
                if why:
                    notes.append(_cannot_load(path, part, why))
                else:
                    _sync(part, built, only_configs=False)
            undo(try_out(own, expected, everywhere=False).right)
    return notes


def _pretrained(own: nn.Module) -> list[str]:
    """The paths of the transformers models in a model, without those inside one another."""
    # The library is not loaded for a model that is none of its own.
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    paths: list[str] = []
    for path, module in own.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in paths)
        if isinstance(module, PreTrainedModel) and not inside:
            paths.append(path)
    return paths


def _config(module: Any) -> Any:
    return module.config


def _built(own: nn.Module, path: str, part: nn.Module, search: _Search, expected: Expected) -> tuple[nn.Module, str]:
    """A model by the config that was found, and why it is not `part`; "" where it answers alike."""
    built = search.build(search.changes, _device(part))
    why = _wrong(own, path, part, built, expected)
    if why and search.settle():
        built = search.build(search.changes, _device(part))
        why = _wrong(own, path, part, built, expected)
    return built, why


class _Search:
    """Looks for the changes of a config that give a model the shapes of `part`, the fewest misfits first."""

    def __init__(self, part: nn.Module, config: Any, sizes: Sizes, lost: Sequence[LostLayers]) -> None:
        self._part, self._config, self._sizes, self._lost = part, config, sizes, lost
        self._shapes = {name: tuple(t.shape) for name, t in part.state_dict().items() if isinstance(t, Tensor)}
        self._built = 0
        self.changes: _Changes = {}
        self.misfits = self._misfits({})

    @property
    def is_built(self) -> bool:
        """Whether the class makes a model of the config as it now is."""
        return len(self.misfits) <= len(self._shapes)

    def run(self) -> None:
        """Takes changes that leave fewer misfits, again and again; two at once where no single one helps."""
        while self.misfits and any(self._improve(way) for way in self._ways()):
            pass

    def _ways(self) -> Iterator[Iterable[_Changes]]:
        agreeing, others = self._numbers()
        moves = [*self._layers(), *agreeing]
        named, unnamed = self._fills()
        yield from (moves, named, unnamed, _two(moves, named), others, _two(others, [*moves, *named]))

    def settle(self) -> bool:
        """Takes changes that keep the shapes while modules remember more numbers as `part` does; says if any did."""
        start = best = self._disagreeing(self.changes)
        for move in itertools.chain(*self._numbers()):
            if self._built >= _MOST_BUILT:
                break
            changes = {**self.changes, **move}
            if (found := self._disagreeing(changes)) < best:
                self.changes, best = changes, found
        return best < start

    def build(self, changes: _Changes, device: Any) -> nn.Module:
        """A model of the class of `part` by the config with these changes, as from_pretrained would read it.

        Raises whatever its class raises over such a config.
        """
        changed = copy.deepcopy(self._config)
        for (trail, name, item), value in changes.items():
            holder = _at(changed, trail)
            if item is not None:
                items = list(getattr(holder, name))
                items[item] = value
                value = type(getattr(holder, name))(items)
            setattr(holder, name, value)
        with tempfile.TemporaryDirectory() as folder:
            changed.save_pretrained(folder)
            read = type(changed).from_pretrained(folder)
        for trail, config in self._configs():
            # Which attention runs is no part of what is saved.
            kept = {name: value for name, value in vars(config).items() if name.endswith("_implementation_internal")}
            vars(_at(read, trail)).update(kept)
        kind: Any = type(self._part)
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return kind(read)

    def _misfits(self, changes: _Changes) -> list[str]:
        """The names of tensors that differ in shape, or are missing or too many; more than all for a config refused."""
        self._built += 1
        try:
            built = self.build(changes, "meta").state_dict()
        except Exception as error:
            # A config checks itself, and classes check their configs, in whatever words.
            return [f"{type(error).__name__}: {error}"] * (len(self._shapes) + 1)
        shapes = {name: tuple(t.shape) for name, t in built.items() if isinstance(t, Tensor)}
        return [name for name in {**self._shapes, **shapes} if self._shapes.get(name) != shapes.get(name)]

    def _disagreeing(self, changes: _Changes) -> float:
        """How many numbers modules remember otherwise than those of `part`; infinity where a shape differs."""
        if self._misfits(changes):
            return math.inf
        built = dict(self.build(changes, "meta").named_modules())
        pairs = [(module, built[path]) for path, module in self._part.named_modules() if path in built]
        return sum(len(set(numbers(mine)) ^ set(numbers(theirs))) for mine, theirs in pairs)

    def _improve(self, moves: Iterable[_Changes]) -> bool:
        """Takes the moves that leave fewer misfits than there are, the best first; says whether there was one."""
        found: list[tuple[int, _Changes]] = []
        for move in moves:
            if self._built >= _MOST_BUILT:
                break
            misfits = self._misfits({**self.changes, **move})
            if len(misfits) < len(self.misfits):
                found.append((len(misfits), move))
            if not misfits:
                break
        best = len(self.misfits)
        for _, move in sorted(found, key=lambda one: one[0]):
            changes = {**self.changes, **move}
            misfits = self._misfits(changes)
            if len(misfits) < len(self.misfits):
                self.changes, self.misfits = changes, misfits
        return len(self.misfits) < best

    def _configs(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        waiting: list[tuple[tuple[str, ...], Any]] = [((), self._config)]
        while waiting:
            trail, config = waiting.pop(0)
            yield trail, config
            waiting += [((*trail, name), c) for name, c in vars(config).items() if hasattr(c, "to_json_string")]

    def _numbers(self) -> tuple[list[_Changes], list[_Changes]]:
        """A number that was a size becomes what that size became; apart, where modules remember another by its name."""
        agreeing: list[_Changes] = []
        others: list[_Changes] = []
        said = self._said()
        for trail, config in self._configs():
            for name, item, value in numbers(config):
                if not isinstance(getattr(config, name), dict):
                    for new in self._sizes.news_of(value):
                        agrees = item is not None or name not in said or new in said[name]
                        (agreeing if agrees else others).append({(trail, name, item): new})
        return agreeing, others

    def _said(self) -> dict[str, set[int]]:
        """Attribute -> the numbers that modules with a config remember by this name."""
        said: dict[str, set[int]] = {}
        for module in self._part.modules():
            has_config = any(hasattr(held, "to_json_string") for held in vars(module).values())
            for name, item, value in numbers(module):
                if item is None and has_config:
                    said.setdefault(name, set()).add(value)
        return said

    def _layers(self) -> list[_Changes]:
        """The number of layers becomes smaller, and lists with a word for each layer become shorter with it."""
        found: list[_Changes] = []
        for (trail, config), lost in itertools.product(self._configs(), self._lost):
            lists: _Changes = {}
            for name, value in vars(config).items():
                if type(value) is list and len(value) == lost.count and all(isinstance(v, str) for v in value):
                    lists[(trail, name, None)] = [v for place, v in enumerate(value) if place not in lost.gone]
            counts = [name for name, item, value in numbers(config) if item is None and value == lost.count]
            found += [{(trail, name, None): lost.count - len(lost.gone), **lists} for name in counts]
        return found

    def _fills(self) -> tuple[list[_Changes], list[_Changes]]:
        """What a config leaves open, and its class computes, is said: the width of a head, that of an FFN.

        First as modules remember it by the same name, then as any size of a misfit, or that is new.
        """
        said = self._said()
        frequent = sorted(((n, new) for old, c in self._sizes.all().items() for new, n in c.items() if new != old))
        # A size that stays is said too, where the class computes it from one that does not.
        misfit = Counter(size for name in self.misfits for size in self._shapes.get(name, ()))
        likely = [*(size for size, _ in misfit.most_common()), *(new for _, new in reversed(frequent))]
        sizes = list(dict.fromkeys(likely))[:_MOST_FILLED]
        named: list[_Changes] = []
        unnamed: list[_Changes] = []
        for trail, config in self._configs():
            # Classes ask a config also for what it may lack.
            for name in said:
                if getattr(config, name, None) is None:
                    named += [{(trail, name, None): value} for value in sorted(said[name])]
            for name, value in vars(config).items():
                if value is None and name not in said and not name.startswith("_") and not name.endswith("_id"):
                    unnamed += [{(trail, name, None): new} for new in sizes]
        return named, unnamed


def _at(config: Any, trail: tuple[str, ...]) -> Any:
    for step in trail:
        config = getattr(config, step)
    return config


def _two(moves: Sequence[_Changes], fills: Sequence[_Changes]) -> Iterator[_Changes]:
    pairs = [*itertools.product(moves, fills), *itertools.combinations(moves, 2)]
    yield from ({**a, **b} for a, b in pairs if not a.keys() & b.keys())


def _device(part: nn.Module) -> torch.device:
    return next((p.device for p in part.parameters()), torch.device("cpu"))


def _wrong(own: nn.Module, path: str, part: nn.Module, built: nn.Module, expected: Expected) -> str:
    """Why a model built by the config is not `part` once it has its tensors; "" where it answers alike."""
    first = next((p for p in part.parameters() if p.is_floating_point()), None)
    if first is not None:
        built.to(first.dtype)
    built.load_state_dict(part.state_dict())
    if not path:
        return try_out(built, expected, everywhere=False).why
    parent, leaf = owner(own, path)
    parent._modules[leaf] = built
    try:
        return try_out(own, expected, everywhere=False).why
    finally:
        parent._modules[leaf] = part


def _sync(part: nn.Module, built: nn.Module, *, only_configs: bool) -> None:
    """Gives the numbers that modules and configs remember the values that they have in a model built by the config."""
    others = dict(built.named_modules())
    done: set[int] = set()
    for path, module in part.named_modules():
        if path not in others:
            continue
        pairs: list[tuple[Any, Any]] = [] if only_configs else [(module, others[path])]
        pairs += [(mine, theirs) for mine, theirs in zip(held_objects(module), held_objects(others[path]))]
        for mine, theirs in pairs:
            if id(mine) not in done and type(mine) is type(theirs):
                done.add(id(mine))
                own = _remembered(mine)
                for name, value in _remembered(theirs).items():
                    if own.get(name) != value and (name in own or vars(mine).get(name) is None):
                        setattr(mine, name, value)


def _remembered(holder: Any) -> Mapping[str, Any]:
    """The whole numbers and lists of an object."""
    tables = ("_modules", "_parameters", "_buffers")
    found = {name: value for name, value in vars(holder).items() if name not in tables and not name.startswith("_")}
    return {name: value for name, value in found.items() if type(value) in (int, list, tuple)}


@contextlib.contextmanager
def _undone_unless_right(part: nn.Module) -> Iterator[Any]:
    """Puts attributes of modules and configs back where the answer that it is given is that they are not right."""
    holders: list[Any] = []
    for module in part.modules():
        holders += [module, *held_objects(module)]
    before = [(holder, dict(vars(holder))) for holder in {id(h): h for h in holders}.values()]
    right = False

    def answer(value: bool) -> None:
        nonlocal right
        right = value

    yield answer
    if not right:
        for holder, attributes in before:
            for name in _remembered(holder):
                if name not in attributes:
                    delattr(holder, name)
                elif vars(holder)[name] is not attributes[name]:
                    setattr(holder, name, attributes[name])


def _cannot_say(path: str, part: nn.Module, misfits: Sequence[str]) -> str:
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in misfits if ": " not in name))
    which = some(layers) or misfits[0]
    said = f"no {type(_config(part)).__name__} gives {path or type(part).__name__} the widths of {which}"
    return f"{said}: {FOLDER}"


def _cannot_load(path: str, part: nn.Module, why: str) -> str:
    said = f"what {type(part).__name__} makes of its config computes something else ({why})"
    return f"{path + ': ' if path else ''}{said}: {FOLDER}"


# What notes on configs end with.
FOLDER = (
    "it runs, trains and generates, but from_pretrained will not load what its save_pretrained writes; "
    "fxprune.save_pretrained and fxprune.from_pretrained do. A plan with the same amount for every layer of a kind, "
    "Channels(..., uniform=True), of widths that the config has a number for, makes the first possible"
)
