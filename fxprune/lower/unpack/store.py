"""store: the tensors of a program that is being unpacked: packed ones are read, dense ones take their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.errors import InputError
from fxprune.graph.program import Program, fetch_any, owner

from .dtypes import dtypes_of

aten = torch.ops.aten
_ORIGIN = ("nn_module_stack", "stack_trace")


class Store:
    """The tensors of `program`, of whose nodes `chosen` are on their way out."""

    def __init__(self, program: Program, chosen: Collection[Node]) -> None:
        self.program = program
        # The dtype of each node's tensor, where it is known; of the nodes as they were.
        self.dtypes = dtypes_of(program)
        self._names: dict[Hashable, list[str]] = {}
        reads = program.graph.find_nodes(op="get_attr")
        self._tensors: dict[str, Any] = {str(read.target): fetch_any(program, str(read.target)) for read in reads}
        self._vacated: set[str] = set()
        self._stay = {str(read.target) for read in reads if any(user not in chosen for user in read.users)}

    def fetch(self, node: Any) -> Tensor:
        """The tensor that a packed op reads. Raises InputError where the program does not hold it."""
        if not isinstance(node, Node) or node.op != "get_attr":
            raise InputError(
                "cannot unpack a weight",
                where=f"node {node}",
                why="its packed tensors are computed or given, and not held by the program",
                do="Unpack the program that transform returned, not one whose tensors became arguments.",
            )
        return self._tensors[str(node.target)].detach()

    def once(self, key: Hashable, make: Callable[[], Sequence[str]]) -> list[str]:
        """The names that `make` gave to tensors; it is called once for a key."""
        if key not in self._names:
            self._names[key] = list(make())
        return self._names[key]

    def vacate(self, packed: Sequence[Node]) -> str:
        """The name of the module that holds these packed tensors, which leaves where nobody else reads of it."""
        holders = {str(node.target).rpartition(".")[0] for node in packed}
        holder = min(holders)
        is_read = any(name.startswith(f"{holder}.") for name in self._stay)
        if len(holders) == 1 and holder and holder not in self._vacated and not is_read:
            module, leaf = owner(self.program, holder)
            del module._modules[leaf]
            self._vacated.add(holder)
        return holder

    def put(self, name: str, value: Tensor) -> str:
        """Registers a parameter at this name, or with a number behind it where another is there; returns the name."""
        path, _, leaf = name.rpartition(".")
        module: nn.Module = self.program
        for part in path.split(".") if path else ():
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        free, number = leaf, 0
        while any(free in table for table in (module._modules, module._parameters, module._buffers)):
            number += 1
            free = f"{leaf}_{number}"
        module.register_parameter(free, nn.Parameter(value, requires_grad=False))
        return f"{path}.{free}".lstrip(".")

    def holds(self, name: str) -> bool:
        """Whether the program has a tensor of this name (still)."""
        try:
            return isinstance(fetch_any(self.program, name), Tensor)
        except AttributeError:
            return False


@dataclasses.dataclass
class Writer:
    """Adds ATen ops in front of a packed op, with its origin. `made` are the nodes that it added."""

    store: Store
    node: Node
    made: list[Node] = dataclasses.field(default_factory=list)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A node that calls an op."""
        return self._add(self.node.graph.call_function(target, args, kwargs))

    def read(self, name: str) -> Node:
        """A node that reads a tensor of the program."""
        return self._add(self.node.graph.get_attr(name))

    def _add(self, node: Node) -> Node:
        node.meta = {key: self.node.meta[key] for key in _ORIGIN if key in self.node.meta}
        self.made.append(node)
        return node

    def activate(self, y: Node, activation: str) -> Node:
        """activation(y), by the names that packed ops have for them."""
        if not activation:
            return y
        if activation == "gelu_tanh":
            return self.call(aten.gelu.default, y, approximate="tanh")
        return self.call(_ACTIVATIONS[activation], y)


_ACTIVATIONS: dict[str, Any] = {
    "relu": aten.relu.default,
    "gelu": aten.gelu.default,
    "silu": aten.silu.default,
    "sigmoid": aten.sigmoid.default,
    "hardsigmoid": aten.hardsigmoid.default,
    "hardswish": aten.hardswish.default,
}
