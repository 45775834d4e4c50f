"""pickled: a result and its graph as plain data that pickles, and back.

torch pickles a GraphModule as source code and traces that again: ops that make a tensor of a symbolic size fail, named
tuples become plain ones, and what hangs on attributes of the module (such as `training`) and names of nodes are lost.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg

from fxprune.errors import FileError


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


def reduced(rebuild: Callable[..., nn.Module], module: torch.fx.GraphModule) -> tuple[Any, ...]:
    """What `__reduce__` of a result returns: first of all what refuses a torch.load that takes tensors alone."""
    return _remade, (_TensorsAlone(), rebuild, *parts_of(module))


def _remade(_: None, rebuild: Callable[..., nn.Module], *parts: Any) -> nn.Module:
    _refuse_in(sys._getframe(1))
    return rebuild(*parts)


class _TensorsAlone:
    """Pickles as a call of `refuse_tensors_alone`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return refuse_tensors_alone, ()


def refuse_tensors_alone() -> None:
    """Nothing, but where torch.load(weights_only=True), its default, reads a pickled result: raises FileError there."""
    _refuse_in(sys._getframe(1))


def _refuse_in(caller: types.FrameType) -> None:
    if caller.f_globals.get("__name__") == "torch._weights_only_unpickler":
        raise FileError(
            "cannot load a result of transform by torch.load as it is by default",
            why="that takes tensors alone, and a result is a graph as well",
            do="Save it by fxprune.save(result, path) and load it by fxprune.load(path), without pickle; or say "
            "torch.load(path, weights_only=False) if you trust the file, for unpickling it can run any code.",
        )


# This torch.load may call; what is behind it, it may not.
torch.serialization.add_safe_globals([refuse_tensors_alone, _remade])


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
