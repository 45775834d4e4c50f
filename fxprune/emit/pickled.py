"""pickled: a result and its graph as plain data that pickles, and back.

torch pickles a GraphModule as source code and traces that again: ops that make a tensor of a symbolic size fail, named
tuples become plain ones, and what hangs on attributes of the module (such as `training`) and names of nodes are lost.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg


@dataclasses.dataclass(frozen=True)
class _Read:
    """The node at this place of the graph, as an argument."""

    place: int


@dataclasses.dataclass(frozen=True)
class _Op:
    """A torch operator by name; operators themselves do not pickle."""

    name: str


Parts = tuple[dict[str, Any], list[tuple[Any, ...]], Any]


def parts_of(module: torch.fx.GraphModule) -> Parts:
    """What a result is rebuilt from: its attributes, its nodes and its calling convention."""
    state = dict(vars(module))
    graph: Graph = state.pop("_graph")
    # Compiled code does not pickle; who loads a result compiles it anew.
    for code in ("_compiled_call_impl", "_run"):
        state.pop(code, None)
    return state, graph_data(graph), graph._codegen


def rooted(state: dict[str, Any], nodes: list[tuple[Any, ...]], codegen: Any) -> tuple[nn.Module, Graph]:
    """A module with the attributes of a result, and its graph."""
    root, graph = nn.Module(), graph_from(nodes)
    root.__dict__ = state
    graph._codegen = codegen
    return root, graph


def graph_data(graph: Graph) -> list[tuple[Any, ...]]:
    """(op, name, target, args, kwargs) of every node in order."""
    places = {node: place for place, node in enumerate(graph.nodes)}

    def plain(argument: Any) -> Any:
        return map_arg(argument, lambda n: _Read(places[n]))  # pyright: ignore[reportArgumentType]

    return [(n.op, n.name, _target_data(n.target), plain(n.args), plain(n.kwargs)) for n in graph.nodes]


def graph_from(data: list[tuple[Any, ...]]) -> Graph:
    """The graph that `graph_data` described."""
    graph = Graph()
    nodes: list[Node] = []

    def live(argument: Any) -> Any:
        return map_aggregate(argument, lambda a: nodes[a.place] if isinstance(a, _Read) else a)

    for op, name, target, args, kwargs in data:
        nodes.append(graph.create_node(op, _target_from(target), live(args), live(kwargs), name=name))
    return graph


def _target_data(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return _Op(str(target))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _Op(f"higher_order.{target.__name__}")
    return target


def _target_from(target: Any) -> Any:
    if not isinstance(target, _Op):
        return target
    value: Any = torch.ops
    for part in target.name.split("."):
        value = getattr(value, part)
    return value
