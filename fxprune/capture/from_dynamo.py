"""from_dynamo: what Dynamo hands a backend -> Program. The second door into the same stages.

Dynamo gives torch-level IR whose parameters and buffers are placeholders, with real tensors for them among the example
inputs. The graph is traced to ATen under Dynamo's own fake values, so that conditions on sizes become its guards, and
parameters are bound as get_attr nodes under the names they have in the user's model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from fxprune.graph.program import Program

from .capture import Capture
from .entry import EntryCheck


class Traced:
    """A Dynamo graph as ATen ops, all of Dynamo's inputs still placeholders; `bind` makes programs of it.

    `static` are the positions of parameters and buffers among the inputs, `floats` those of Python floats (which
    Dynamo hands over as 0-d float64 tensors), `free` all others.
    """

    def __init__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        placeholders = gm.graph.find_nodes(op="placeholder")
        self.static = [i for i, value in enumerate(example_inputs) if _is_static(value)]
        self.floats = [i for i, node in enumerate(placeholders) if i not in self.static and _only_item(node)]
        self.free = [i for i in range(len(placeholders)) if i not in self.static and i not in self.floats]
        self.names = {i: _source_name(placeholders[i]) for i in self.static}
        self.values = [_fake(node, value) for node, value in zip(placeholders, example_inputs, strict=True)]
        self.float_values = {i: _float(placeholders[i], example_inputs[i]) for i in self.floats}
        self._graph = _trace(gm, self.values, self.float_values)

    def bind(self, inputs: Sequence[Any]) -> Capture:
        """A program over the parameters and buffers among `inputs`; the placeholders left are the free inputs."""
        root, graph = nn.Module(), torch.fx.Graph()
        copied: dict[Node, Node] = {}
        for index, node in enumerate(self._graph.graph.find_nodes(op="placeholder")):
            if index in self.names:
                _assign(root, self.names[index], inputs[index])
                copied[node] = graph.get_attr(self.names[index])
                copied[node].meta = dict(node.meta)
            elif index in self.free:
                copied[node] = graph.node_copy(node)
        for node in self._graph.graph.nodes:
            if node.op == "get_attr":
                _assign(root, f"_constant_{node.name}", getattr(self._graph, str(node.target)))
                copied[node] = graph.get_attr(f"_constant_{node.name}")
                copied[node].meta = dict(node.meta)
            elif node.op != "placeholder":
                copied[node] = graph.node_copy(node, lambda n: copied[n])
        program: Program = torch.fx.GraphModule(root, graph, class_name="Program")
        program.eval()
        names = tuple(n.name for n in graph.find_nodes(op="placeholder"))
        return Capture(program, EntryCheck(names, names, (None,) * len(names), ()), {}, [])


def _trace(gm: torch.fx.GraphModule, values: Sequence[Any], floats: dict[int, float]) -> torch.fx.GraphModule:
    bound = torch.fx.Graph()
    copied: dict[Node, Any] = {}
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        copied[node] = bound.placeholder(node.name)
        for user in list(node.users) if index in floats else []:
            copied[user] = floats[index]
    for node in gm.graph.nodes:
        if node.op != "placeholder" and node not in copied:
            copied[node] = bound.node_copy(node, lambda n: copied[n])
    constant = torch.fx.GraphModule(gm, bound)
    with torch.no_grad():
        return make_fx(constant, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)


def _is_static(value: Any) -> bool:
    """Whether Dynamo marked an input as a parameter or buffer."""
    return isinstance(value, nn.Parameter) or (
        isinstance(value, Tensor) and getattr(value, "_dynamo_static_input_type", None) is not None
    )


def _only_item(node: Node) -> bool:
    value = node.meta.get("example_value")
    is_scalar = isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.float64
    return is_scalar and all(u.op == "call_method" and u.target == "item" for u in node.users)


def _float(node: Node, value: Any) -> float:
    """The Python float behind a 0-d placeholder: Dynamo's fake value remembers its constant."""
    constant = getattr(node.meta["example_value"], "constant", None)
    return float(constant if constant is not None else value)


def _fake(node: Node, value: Any) -> Any:
    fake = node.meta.get("example_value", value)
    return fake.data if isinstance(fake, nn.Parameter) else fake


def _source_name(node: Node) -> str:
    """`a.weight` from Dynamo's source `L['self']._modules['a']._parameters['weight']`, else the placeholder's name."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    text = str(name() if callable(name) else name)
    return ".".join(re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text)) or node.name


def _assign(root: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(value, nn.Parameter):
        root.register_parameter(leaf, value)
    else:
        root.register_buffer(leaf, value)
