"""ops: what a node of a saved graph may call, by name.

Operators of ATen, of fxprune and of namespaces that the reader of a file trusts are what torch's dispatcher says is
registered (which TorchScript's own, such as aten::save, are not); all else stands in a table. Operators that reach for
files or for the memory of others are left out.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Collection
from typing import Any

import torch

from fxprune.emit.trainable.module import begin_batch, cumulative_momentum
from fxprune.errors import FileError
from fxprune.kernels.masked_linear import masked_linear

OWN = ("aten", "fxprune", "prims")
_OPERATORS = (
    "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "index", "invert", "le", "lshift", "lt", "mod",
    "mul", "ne", "neg", "not_", "or_", "pos", "pow", "rshift", "sub", "truediv", "xor",
)  # fmt: skip
_MATH = ("ceil", "floor", "trunc", "sqrt", "log2", "exp", "isinf", "isnan")
_SYMBOLIC = ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum", "sym_sqrt")
_HIGHER = ("cond", "while_loop", "wrap_with_set_grad_enabled", "wrap_with_autocast", "map_impl", "scan")
# It opens a file.
_FORBIDDEN = {"from_file"}
_FORBIDDEN_TYPES = {"Storage", "Stream"}
# The unsafe ones look at no bounds, but for these, whose name means something else.
_SAFE = {"_unsafe_view", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk"}
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _functions() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {f"operator.{name}": getattr(operator, name) for name in _OPERATORS}
    found |= {f"math.{name}": getattr(math, name) for name in _MATH}
    found |= {f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC if hasattr(torch, name)}
    found |= {"builtins.round": round, "builtins.max": max, "builtins.min": min}
    found |= {f"fxprune.{function.__name__}": function for function in (begin_batch, cumulative_momentum)}
    return found | {"fxprune.masked_linear": masked_linear}


_FUNCTIONS = _functions()
_NAMES = {function: name for name, function in _FUNCTIONS.items()}


def name_of(target: Any, where: str) -> str:
    """The name of what a node calls. Raises FileError where a file has none for it."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator) and target.name() in _HIGHER:
        return f"higher_order.{target.name()}"
    if callable(target) and target in _NAMES:
        return _NAMES[target]
    raise FileError(
        "cannot save the result",
        where=f"node {where}",
        why=f"it calls {getattr(target, '__name__', target)!r}, which is no operator that a file can name",
        do="Register it with torch.library.custom_op, and transform the model again.",
    )


def op_of(name: str, trusted: Collection[str] = ()) -> Callable[..., Any]:
    """What has this name. `trusted` are namespaces of operators beside ATen's and fxprune's. Raises FileError."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = name.split(".")
    if parts[0] == "higher_order" and len(parts) == 2 and parts[1] in _HIGHER:
        return getattr(torch.ops.higher_order, parts[1])
    if len(parts) == 3 and all(map(_WORD.fullmatch, parts)):
        space, packet, overload = parts
        if space not in (*OWN, *trusted):
            raise FileError(
                "cannot load the saved model",
                where=f"operator {space}::{packet}",
                why="it is none of ATen or fxprune, and the file does not decide what is run",
                do=f"If you trust the file, import what registers the operator and load with operators=[{space!r}].",
            )
        return _registered(space, packet, overload)
    raise FileError("cannot read the file", where=f"operator {name!r}", why="there is no such operator")


@functools.cache
def _registered(space: str, packet: str, overload: str) -> torch._ops.OpOverload:
    full, of = f"{space}::{packet}", "" if overload == "default" else overload
    if f"{full}.{of}".rstrip(".") not in torch._C._dispatch_get_all_op_names():
        why = "this version of torch, or of fxprune, has none of this name"
        why = why if space in OWN else "nothing that is imported here registers it"
        raise FileError("cannot load the saved model", where=f"operator {full}.{overload}", why=why)
    types = {str(argument.type) for argument in torch._C._get_schema(full, of).arguments}
    is_unsafe = "unsafe" in packet and packet not in _SAFE
    if packet in _FORBIDDEN or is_unsafe or not types.isdisjoint(_FORBIDDEN_TYPES):
        why = "it reaches for files, or for memory that is not its own"
        raise FileError("cannot load the saved model", where=f"operator {full}", why=why)
    # The dispatcher has it, so this finds an operator and nothing else.
    return getattr(getattr(getattr(torch.ops, space), packet), overload)
