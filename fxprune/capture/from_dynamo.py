"""from_dynamo: what Dynamo hands a backend -> Program. The second door into the same stages.

Dynamo gives torch-level IR whose parameters and buffers are placeholders, with real tensors for them among the example
inputs. The graph is traced to ATen under Dynamo's own fake values, so that conditions on sizes become its guards.
Parameters are bound as get_attr nodes under the names they have in the user's model, for the stages to work on, and
unbound again: what the stages did not change is an input of the call, and so always what it is at that call.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fxprune.graph import compat
from fxprune.graph.memory import writes
from fxprune.graph.program import Program, fetch_any

from .capture import Capture
from .entry import EntryCheck

_WHOLE_LAYERS = {
    torch.ops.aten._transformer_encoder_layer_fwd.default,
    torch.ops.aten._native_multi_head_attention.default,
}
# In the meta of a program's nodes: the node of the traced graph that they stand for.
_TRACED = "traced"


@dataclasses.dataclass(frozen=True)
class Unbound:
    """A program that takes parameters and buffers as inputs, and after them the tensors that the stages made.

    used     positions, among Dynamo's inputs, of those that it takes
    tensors  what the stages made, in the order in which it takes them
    live     names in the program before of what is computed from its inputs again
    """

    program: Program
    used: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    live: frozenset[str]

    def arguments(self, inputs: Sequence[Any]) -> list[Any]:
        """What to call the program with."""
        return [*(inputs[i] for i in self.used), *self.tensors]


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
        self.names = _unique({i: _source_name(placeholders[i]) for i in self.static}, placeholders)
        self.values = [_fake(node, value) for node, value in zip(placeholders, example_inputs, strict=True)]
        self.float_values = {i: _float(placeholders[i], example_inputs[i]) for i in self.floats}
        self._graph = _trace(gm, self.values, self.float_values)
        self._places = {node: i for i, node in enumerate(self._graph.graph.find_nodes(op="placeholder"))}

    @property
    def writes_to_state(self) -> bool:
        """Whether a call writes to parameters or buffers, so that these are no constants even within a call."""
        kept = {node for node, i in self._places.items() if i in self.names}
        written = [base for node in self._graph.graph.nodes for base in writes(node)]
        return any(base in kept or base.op == "get_attr" for base in written)

    @property
    def hides_weights(self) -> bool:
        """Whether the graph holds a whole layer as one op, as the fast path of nn.TransformerEncoderLayer is."""
        return any(node.target in _WHOLE_LAYERS for node in self._graph.graph.nodes)

    def sources(self, node: Node) -> tuple[list[int], list[Tensor]]:
        """What a get_attr node of a program came from: positions of inputs, and tensors that the graph holds."""
        leaves = [n for n in self._from_constants([node.meta[_TRACED]]) if n.op != "call_function"]
        held = [fetch_any(self._graph, str(n.target)) for n in leaves if n.op == "get_attr"]
        return [self._places[n] for n in leaves if n in self._places], held

    def _from_constants(self, nodes: Iterable[Node]) -> list[Node]:
        """These nodes of the traced graph and all that they are computed from, in order."""
        found: set[Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += node.all_input_nodes
        return [node for node in self._graph.graph.nodes if node in found]

    def unbind(self, program: Program, *, keep_folded: bool) -> Unbound:
        """A program that `bind` and the stages made, with inputs for parameters again.

        What was folded out of them is computed in the call as Dynamo's graph does, unless `keep_folded`; what was
        packed is among the tensors.
        """
        live = {
            node: node.meta[_TRACED]
            for node in program.graph.find_nodes(op="get_attr")
            if _TRACED in node.meta and not (keep_folded and node.meta[_TRACED].op == "call_function")
        }
        graph, held = Graph(), nn.Module()
        again: dict[Node, Node] = {}
        for node, place in self._places.items():
            if place not in self.floats:
                again[node] = graph.node_copy(node)
        made = [n for n in program.graph.find_nodes(op="get_attr") if n not in live]
        targets = dict.fromkeys(str(node.target) for node in made)
        inputs = {target: graph.placeholder(f"made_{index}") for index, target in enumerate(targets)}
        for node in self._from_constants(live.values()):
            if node.op == "get_attr":
                held.register_buffer(node.name, fetch_any(self._graph, str(node.target)))
                again[node] = graph.get_attr(node.name)
            elif node not in again:
                again[node] = graph.node_copy(node, lambda n: again[n])
        copied: dict[Node, Node] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder" or node in live:
                copied[node] = again[node.meta[_TRACED]]
            elif node.op == "get_attr":
                copied[node] = inputs[str(node.target)]
            else:
                copied[node] = graph.node_copy(node, lambda n: copied[n])
        for node in [again[n] for n in self._places if n in again and not again[n].users]:
            graph.erase_node(node)
        used = tuple(i for n, i in self._places.items() if n in again and again[n].users)
        for node in graph.nodes:
            node.meta.pop(_TRACED, None)
        graph.lint()
        unbound: Program = torch.fx.GraphModule(held, graph, class_name="Program")
        return Unbound(
            unbound.eval(),
            used,
            tuple(fetch_any(program, t).detach() for t in targets),
            frozenset(str(node.target) for node in live),
        )

    def bind(self, inputs: Sequence[Any]) -> Capture:
        """A program over the parameters and buffers among `inputs`; the placeholders left are the free inputs."""
        root, graph = nn.Module(), torch.fx.Graph()
        copied: dict[Node, Node] = {}
        for index, node in enumerate(self._graph.graph.find_nodes(op="placeholder")):
            if index in self.names:
                _assign(root, self.names[index], inputs[index])
                copied[node] = graph.get_attr(self.names[index])
            elif index in self.free:
                copied[node] = graph.node_copy(node)
        for node in self._graph.graph.nodes:
            if node.op == "get_attr":
                _assign(root, f"_constant_{node.name}", fetch_any(self._graph, str(node.target)))
                copied[node] = graph.get_attr(f"_constant_{node.name}")
            elif node.op != "placeholder":
                copied[node] = graph.node_copy(node, lambda n: copied[n])
        for node, copy in copied.items():
            copy.meta = {**node.meta, _TRACED: node}
        program: Program = torch.fx.GraphModule(root, graph, class_name="Program")
        program.eval()
        names = tuple(n.name for n in graph.find_nodes(op="placeholder"))
        return Capture(program, EntryCheck(names, names, (None,) * len(names), ()), {}, [])


def _trace(gm: torch.fx.GraphModule, values: Sequence[Any], floats: dict[int, float]) -> torch.fx.GraphModule:
    constant = _without_items(gm, lambda index, node: floats.get(index))
    with torch.no_grad(), compat.real_tensors_beside(values):
        return make_fx(constant, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)


def with_floats(gm: torch.fx.GraphModule, floats: Sequence[int]) -> torch.fx.GraphModule:
    """A copy of a Dynamo graph that takes Python floats at these positions."""
    return _without_items(gm, lambda index, node: node if index in floats else None)


def _without_items(gm: torch.fx.GraphModule, stands_in: Callable[[int, Node], Any]) -> torch.fx.GraphModule:
    """A copy in which something else stands for the `.item()` of the placeholders that it is given for."""
    bound = torch.fx.Graph()
    copied: dict[Node, Any] = {}
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        copied[node] = bound.placeholder(node.name)
        value = stands_in(index, copied[node])
        for user in list(node.users) if value is not None else []:
            copied[user] = value
    for node in gm.graph.nodes:
        if node.op != "placeholder" and node not in copied:
            copied[node] = bound.node_copy(node, lambda n: copied[n])
    return torch.fx.GraphModule(gm, bound)


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


def _unique(names: dict[int, str], placeholders: Sequence[Node]) -> dict[int, str]:
    """The names, and the placeholder's own where two modules that one function calls have a parameter of one name."""
    taken: set[str] = set()
    for i, name in names.items():
        if any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in taken):
            names[i] = placeholders[i].name
        taken.add(names[i])
    return names


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
