"""masks: what is added to the scores of an attention, as a net takes it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxprune.graph.program import Program, fetch_any

from .replay import sizes_for

aten = torch.ops.aten


def with_four_dimensions(mask: Tensor) -> Tensor:
    """A mask [..., queries, keys] as [n or 1, heads or 1, queries or 1, keys or 1]."""
    return mask[(None,) * (4 - mask.dim())]


def put_scores(graph: Graph, mask: Node) -> Node:
    """Nodes that make of a mask what is added to the scores, in four dimensions."""
    value: Tensor = mask.meta["val"]
    node = mask
    if value.dtype == torch.bool:
        node = graph.call_function(aten.where.Scalar, (mask, 0.0, -math.inf))
        node.meta = {"val": value.new_empty(value.shape, dtype=torch.float32)}
    elif value.dtype != torch.float32:
        node = as_dtype(graph, mask, torch.float32)
    for _ in range(4 - value.dim()):
        below = node
        node = graph.call_function(aten.unsqueeze.default, (below, 0))
        node.meta = {"val": below.meta["val"].unsqueeze(0)}
    return node


def as_dtype(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    """The node, or one that is its tensor in this dtype."""
    if node.meta["val"].dtype == dtype:
        return node
    cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta = {**node.meta, "val": node.meta["val"].to(dtype)}
    return cast


def hides_nothing(program: Program, mask: Node) -> bool:
    """Whether a mask is made of constants alone and changes no score."""
    needed: list[Node] = []
    waiting = [mask]
    while waiting:
        node = waiting.pop()
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op not in ("get_attr", "call_function") or node.is_impure() or random or len(needed) > 64:
            return False
        needed.append(node)
        waiting += node.all_input_nodes
    if math.prod(sizes_for(mask)) > 1 << 26:
        return False
    values: dict[Node, Any] = {}
    order = {node: number for number, node in enumerate(mask.graph.nodes)}
    for node in sorted(set(needed), key=order.__getitem__):
        if node.op == "get_attr":
            values[node] = fetch_any(program, str(node.target))
        else:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    found = values[mask]
    return bool(found.all()) if found.dtype == torch.bool else not bool(found.any())
