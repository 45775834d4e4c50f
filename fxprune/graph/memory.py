"""memory: whose memory each tensor of a graph is, who writes to it, and which nodes the output needs."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

_ASSERT = aten._assert_tensor_metadata.default

# In evaluation these hand their input on, which their schemas do not say.
DROPOUTS = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}
# So do these, where nothing is to be done.
_HANDED_ON = DROPOUTS | {
    aten.type_as.default,
    aten.sum_to_size.default,
    aten._unsafe_view.default,
    aten.unsafe_chunk.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.atleast_1d.default,
    aten.atleast_2d.default,
    aten.atleast_3d.default,
}
# These copy where strides ask for it, so that a change of sizes can change whether they do.
MAY_COPY = {
    aten.contiguous.default,
    aten.reshape.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
    aten.ravel.default,
}
# Each result is a view of the input at its place in the list.
_ONE_BY_ONE = {
    aten.broadcast_tensors.default,
    aten.meshgrid.default,
    aten.meshgrid.indexing,
    aten.atleast_1d.Sequence,
    aten.atleast_2d.Sequence,
    aten.atleast_3d.Sequence,
}


def base(node: Node) -> Node:
    """The node whose memory this node's tensor is, or may be: back through views and writes in place."""
    while (above := aliased(node)) is not None:
        node = above
    return node


def written(node: Node) -> list[Node]:
    """The tensors that an op writes to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    found: list[Node] = []
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _nodes(_argument(node, index, argument.name))
    return found


def writes(node: Node) -> list[Node]:
    """The bases of the tensors that an op writes to."""
    return [base(n) for n in written(node)]


def checks_inputs(node: Node, bases: list[Node]) -> bool:
    """Whether a node is there for an effect other than writing to a tensor or drawing random numbers."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op == "call_function" and node.is_impure() and not bases and not seeded and node.target is not _ASSERT


def aliased(node: Node) -> Node | None:
    """The node that this one has its memory from, or may have."""
    if node.target is operator.getitem:
        whole = node.all_input_nodes[0]
        if whole.target not in _ONE_BY_ONE:
            # The results of an op that makes them anew lie apart.
            is_new = isinstance(whole.target, torch._ops.OpOverload) and aliased(whole) is None
            return None if is_new else whole
        return next(iter(_nodes(whole.args[0])[node.args[1] :]), None)  # pyright: ignore
    permutes = node.target is aten.einsum.default and len(node.all_input_nodes) == 1
    if node.target in _HANDED_ON or permutes:
        return node.all_input_nodes[0]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    returned = {name for value in schema.returns if value.alias_info for name in value.alias_info.before_set}
    for index, argument in enumerate(schema.arguments):
        # A list of views, as chunk returns it, is written `Tensor(a -> *)` at the argument alone.
        if argument.alias_info is not None and (
            returned & argument.alias_info.before_set or "*" in argument.alias_info.after_set
        ):
            nodes = _nodes(_argument(node, index, argument.name))
            if nodes:
                return nodes[0]
    return None


def _argument(node: Node, index: int, name: str) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def _nodes(value: Any) -> list[Node]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in items if isinstance(item, Node)]


class Memory:
    """Whose memory each tensor of a graph is, which nodes write to it, and how late it is read."""

    def __init__(self, graph: Graph) -> None:
        self.place = {node: index for index, node in enumerate(graph.nodes)}
        self._above = {node: aliased(node) for node in graph.nodes}
        self.base: dict[Node, Node] = {}
        for node, above in self._above.items():
            self.base[node] = node if above is None else self.base[above]
        self.writes = {node: [self.base[n] for n in tensors] for node in graph.nodes if (tensors := written(node))}
        self.last_read = {n: max((self.place[user] for user in n.users), default=-1) for n in graph.nodes}
        self._sharing: defaultdict[Node, list[Node]] = defaultdict(list)
        for node, memory in self.base.items():
            self._sharing[memory].append(node)
        self._places = {memory: [self.place[n] for n in nodes] for memory, nodes in self._sharing.items()}
        self._latest = {
            m: list(accumulate((self.last_read[n] for n in nodes), max)) for m, nodes in self._sharing.items()
        }

    def sharing_before(self, node: Node, place: int) -> list[Node]:
        """The nodes before `place` that are, or may be, the same memory as a node."""
        memory = self.base[node]
        return self._sharing[memory][: bisect_left(self._places[memory], place)]

    def last_read_before(self, memory: Node, place: int) -> int:
        """The last place where a tensor of this memory that stands before `place` is read; -1 for none."""
        index = bisect_left(self._places[memory], place)
        return self._latest[memory][index - 1] if index else -1

    def comes_from(self, node: Node, other: Node) -> bool:
        """Whether a tensor has its memory from another one, or is it."""
        above: Node | None = node
        while above is not None and self.place[above] > self.place[other]:
            above = self._above[above]
        return above is other


