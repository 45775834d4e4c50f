"""kinds: the types of records that a file may hold, and whether values are what their fields want."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fxprune.capture.entry import EntryCheck, TensorInput
from fxprune.check.compare import CheckRow
from fxprune.emit.report import GroupReport, Report, WeightReport
from fxprune.emit.settings import Settings
from fxprune.lower.layouts.site import Choice, Timing
from fxprune.lower.lower import Lowered
from fxprune.measure.model_timing import Half, ModelTiming
from fxprune.select.mask import PackedMask
from fxprune.select.selection import Fit, Recovery, Selection
from fxprune.shrink.dead.dead import Dead, ZeroSlices

_ALL = (
    CheckRow, Choice, Dead, EntryCheck, Fit, GroupReport, Half, Lowered, ModelTiming, PackedMask, Recovery, Report,
    Selection, Settings, TensorInput, Timing, WeightReport, ZeroSlices,
)  # fmt: skip
KINDS: dict[str, type] = {kind.__name__: kind for kind in _ALL}


def misfit(kind: type, values: Mapping[str, Any]) -> str:
    """Why these values are none for the fields of this kind; nothing if they are."""
    hints = _hints(kind)
    for name, value in values.items():
        if name not in hints:
            return f"a {kind.__name__} has no {name!r}"
        if not conforms(value, hints[name]):
            return f"its {name!r} cannot be {str(value)[:60]!r}"
    missing = [name for name in _required(kind) if name not in values]
    return f"{', '.join(missing)} is missing" if missing else ""


def conforms(value: Any, hint: Any) -> bool:
    """Whether a value, and all that it holds, is of the type that an annotation says."""
    if hint is Any:
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(conforms(value, each) for each in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(conforms(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(conforms, value, args))
    if origin is not None and isinstance(origin, type):
        if not isinstance(value, origin):
            return False
        if issubclass(origin, Mapping):
            of_key, of_value = args if len(args) == 2 else (args[0], int)
            return all(conforms(key, of_key) and conforms(item, of_value) for key, item in value.items())
        return all(conforms(item, args[0]) for item in value) if issubclass(origin, Sequence) else True
    return isinstance(value, hint)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {name: hints[name] for name in _names(kind)}


def _names(kind: Any) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind) if field.init]
    return list(kind._fields)


def _required(kind: Any) -> list[str]:
    if not dataclasses.is_dataclass(kind):
        return [name for name in kind._fields if name not in kind._field_defaults]
    missing = dataclasses.MISSING
    return [
        f.name for f in dataclasses.fields(kind) if f.init and f.default is missing and f.default_factory is missing
    ]
