"""own_modules: what makes a model of layers of different widths out of the one that its config says, as plain data.

Whole numbers and scales that modules remember, lists of modules that are shorter, and the few modules of fxprune that
stand in them. Only what the model of the config has already can be set, and only to a value of its kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxprune.errors import FileError
from fxprune.graph.program import owner
from fxprune.own_class.narrow_attention import NarrowAttention
from fxprune.own_class.without_blocks import Bypass, NoBranch

Document = dict[str, Any]

_TABLES = frozenset(vars(nn.Module()))
_LISTS = (nn.ModuleList, nn.Sequential)


def differences(own: nn.Module, built: nn.Module) -> Document:
    """What to set in `built`, the model of the config, so that it is `own` but for the tensors.

    Changes the modules of `built`. Raises FileError for what cannot be said, such as a module of another class.
    """
    document: Document = {"lengths": {}, "modules": {}, "values": {}}
    theirs = dict(built.named_modules())
    for path, module in own.named_modules():
        other = theirs.get(path)
        if isinstance(module, _LISTS) and isinstance(other, _LISTS) and len(module) < len(other):
            document["lengths"][path] = len(module)
    _shorten(built, document["lengths"])
    for path, module in own.named_modules():
        if type(module) is Bypass:
            document["modules"][path] = ["Bypass", module.more]
        elif type(module) is NoBranch:
            document["modules"][path] = ["NoBranch", module.more, list(module.sizes)]
        elif type(module) is NarrowAttention:
            document["modules"][path] = ["NarrowAttention", module.scale]
    _stand_in(built, document["modules"])
    theirs = dict(built.named_modules())
    mine = dict(own.named_modules())
    if strange := [p for p in {**mine, **theirs} if type(mine.get(p)) is not type(theirs.get(p))]:
        kinds = " and ".join(type(each.get(strange[0])).__name__ for each in (mine, theirs))
        raise _cannot_save(own, strange[0], f"its config makes another module there ({kinds})")
    for path, module in mine.items():
        held = vars(theirs[path])
        changed = {name: value for name, value in _values(module).items() if name in held and held[name] != value}
        if other := [name for name, value in changed.items() if type(held[name]) is not type(value)]:
            raise _cannot_save(
                own, f"{path}.{other[0]}", f"its config makes {held[other[0]]!r} of {changed[other[0]]!r}"
            )
        if changed:
            document["values"][path] = changed
    return {name: part for name, part in document.items() if part}


def apply(built: nn.Module, document: Mapping[str, Any]) -> None:
    """Makes what `differences` said of the model of the config, in place. Raises FileError for what does not fit."""
    _shorten(built, document.get("lengths", {}))
    _stand_in(built, document.get("modules", {}))
    modules = dict(built.named_modules())
    for path, values in document.get("values", {}).items():
        if path not in modules:
            raise _no_place(path)
        held = _values(modules[path])
        for name, value in values.items():
            value = tuple(value) if type(held.get(name)) is tuple and type(value) is list else value
            if name not in held or type(held[name]) is not type(value):
                raise _no_place(f"{path}.{name}")
            setattr(modules[path], name, value)


def _values(module: nn.Module) -> dict[str, Any]:
    """The numbers, and rows of numbers, that a module remembers."""
    return {name: value for name, value in vars(module).items() if name not in _TABLES and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(type(item) in (int, float) for item in value)
    return type(value) in (int, float)


def _shorten(model: nn.Module, lengths: Mapping[str, Any]) -> None:
    for path, length in lengths.items():
        modules = dict(model.named_modules()).get(path)
        if not isinstance(modules, _LISTS) or type(length) is not int or not 0 <= length <= len(modules):
            raise _no_place(path)
        del modules[length:]


def _stand_in(model: nn.Module, kinds: Mapping[str, Any]) -> None:
    for path, (kind, *values) in kinds.items():
        if not path or path not in dict(model.named_modules()):
            raise _no_place(path)
        old = model.get_submodule(path)
        if kind == "NarrowAttention" and type(old) is nn.MultiheadAttention and _are(values, float):
            NarrowAttention.take_over(old, *values)
            continue
        parent, leaf = owner(model, path)
        if kind == "Bypass" and _are(values, int):
            parent._modules[leaf] = Bypass(*values)
        elif kind == "NoBranch" and _are(values, int, list) and all(type(size) is int for size in values[1]):
            parent._modules[leaf] = NoBranch(values[0], tuple(values[1]))
        else:
            raise _no_place(path)


def _are(values: list[Any], *kinds: type) -> bool:
    """Whether values are of these kinds; a whole number may be missing."""
    return len(values) == len(kinds) and all(
        type(value) is kind or (value is None and kind is int) for value, kind in zip(values, kinds)
    )


def _cannot_save(own: nn.Module, where: str, why: str) -> FileError:
    return FileError(
        f"cannot save this {type(own).__name__} as a folder",
        where=f'"{where}"',
        why=why,
        do="Save its state_dict, and the selection that made it: fxprune.save(selection, path).",
    )


def _no_place(path: str) -> FileError:
    return FileError(
        "cannot load this folder",
        where=f'"{path}" in fxprune.json',
        why="the model that its config makes has no place for it",
        do="Load it with the versions of transformers and fxprune that wrote it.",
    )


def malformed(document: Any) -> str:
    """What is wrong with the form of a document; "" where nothing is."""
    if not isinstance(document, dict):
        return "it is no table"
    for name in ("lengths", "modules", "values"):
        part = document.get(name, {})
        if not isinstance(part, dict):
            return f'"{name}" is no table'
        if name == "modules" and not all(isinstance(entry, list) and entry for entry in part.values()):
            return '"modules" has an entry that is no list'
        if name == "values" and any(not isinstance(values, dict) for values in part.values()):
            return '"values" has an entry that is no table'
    return ""
