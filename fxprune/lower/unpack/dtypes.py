"""dtypes: the dtype of each node's tensor, of a program whose nodes may have no fake values."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.graph.program import Program, fetch_any

aten = torch.ops.aten
_AS_THE_SECOND = {aten.type_as.default, aten.to.other}


def dtypes_of(program: Program) -> dict[Node, torch.dtype | None]:
    """Node -> the dtype of its tensor; None where that is not known, or it has none.

    Inputs have what the entry check of a result says. An op that names no dtype has that of its floating inputs, which
    is true of ops whose result is floating, and asked of no others.
    """
    entry = program.meta.get("entry")
    inputs = iter(entry.inputs if entry is not None else ())
    found: dict[Node, torch.dtype | None] = {}
    for node in program.graph.nodes:
        given = next(inputs, None) if node.op == "placeholder" else None
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            found[node] = value.dtype
        elif node.op == "placeholder":
            found[node] = getattr(given, "dtype", None)
        elif node.op == "get_attr":
            found[node] = getattr(fetch_any(program, str(node.target)), "dtype", None)
        else:
            found[node] = _result(node, found)
    return found


def _result(node: Node, found: Mapping[Node, torch.dtype | None]) -> torch.dtype | None:
    named = [each for each in (*node.args, *node.kwargs.values()) if isinstance(each, torch.dtype)]
    if named:
        return named[0]
    sources = node.all_input_nodes
    if node.target in _AS_THE_SECOND:
        return found[sources[-1]]
    # A packed op has its tensors in dtypes of its own.
    if sources and (node.target is operator.getitem or _is_packed(node.target)):
        return found[sources[0]]
    floating = [dtype for source in sources if (dtype := found[source]) is not None and dtype.is_floating_point]
    result = floating[0] if floating else None
    for dtype in floating[1:]:
        result = torch.promote_types(result, dtype)  # pyright: ignore[reportArgumentType]
    return result


def _is_packed(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "fxprune"
