"""graphs: a graph and its calling convention as plain data, and back."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection
from typing import Any

from torch.fx import Graph, Node
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.fx.node import map_aggregate, map_arg

from fxprune.errors import FileError

from .ops import name_of, op_of
from .plain import Read, Reader, Writer
from .trees import tree_data, tree_from

# torch writes Python from a graph: what stands in it as it is must not end a string or a name.
_PATH = re.compile(r"""[^"'\\\x00-\x1f]+""")
_KINDS = ("placeholder", "get_attr", "call_function", "call_module", "output")


def graph_data(graph: Graph, writer: Writer) -> dict[str, Any]:
    """The nodes in order, as [op, name, target, args, kwargs], and how the graph is called."""
    places = {node: place for place, node in enumerate(graph.nodes)}

    def plain(argument: Any, node: Node) -> Any:
        read = map_arg(argument, lambda n: Read(places[n]))  # pyright: ignore[reportArgumentType]
        return writer.encode(read, f"node {node.name}")

    nodes = []
    for node in graph.nodes:
        if node.op not in _KINDS:
            raise FileError("cannot save the result", where=f"node {node.name}", why=f"it is a {node.op}")
        target = name_of(node.target, node.name) if node.op == "call_function" else str(node.target)
        nodes.append([node.op, node.name, target, plain(node.args, node), plain(node.kwargs, node)])
    return {"nodes": nodes, "call": _call_data(graph._codegen, writer)}


def graph_from(data: Any, reader: Reader, *, trusted: Collection[str] = (), plain: bool = False) -> Graph:
    """The graph that `graph_data` described; with `plain` its outputs are dicts and tuples.

    `trusted` are namespaces of operators beside ATen's and fxprune's. Raises FileError.
    """
    graph = Graph()
    nodes: list[Node] = []

    def live(argument: Any) -> Any:
        return map_aggregate(argument, lambda a: nodes[a.place] if isinstance(a, Read) else a)

    try:
        for kind, name, target, args, kwargs in data["nodes"]:
            args, kwargs = live(reader.decode(args)), live(reader.decode(kwargs))
            _check_node(kind, name, target, args, kwargs)
            called = op_of(target, trusted) if kind == "call_function" else target
            nodes.append(graph.create_node(kind, called, args, kwargs, name=name))
        if not nodes or nodes[-1].op != "output" or any(node.op == "output" for node in nodes[:-1]):
            raise ValueError("the output is not its end")
        graph._codegen = _call_from(data["call"], reader, plain)
        inputs = graph.find_nodes(op="placeholder")
        info = getattr(graph._codegen, "pytree_info", None)
        if info is not None and info.in_spec.num_leaves != len(inputs):
            raise ValueError("it takes another number of inputs")
        graph.lint()
    except FileError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise FileError("cannot read the file", why=f"its graph is broken: {error}") from error
    return graph


def _check_node(kind: Any, name: Any, target: Any, args: Any, kwargs: Any) -> None:
    if kind not in _KINDS or not isinstance(name, str) or not isinstance(target, str):
        raise ValueError(f"there is no node {kind!r} {name!r}")
    if kind == "placeholder" and (not _is_word(target) or args or kwargs):
        raise ValueError(f"an input cannot be called {target!r}")
    if kind in ("get_attr", "call_module") and not _PATH.fullmatch(target):
        raise ValueError(f"a part cannot be called {target!r}")
    if not isinstance(args, tuple) or not isinstance(kwargs, dict) or not all(map(_is_word, kwargs)):
        raise ValueError(f"the arguments of {name!r} are broken")


def _is_word(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def _call_data(codegen: Any, writer: Writer) -> Any:
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not _PyTreeCodeGen:
        raise FileError("cannot save the result", why=f"its graph is called through a {type(codegen).__name__}")
    info = codegen.pytree_info
    specs = [None if spec is None else [tree_data(spec, writer)] for spec in (info.in_spec, info.out_spec)]
    return {"names": list(info.orig_args), "inputs": specs[0], "outputs": specs[1]}


def _call_from(data: Any, reader: Reader, plain: bool) -> CodeGen:
    if data is None:
        return CodeGen()
    names, (inputs,) = data["names"], data["inputs"]
    given = tree_from(inputs, reader)
    outputs = None if data["outputs"] is None else tree_from(data["outputs"][0], reader, plain=plain)
    if not isinstance(names, list) or not all(map(_is_word, names)):
        raise ValueError("its arguments have no names")
    words = [name for name in names if name != "self"]
    positional, keywords = given.child(0), given.child(1)
    if len(set(names)) != len(names) or len(words) != positional.num_children + keywords.num_children:
        raise ValueError("its arguments are not those of its inputs")
    if not all(map(_is_word, keywords.context or [])):
        raise ValueError("its keyword arguments have no names")
    return _PyTreeCodeGen(_PyTreeInfo(names, given, outputs))
