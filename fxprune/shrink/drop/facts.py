"""facts: what is asked of a program for each module that is to leave: its calls, what leaves them, who reads it."""

from __future__ import annotations

import dataclasses
from collections import Counter

from torch import Tensor
from torch.fx import Graph, Node

from fxprune.graph.memory import Memory, Needs
from fxprune.graph.program import Program, names_of_parameters

from .residual import source, varying_tensors

OUTPUT = "the model's output"
GENERAL = "Drop a block that adds to its input, or a branch that one sum adds to a residual stream."
NO_WRITES = "Write the model without this write in place (y = y + x for y += x), or keep the block."
_NO_STACK = "_empty_nn_module_stack"  # the key of nodes that export made for sizes, in no module


class Facts:
    """What is asked of a program for each of its blocks, found once for all of them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes = list(program.graph.nodes)
        self.calls = calls_by_module(program.graph)
        self.varying = varying_tensors(program.graph)
        self.memory = Memory(program.graph)
        self.place = self.memory.place
        self.named = {node.name: node for node in self.nodes}
        self.needs = Needs(program.graph, self.memory)
        canonical = names_of_parameters(program)
        fetched = {node: str(node.target) for node in self.nodes if node.op == "get_attr"}
        self.parameter = {node: canonical[name] for node, name in fetched.items() if name in canonical}
        self.reads = Counter(name for node, name in self.parameter.items() if self.needs.count[node])


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a call of a module cannot leave, and what to do; `ends` are the readers where the way on from it ended."""

    why: str
    do: str = GENERAL
    ends: tuple[Node, ...] = ()


def calls_by_module(graph: Graph) -> dict[str, list[list[Node]]]:
    """Module path -> the nodes of each of its calls. Export numbers the calls of a module in the keys of the stack."""
    found: dict[str, dict[str, list[Node]]] = {}
    for node in graph.nodes:
        for key, path in paths_around(node).items():
            found.setdefault(path, {}).setdefault(key, []).append(node)
    return {path: list(calls.values()) for path, calls in found.items()}


def paths_around(node: Node) -> dict[str, str]:
    """The calls that a node was traced in, outer before inner: key of the call -> path of the module."""
    if node.op != "call_function":
        return {}
    stack = node.meta.get("nn_module_stack") or {}
    return {key: path for key, (path, _) in stack.items() if path and not key.startswith(_NO_STACK)}


def output_of(facts: Facts, nodes: list[Node]) -> Node | Refusal:
    """The one tensor that leaves a call."""
    inside = set(nodes)
    leaving = _leaving(facts, nodes, inside)
    if not leaving:
        return Refusal("nothing that it computes is read outside", "Take it out of the plan.")
    if len(leaving) > 1:
        readers = {node.name: _reader(node, inside) for node in leaving.values()}
        do = "Drop a block with one output."
        if OUTPUT in readers.values():
            do = "Turn off what it hands out besides its output (use_cache=False, output_attentions=False)."
        names = ", ".join(f"{name} (read by {reader})" for name, reader in readers.items())
        return Refusal(f"{len(leaving)} tensors leave it: {names}", do)
    exit = next(iter(leaving))
    if not isinstance(exit.meta.get("val"), Tensor):
        return Refusal(f"what leaves it is no tensor: {exit.name}")
    return exit


def _leaving(facts: Facts, nodes: list[Node], inside: set[Node]) -> dict[Node, Node]:
    """The values computed inside and read outside -> the node that is read.

    Sizes of the inputs, and outer tensors that are handed on as they are, are not computed inside.
    """
    rewritten = {memory for node in nodes for memory in facts.memory.writes.get(node, ())}
    changing = {node for node in nodes if facts.memory.base[node] in rewritten}
    found: dict[Node, Node] = {}
    for node in nodes:
        if any(user not in inside for user in node.users):
            first = source(node, changing)
            if first in inside and (isinstance(node.meta.get("val"), Tensor) or _reads_a_tensor(node, inside)):
                found.setdefault(first, node)
    return found


def _reads_a_tensor(node: Node, inside: set[Node]) -> bool:
    """Whether a size or number hangs on a tensor computed inside."""
    return any(
        n in inside and (isinstance(n.meta.get("val"), (Tensor, list, tuple)) or _reads_a_tensor(n, inside))
        for n in node.all_input_nodes
    )


def _reader(node: Node, inside: set[Node]) -> str:
    users = [user for user in node.users if user not in inside]
    named = [OUTPUT if user.op == "output" else user.name for user in users]
    # What only checks a tensor says little about who needs it.
    telling = [name for name, user in zip(named, users) if user.op == "output" or user.meta.get("val") is not None]
    return (telling or named)[0]


def described(node: Node) -> str:
    """A node's name, shape, dtype and device."""
    value = node.meta["val"]
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{node.name} [{', '.join(map(str, value.shape))}] {dtype} on {value.device}"


def reader_beside(
    facts: Facts, memory: Node, nodes: list[Node], inside: set[Node], exit: Node, start: Node
) -> Node | None:
    """The first node outside that reads this memory after a block's `start`, and not by way of its exit."""

    def beside(node: Node) -> bool:
        return facts.memory.base[node] is memory and not facts.memory.comes_from(node, exit)

    first, end = facts.place[start], facts.place[nodes[-1]]
    reads = [facts.memory.last_read[node] for node in facts.nodes[first : end + 1] if beside(node)]
    # Whoever reads after the end reads a tensor from before it, or such a tensor's first view after it does.
    last = max(end, facts.memory.last_read_before(memory, first), *reads)
    later = (node for node in facts.nodes[first + 1 : last + 1] if node not in inside)
    return next((node for node in later if any(map(beside, node.all_input_nodes))), None)
