"""propagate: what of each value in a graph is the same whatever the inputs are. Weights are known, inputs are not.

Constant propagation, element by element: an element is sure where everything that it is computed from is sure, or is
multiplied by a sure zero. Symbolic sizes stand at the example's, and what holds there holds at every size: an op that
could tell sizes apart (a slice up to a symbol, a padded window over a symbolic size) leaves nothing sure.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.couple.rules import packet_name
from fxprune.graph.memory import Memory, written
from fxprune.graph.ops import widened
from fxprune.graph.program import Program, arguments, fetch_any

from .known import Known, State, holds_tensors, size_of
from .known_ops import follow
from .recurrent import RECURRENT

Visit = Callable[[Node, Callable[[Any], Any]], None]


# Random in training only, or where asked to drop something.
_CALM = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "scaled_dot_product_attention"}
_CALM |= RECURRENT.keys()


class Propagation:
    """One walk over a program. `read` gives each parameter and buffer its values, `opaque` names nodes not followed."""

    def __init__(
        self, program: Program, read: Callable[[str, Tensor], Tensor], opaque: Mapping[str, Any] | None = None
    ) -> None:
        self._program, self._read, self._opaque = program, read, opaque or {}
        self._memory = Memory(program.graph).base
        self._states: dict[Node, State] = {}
        # Ops that could not be run, and why: what they make counts as unknown.
        self.failed: dict[str, str] = {}

    def run(self, visit: Visit) -> None:
        """Calls `visit(node, get)` for every op, in order; `get` turns its arguments into what is known of them."""
        left = Counter(read for node in self._program.graph.nodes for read in node.all_input_nodes)
        sharing: dict[Node, list[Node]] = {}
        for node in self._program.graph.nodes:
            sharing.setdefault(self._memory[node], []).append(node)
            if node.op == "call_function":
                visit(node, self._get)
            self._states[node] = self._follow(node)
            for target in written(node):
                # Whatever shares this memory holds something else from here on.
                for other in sharing[self._memory[target]]:
                    if other is not node and other in self._states:
                        self._states[other] = self._states[node] if other is target else None
            left.subtract(node.all_input_nodes)
            for read in node.all_input_nodes:
                if not left[read]:
                    self._states.pop(read, None)

    def _get(self, argument: Any) -> Any:
        """Tensors as what is known of them (None: nothing), sizes as numbers, the rest as it stands."""
        if isinstance(argument, Node):
            value = argument.meta.get("val")
            return self._states.get(argument) if holds_tensors(value) else size_of(value)
        if isinstance(argument, (list, tuple)):
            return [self._get(item) for item in argument]
        return argument

    def _follow(self, node: Node) -> State:
        if node.op == "get_attr":
            return self._fetch(str(node.target))
        if node.op != "call_function" or node.name in self._opaque or not holds_tensors(node.meta.get("val")):
            return None
        if node.target is operator.getitem:
            whole = self._states.get(node.all_input_nodes[0])
            return whole[int(str(node.args[1]))] if isinstance(whole, list) else None
        if not isinstance(node.target, torch._ops.OpOverload):
            return None
        if torch.Tag.nondeterministic_seeded in node.target.tags and packet_name(node.target) not in _CALM:
            return None
        # An op that cannot run on stand-ins for symbolic sizes, or in float32, leaves nothing known.
        try:
            found = follow(node, {name: self._get(value) for name, value in arguments(node).items()})
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as error:
            self.failed[str(node.target)] = str(error).strip().split("\n", 1)[0]
            return None
        return None if isinstance(found, Known) and not bool(found.sure.any()) else found

    def _fetch(self, target: str) -> Known | None:
        value = fetch_any(self._program, target)
        return Known.all(widened(self._read(target, value.detach()))) if isinstance(value, Tensor) else None
