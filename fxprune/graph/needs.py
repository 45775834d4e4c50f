"""needs: whose memory each tensor of a graph is, and which nodes the output needs if others were gone."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from itertools import accumulate

from torch.fx import Graph, Node

from .memory import aliased, checks_inputs, written


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
        sharing: defaultdict[Node, list[Node]] = defaultdict(list)
        for node, memory in self.base.items():
            sharing[memory].append(node)
        self._places = {memory: [self.place[n] for n in nodes] for memory, nodes in sharing.items()}
        self._latest = {m: list(accumulate((self.last_read[n] for n in nodes), max)) for m, nodes in sharing.items()}

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
