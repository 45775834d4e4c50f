"""regions: a graph as one list of ops, with the bodies of its gradient and autocast regions in their places.

Export puts the ops under `torch.no_grad()` or `torch.autocast` into a graph of their own behind a higher-order op.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxprune.graph.program import fetch_any

_GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_ASSERTIONS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One op: whether it stands under no_grad, under which autocasts, and whether it is in the outer graph."""

    node: Node
    no_grad: bool
    context: tuple[Any, ...]
    is_outer: bool


class Flat:
    """The ops of a graph that its outputs need, in order. What only hands values on is in no step: see `resolve`.

    `attributes` are the get_attr nodes, with name and value; the name is empty inside of a region.
    """

    def __init__(self, module: GraphModule) -> None:
        self.attributes: dict[Node, tuple[str, Any]] = {}
        self.out_spec = getattr(getattr(module.graph._codegen, "pytree_info", None), "out_spec", None)
        self._stands_for: dict[Node, Any] = {}
        self._outputs: dict[Node, Any] = {}
        self.steps: list[Step] = []
        self._graph = module.graph
        self._names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        self._add(module, no_grad=False, context=(), is_outer=True)
        self.steps = self._needed()

    def resolve(self, value: Any) -> Any:
        """The node that computes a value, whatever regions it was handed through."""
        while isinstance(value, Node) and value in self._stands_for:
            value = self._stands_for[value]
        return value

    def name_of(self, value: Any) -> str:
        """The name of the parameter or buffer that a value is, or an empty string."""
        return self.attributes.get(self.resolve(value), ("", None))[0] if isinstance(value, Node) else ""

    def parameters(self) -> list[list[str]]:
        """The parameters that the steps read, each by all of its names."""
        read = {self.resolve(node) for step in self.steps for node in step.node.all_input_nodes}
        values = {id(self.attributes[node][1]) for node in read if node in self.attributes}
        return [names for tensor, names in self._names.items() if tensor in values]

    def outer(self, nodes: Collection[Node]) -> list[Node]:
        """The nodes of the outer graph that are these, or what regions hand out of them."""
        handed = [n for n in self._stands_for if n.graph is self._graph and self.resolve(n) in nodes]
        return [n for n in nodes if n.graph is self._graph] + handed

    def _add(self, module: GraphModule, *, no_grad: bool, context: tuple[Any, ...], is_outer: bool) -> None:
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self.attributes[node] = (str(node.target) if is_outer else "", fetch_any(module, str(node.target)))
            elif node.target in (_GRADIENTS, _AUTOCAST):
                self._enter(node, no_grad, context)
            elif node.op == "call_function" and node.args and node.args[0] in self._outputs:
                # Always a getitem: a region returns a tuple.
                self._stands_for[node] = self._outputs[node.args[0]][node.args[1]]
            elif node.op == "call_module" or node.target in _ASSERTIONS:
                continue
            elif is_outer or node.op not in ("placeholder", "output"):
                self.steps.append(Step(node, no_grad, context, is_outer))

    def _enter(self, region: Node, no_grad: bool, context: tuple[Any, ...]) -> None:
        at = next(i for i, a in enumerate(region.args) if isinstance(a, Node))
        settings, inputs = region.args[:at], region.args[at + 1 :]
        body = self.attributes[self.resolve(region.args[at])][1]
        for inner, outer in zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True):
            self._stands_for[inner] = outer
        if region.target is _GRADIENTS:
            no_grad = not settings[0]
        else:
            context = (*context, settings)
        self._add(body, no_grad=no_grad, context=context, is_outer=False)
        self._outputs[region] = body.graph.output_node().args[0]

    def _needed(self) -> list[Step]:
        needed: set[Any] = set()
        kept = []
        for step in reversed(self.steps):
            node = step.node
            if node in needed or node.op in ("placeholder", "output") or node.is_impure():
                kept.append(step)
                needed.update(self.resolve(n) for n in node.all_input_nodes)
        return kept[::-1]
