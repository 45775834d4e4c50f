"""plain: values as JSON, with tensors beside it, and back.

What a file says is read as one of the forms below or not at all: no name in it is looked up anywhere but in tables.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from fxprune.errors import FileError
from fxprune.graph.note import Note
from fxprune.select.mask import PackedMask

from .kinds import KINDS, misfit

# A value of one of these forms is a dict with one key, which says what it is; lists and dicts have keys of their own.
_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, list, dict, tuple, set, type(None))}


def _constants(kind: type) -> dict[str, Any]:
    found = {name: value for name, value in vars(torch).items() if isinstance(value, kind)}
    # Some have two names, as torch.half has, of which they print one.
    return {str(value).removeprefix("torch."): value for value in found.values()}


_NAMED = {kind.__name__: _constants(kind) for kind in _CONSTANTS}


@dataclasses.dataclass(frozen=True)
class Read:
    """The node at this place of a graph, as an argument."""

    place: int


class Writer:
    """Turns values into JSON's; tensors go into `tensors` under the path of the value that holds them, once each.

    `trees` writes the structure of arguments and outputs.
    """

    def __init__(self, trees: Callable[[Any, Writer], Any]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._trees = trees
        self._keys: dict[tuple[object, ...], str] = {}

    def encode(self, value: Any, path: str) -> Any:
        """The value as JSON has it. `path` is its name, for its tensors and for errors. Raises FileError."""
        if value is None or (isinstance(value, (bool, str)) and type(value) in (bool, str)):
            return value
        if type(value) is int:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, Note):
            return {"note": [str(value), value.level]}
        if isinstance(value, Tensor):
            return {"tensor": self.put(value, path)}
        if type(value).__name__ in KINDS and type(value) is KINDS[type(value).__name__]:
            return {type(value).__name__: self._fields(value, path)}
        if isinstance(value, Read):
            return {"node": value.place}
        if isinstance(value, torch.Size):
            return {"Size": list(value)}
        if isinstance(value, (list, tuple, set, frozenset)) and not hasattr(value, "_fields"):
            items = sorted(value) if isinstance(value, (set, frozenset)) else value
            encoded = [self.encode(item, f"{path}.{place}") for place, item in enumerate(items)]
            return encoded if isinstance(value, list) else {_form_of(value): encoded}
        if isinstance(value, Mapping):
            pairs = [[self.encode(key, path), self.encode(item, f"{path}.{key}")] for key, item in value.items()]
            return {"Counter" if isinstance(value, Counter) else "dict": pairs}
        if isinstance(value, slice):
            return {"slice": [self.encode(part, path) for part in (value.start, value.stop, value.step)]}
        if value is Ellipsis:
            return {"ellipsis": 0}
        if isinstance(value, complex):
            return {"complex": [self.encode(value.real, path), self.encode(value.imag, path)]}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        for kind in _CONSTANTS:
            if isinstance(value, kind):
                return {kind.__name__: str(value).removeprefix("torch.")}
        if isinstance(value, type) and _TYPES.get(value.__name__) is value:
            return {"type": value.__name__}
        if isinstance(value, TreeSpec):
            return {"tree": self._trees(value, self)}
        raise FileError(
            f"cannot save {path}",
            why=f"it is a {type(value).__module__}.{type(value).__qualname__}, for which the file has no form",
            do="Keep it in memory, or save the parts that are plain values and tensors.",
        )

    def put(self, tensor: Tensor, path: str) -> str:
        """The key of a tensor among `tensors`; tensors that are one in memory have one."""
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and same in self._keys:
            return self._keys[same]
        key = path
        while key in self.tensors:
            key += "_"
        self.tensors[key] = tensor
        self._keys[same] = key
        return key

    def _fields(self, value: Any, path: str) -> dict[str, Any]:
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value) if field.init]
        else:
            names = list(value._fields)
        return {name: self.encode(getattr(value, name), f"{path}.{name}") for name in names}


class Reader:
    """Turns what a Writer made back into values, on the devices that `place` says.

    Raises FileError for anything else.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        trees: Callable[[Any, Reader], Any],
        place: Callable[[torch.device], torch.device] = lambda device: device,
    ) -> None:
        self._tensors, self._trees, self._place = tensors, trees, place

    def decode(self, data: Any) -> Any:
        """The value."""
        if isinstance(data, list):
            return [self.decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        if len(data) != 1:
            raise _unreadable(data)
        ((form, inner),) = data.items()
        try:
            return self._formed(form, inner)
        except FileError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise _unreadable(data) from error

    def tensor(self, key: Any) -> Tensor:
        """The tensor of this key."""
        if not isinstance(key, str) or key not in self._tensors:
            raise FileError("cannot read the file", why=f"it speaks of a tensor {key!r}, which it does not hold")
        return self._tensors[key]

    def _formed(self, form: str, inner: Any) -> Any:
        if form in KINDS:
            return self._made(KINDS[form], inner)
        if form in _NAMED:
            return _NAMED[form][inner]
        match form:
            case "tensor":
                return self.tensor(inner)
            case "float" if inner in ("nan", "inf", "-inf"):
                return float(inner)
            case "note":
                text, level = inner
                if not isinstance(text, str) or level not in ("info", "missed", "fallback", "warning"):
                    raise ValueError(level)
                return Note(text, level)
            case "node" if type(inner) is int:
                return Read(inner)
            case "Size":
                return torch.Size(inner)
            case "tuple":
                return tuple(self.decode(list(inner)))
            case "set":
                return set(self.decode(list(inner)))
            case "dict" | "Counter":
                pairs = {self.decode(key): self.decode(value) for key, value in inner}
                return Counter(pairs) if form == "Counter" else pairs
            case "slice":
                start, stop, step = inner
                return slice(self.decode(start), self.decode(stop), self.decode(step))
            case "ellipsis":
                return Ellipsis
            case "complex":
                real, imaginary = inner
                return complex(self.decode(real), self.decode(imaginary))
            case "device":
                return self._place(torch.device(inner))
            case "type":
                return _TYPES[inner]
            case "tree":
                return self._trees(inner, self)
        raise LookupError(form)

    def _made(self, kind: type, inner: Mapping[str, Any]) -> Any:
        values = {name: self.decode(value) for name, value in inner.items()}
        if why := misfit(kind, values):
            raise FileError("cannot read the file", where=kind.__name__, why=why)
        made = kind(**values)
        if isinstance(made, PackedMask) and (made.bits.dtype, len(made.bits)) != (torch.uint8, -(-made.numel() // 8)):
            raise FileError("cannot read the file", why=f"a mask of {list(made.shape)} has not as many bits")
        return made


def _form_of(value: Any) -> str:
    return "tuple" if isinstance(value, tuple) else "set"


def _unreadable(data: Any) -> FileError:
    return FileError(
        "cannot read the file",
        why=f"it holds a value of a form that is unknown, or broken: {json.dumps(data)[:80]}",
        do="Save it again with this version of fxprune.",
    )