class Needs:
    """How many nodes that the output needs, need each node: they read it, or what it wrote before them.

    What nobody needs is not computed. A node only needs earlier ones, so that taking nodes away changes the numbers
    of what they needed, and no others.
    """

    def __init__(self, graph: Graph, memory: Memory) -> None:
        self._memory = memory
        self._writers: defaultdict[Node, list[Node]] = defaultdict(list)
        for node, tensors in memory.writes.items():
            for tensor in dict.fromkeys(tensors):
                self._writers[tensor].append(node)
        self._writer_places = {m: [memory.place[node] for node in nodes] for m, nodes in self._writers.items()}
        self._roots = {node for node in graph.nodes if self._is_root(node)}
        self._after: defaultdict[Node, list[Node]] = defaultdict(list)
        self.count: Counter[Node] = Counter(self._roots)
        for node in reversed(graph.nodes):
            reads = node.all_input_nodes
            for writer in self._last_writers(node, reads):
                self._after[writer].append(node)
            if self.count[node]:
                self.count.update(self._needs(node, reads))

    def without(self, gone: Set[Node], instead: Mapping[Node, Node]) -> dict[Node, int]:
        """The numbers that change where the writes and checks in `gone` leave.

        `instead` names nodes that become copies of others.
        """
        found: dict[Node, int] = {}
        changed = {*instead, *(reader for node in gone for reader in self._after.get(node, ()))}

        def needs(node: Node) -> list[Node]:
            reads = [instead[node]] if node in instead else node.all_input_nodes
            return self._needs(node, reads, gone if node in changed else frozenset())

        def add(nodes: Iterable[Node], by: int) -> None:
            waiting = list(nodes)
            while waiting:
                node = waiting.pop()
                before = found.get(node, self.count[node])
                found[node] = before + by
                if not before or not found[node]:
                    waiting += needs(node)

        needed = [node for node in changed if self.count[node]]
        for node in needed:
            add(needs(node), 1)
        for node in needed:
            add(self._needs(node, node.all_input_nodes), -1)
        add(self._roots & gone, -1)
        return found

    def needed(self, gone: Set[Node] = frozenset()) -> set[Node]:
        """The nodes that the output needs where the writes and checks in `gone` leave, with the checks of these."""
        changed = self.without(gone, {})
        found = {node for node in self._memory.place if changed.get(node, self.count[node])}
        checks = [node for node in self._memory.place if node.target is _ASSERT and node not in gone]
        return found | {node for node in checks if found.issuperset(node.all_input_nodes)}

    def _is_root(self, node: Node) -> bool:
        memories = self._memory.writes.get(node, [])
        outer = node.op in ("placeholder", "output") or any(memory.op != "call_function" for memory in memories)
        return outer or checks_inputs(node, memories)

    def _needs(self, node: Node, reads: Iterable[Node], gone: Set[Node] = frozenset()) -> list[Node]:
        return [*reads, *self._last_writers(node, reads, gone)]

    def _last_writers(self, node: Node, reads: Iterable[Node], gone: Set[Node] = frozenset()) -> list[Node]:
        """For each memory read, the last that wrote to it before; that one needs those before it itself."""
        found = []
        for memory in dict.fromkeys(self._memory.base[read] for read in reads):
            index = bisect_left(self._writer_places.get(memory, ()), self._memory.place[node]) - 1
            while index >= 0 and self._writers[memory][index] in gone:
                index -= 1
            if index >= 0:
                found.append(self._writers[memory][index])
        return found
