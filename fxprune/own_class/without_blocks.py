"""without_blocks: residual blocks leave the modules of a model, as they left its graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxprune.check.calls import Call
from fxprune.graph.program import owner

from .attributes import Kind, counts_of, held_objects

_LISTS = (nn.ModuleList, nn.Sequential)


class Bypass(nn.Module):
    """Stands where a residual block stood, and hands on its first argument.

    `more` is how many values the block answered besides, which are None now; None where it answered no tuple.
    """

    def __init__(self, more: int | None) -> None:
        super().__init__()
        self.more = more

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument, alone or as the first of a tuple."""
        first = args[0] if args else next(iter(kwargs.values()))
        return first if self.more is None else (first, *[None] * self.more)


def is_listed(model: nn.Module, path: str) -> bool:
    """Whether a module is an element of a list of modules, which can lose it."""
    return type(owner(model, path)[0]) in _LISTS


def replace_blocks(model: nn.Module, more: dict[str, int | None]) -> None:
    """Puts a `Bypass` in place of each module named, in place; `more` says what it answers, as `answers` found it."""
    for path, count in more.items():
        parent, leaf = owner(model, path)
        parent._modules[leaf] = Bypass(count)


def delete_blocks(model: nn.Module, paths: Sequence[str]) -> list[Kind]:
    """Takes modules out of the lists that they are elements of, in place, and numbers those that stay anew.

    Returns the attributes that may count the elements of these lists.
    """
    gone: defaultdict[str, list[int]] = defaultdict(list)
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        gone[parent].append(list(model.get_submodule(parent)._modules).index(leaf))
    kinds: list[Kind] = []
    for parent, places in gone.items():
        blocks: Any = model.get_submodule(parent)
        count, indices = len(blocks), _index_attributes(list(blocks))
        kinds += counts_of(list(_holders(model, parent)), count, places)
        for place in sorted(places, reverse=True):
            del blocks[place]
        for place, block in enumerate(blocks):
            for inner, name in indices:
                setattr(block.get_submodule(inner), name, place)
    return kinds


def _index_attributes(blocks: list[nn.Module]) -> list[tuple[str, str]]:
    """(path inside a block, attribute) of the numbers that are each block's own place in the list."""
    found: set[tuple[str, str]] | None = None
    for place, block in enumerate(blocks):
        own = {
            (path, name)
            for path, module in block.named_modules()
            for name, value in vars(module).items()
            if type(value) is int and value == place
        }
        found = own if found is None else found & own
    return sorted(found or ()) if len(blocks) > 1 else []


def _holders(model: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """(path, object) of the modules around a list, and of the objects that they hold, inner before outer."""
    names, seen = path.split("."), set()
    for depth in range(len(names) - 1, -1, -1):
        around = ".".join(names[:depth])
        module = model.get_submodule(around)
        for holder in (module, *held_objects(module)):
            if id(holder) not in seen:
                seen.add(id(holder))
                yield around, holder


def answers(model: nn.Module, paths: Sequence[str], call: Call) -> dict[str, int | None]:
    """Module path -> how many values it answers besides its first in a call of the model; None for no tuple."""
    found: dict[str, int | None] = dict.fromkeys(paths)
    hooks = []
    for path in paths:

        def note(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
            found[path] = len(output) - 1 if isinstance(output, tuple) else None

        hooks.append(model.get_submodule(path).register_forward_hook(note))
    args, kwargs = call.copy()
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
