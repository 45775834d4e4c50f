"""attributes: the whole numbers that modules, and objects which modules hold, remember, and what they may become."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from .known_modules import known_attributes
from .narrow_attention import NarrowAttention
from .sizes import STEPS, Known, Seen, Sizes

# What every nn.Module has, and tuples longer than any list of sizes.
_TORCH = frozenset(vars(nn.Module()))
_MOST_ITEMS = 64
_NUMBERED = re.compile(r"\b\d+\b")
_COUNTS_LAYERS = re.compile(r"layer|block|depth", re.IGNORECASE)

Key = tuple[str, ...] | tuple[str, int] | tuple[str, str]


@dataclasses.dataclass(eq=False)
class Place:
    """One attribute of one object, or one item of it: what it holds, and what it may become, the likeliest first.

    Where it is likely to stay, what it holds comes first.
    """

    holder: Any
    name: str
    item: Any
    old: Any
    options: list[Any]
    path: str

    def put(self, value: Any) -> None:
        """Sets the attribute, or the item in a copy of what holds it."""
        if self.item is None:
            setattr(self.holder, self.name, value)
            return
        held = getattr(self.holder, self.name)
        if isinstance(held, dict):
            new: Any = {**held, self.item: value}
        else:
            items = list(held)
            items[self.item] = value
            new = type(held)(items)
        setattr(self.holder, self.name, new)


@dataclasses.dataclass(eq=False)
class Kind:
    """The places of one name in objects of one class, at one place of every layer: they take options together."""

    label: str
    places: list[Place] = dataclasses.field(default_factory=list)

    @property
    def most(self) -> int:
        """How many values some place may take."""
        return max(len(place.options) for place in self.places)

    def values(self, choice: int | None) -> list[Any]:
        """What each place holds at a choice: its option of this number, its last where it has fewer, or as it was."""
        if choice is None:
            return [place.old for place in self.places]
        return [place.options[min(choice, len(place.options) - 1)] for place in self.places]

    def put(self, choice: int | None) -> None:
        """Sets every place to what it holds at a choice."""
        for place, value in zip(self.places, self.values(choice)):
            place.put(value)


def kinds_of(modules: Mapping[str, nn.Module], sizes: Sizes) -> list[Kind]:
    """The attributes that hold a size which changed, of the modules by path and of the objects that these hold."""
    found: dict[tuple[type, str, Any, str], Kind] = {}
    seen: set[int] = set()

    def add(place: Place) -> None:
        owner = type(place.holder)
        label = f"{owner.__name__}.{place.name}" + ("" if place.item is None else f"[{place.item!r}]")
        # What stands at one place of every layer follows alike; two linears of one layer need not.
        alike = _NUMBERED.sub("*", place.path)
        found.setdefault((owner, place.name, place.item, alike), Kind(label)).places.append(place)

    for path, module in modules.items():
        if id(module) in seen:
            continue
        seen.add(id(module))
        known = known_attributes(module)
        if isinstance(module, NarrowAttention):
            add(Place(module, "num_heads", None, module.num_heads, module.possible_heads, path))
        for name, item, value in numbers(module):
            if name not in known and name not in STEPS:
                if options := _options(sizes.at(path), value):
                    add(Place(module, name, item, value, options, path))
        for holder in held_objects(module):
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            for name, item, value in numbers(holder):
                if options := sizes.news_of(value):
                    add(Place(holder, name, item, value, [value, *options], path))
    return list(found.values())


def numbers(holder: Any) -> Iterator[tuple[str, Any, int]]:
    """(attribute, item, value) of the whole numbers from 2 up that an object remembers; item None where it is one."""
    for name, value in list(vars(holder).items()):
        if name in _TORCH:
            continue
        if _is_size(value):
            yield name, None, value
        elif isinstance(value, (tuple, list)) and 0 < len(value) <= _MOST_ITEMS and type(value) in _ROWS:
            yield from ((name, place, item) for place, item in enumerate(value) if _is_size(item))
        elif type(value) is dict and 0 < len(value) <= _MOST_ITEMS:
            yield from ((name, key, item) for key, item in value.items() if _is_size(item))


def held_objects(module: nn.Module) -> Iterator[Any]:
    """The objects other than modules and tensors that a module holds, such as its config, and those that they hold."""
    waiting = [value for name, value in vars(module).items() if name not in _TORCH]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        kind = type(found)
        plain = kind.__module__.partition(".")[0] in ("builtins", "torch", "collections", "functools", "weakref")
        if plain or isinstance(found, (nn.Module, type)) or not hasattr(found, "__dict__") or callable(found):
            continue
        if id(found) not in seen:
            seen.add(id(found))
            yield found
            waiting += vars(found).values()


def counts_of(holders: Iterable[tuple[str, Any]], count: int, gone: list[int]) -> list[Kind]:
    """The attributes of holders (path, object) that may count the layers of a list that loses those numbered `gone`.

    A number that is the count may follow; a list with an entry for each layer may lose the entries of those.
    """
    kinds = []
    for path, holder in holders:
        for name, value in list(vars(holder).items()):
            if name in _TORCH:
                continue
            label, hinted = f"{type(holder).__name__}.{name}", bool(_COUNTS_LAYERS.search(name))
            if type(value) is int and value == count:
                left: Any = count - len(gone)
            elif isinstance(value, (tuple, list)) and type(value) in _ROWS and len(value) == count:
                left = type(value)(item for place, item in enumerate(value) if place not in gone)
            else:
                continue
            options = [left] if hinted else [value, left]
            kinds.append(Kind(label, [Place(holder, name, None, value, options, path)]))
    return kinds


_ROWS = (tuple, list)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 1


def _options(seen: Seen, value: int) -> list[int]:
    """What a number of a module may become, the likeliest first; the number itself first where it is likely to stay.

    What its own code passes to ops speaks first, then its own parameters and those of its children, even where other
    sizes were the same number. Farther away only what always changed is likely.
    """
    near: list[Known] = [seen.literals, seen.own, seen.children]
    far: list[Known] = [seen.shapes, seen.below, seen.under]
    found: list[int] = []
    stays = set(seen.literals.get(value, ())) == {value}
    for known in (*near, *far):
        news = [new for new in known.get(value, ()) if new != value]
        news.sort(key=lambda new, known=known: -known[value][new])
        if news and not found:
            stays = stays or (value in known[value] and all(known is not one for one in near))
        found += [new for new in news if new not in found]
    return [value, *found] if found and stays else found
