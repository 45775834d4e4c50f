"""trees: how the arguments and outputs of a model are nested, as JSON, and back.

A class that a tree names is taken from what this process has registered with torch's pytree, from a module that is
imported already, or from transformers, which is imported for it; no other module is imported because a file says so.
"""

from __future__ import annotations

import collections
import importlib
import re
import sys
from typing import Any

from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from fxprune.errors import FileError
from fxprune.graph import compat

from .plain import Reader, Writer

_BUILTIN: dict[str, Any] = {
    kind.__name__: kind
    for kind in (tuple, list, dict, collections.OrderedDict, collections.defaultdict, collections.deque)
}
_TRANSFORMERS = re.compile(r"transformers(\.[a-z0-9_]+)+")


def tree_data(spec: Any, writer: Writer) -> Any:
    """The structure that a spec describes: None is a leaf. Raises FileError where it cannot be written."""
    if spec.is_leaf():
        return None
    children = [tree_data(child, writer) for child in compat.children_of(spec)]
    if pytree.is_namedtuple_class(spec.context) if isinstance(spec.context, type) else False:
        kind = spec.context
        return {"named": _name_of(kind), "fields": list(kind._fields), "children": children}
    name = _name_of(spec.type)
    if _BUILTIN.get(spec.type.__name__) is spec.type:
        name = spec.type.__name__
    return {"of": name, "context": writer.encode(spec.context, f"what a {name} holds"), "children": children}


def tree_from(data: Any, reader: Reader, *, plain: bool = False) -> Any:
    """The spec that `tree_data` described. With `plain` other classes than Python's own become dicts and tuples.

    Raises FileError where a class is needed that cannot be had.
    """
    if data is None:
        return pytree.tree_structure(0)
    if not isinstance(data, dict) or not isinstance(data.get("children"), list):
        raise FileError("cannot read the file", why="a structure of arguments or outputs is broken")
    children = [tree_from(child, reader, plain=plain) for child in data["children"]]
    if "named" in data:
        return _spec(collections.namedtuple, _named(data, plain), children)
    name, context = data.get("of"), reader.decode(data.get("context"))
    if not isinstance(name, str):
        raise FileError("cannot read the file", why="a structure of arguments or outputs has no name")
    if name in _BUILTIN:
        return _spec(_BUILTIN[name], context, children)
    if plain:
        keys = context if isinstance(context, list) and len(context) == len(children) else None
        is_dict = keys is not None and all(isinstance(key, str) for key in keys)
        return _spec(dict if is_dict else tuple, keys if is_dict else None, children)
    return _spec(_class_of(name), context, children)


def _spec(kind: Any, context: Any, children: list[Any]) -> Any:
    keyed = {dict: context, collections.OrderedDict: context}
    if kind is collections.defaultdict:
        keyed[kind] = context[1] if isinstance(context, list) and len(context) == 2 else None
    keys = keyed.get(kind, children)
    if not isinstance(keys, list) or len(keys) != len(children):
        raise FileError("cannot read the file", why=f"a {kind.__name__} of arguments or outputs is broken")
    return pytree.TreeSpec(kind, context, children)


def _name_of(kind: Any) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _named(data: dict[str, Any], plain: bool) -> Any:
    """The class of a named tuple: the one of this name, if it is here and has these fields, or one like it."""
    name, fields = data["named"], data.get("fields")
    if not isinstance(name, str) or not isinstance(fields, list) or len(fields) != len(data["children"]):
        raise FileError("cannot read the file", why="a named tuple of arguments or outputs is broken")
    module, _, leaf = name.partition(":")
    found = vars(sys.modules[module]).get(leaf) if module in sys.modules and not plain else None
    if isinstance(found, type) and pytree.is_namedtuple_class(found) and list(found._fields) == fields:  # pyright: ignore
        return found
    try:
        return collections.namedtuple(leaf.rpartition(".")[2], fields)
    except (TypeError, ValueError) as error:
        raise FileError("cannot read the file", why=f"a named tuple cannot be made: {error}") from error


def _class_of(name: str) -> Any:
    """A class that pytree knows, by its name. Raises FileError where there is none."""
    module, _, leaf = name.partition(":")
    why = "it is not known here"
    if module.split(".")[0] == "transformers" and _TRANSFORMERS.fullmatch(module):
        try:
            importlib.import_module(module)
        except ImportError as error:
            why = f"{module} cannot be imported ({error})"
        compat.register_foreign_outputs()
    for kind in (*pytree.SUPPORTED_NODES, *fx_pytree.SUPPORTED_NODES):
        if isinstance(kind, type) and (kind.__module__, kind.__qualname__) == (module, leaf):
            return kind
    raise FileError(
        "cannot make the inputs or outputs of the saved model",
        where=f"{module}.{leaf}",
        why=why,
        do='Install or import what defines it first, or take plain dicts and tuples: load(..., outputs="plain").',
    )
