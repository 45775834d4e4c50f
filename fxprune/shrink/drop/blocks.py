"""blocks: the residual blocks of a graph, by the paths of the modules that they were traced in.

A block is the nodes traced in one call of a module. It is residual if one tensor leaves it, and a way leads from that
tensor back to an input of the same shape through at least one sum (residual.py says what else the way may pass).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor
from torch.fx import Graph, Node

from fxprune.errors import PlanError
from fxprune.graph.memory import Memory, Needs
from fxprune.graph.program import Program, fetch, names_of_parameters
from fxprune.plan.plan import Plan, near
from fxprune.select.selection import Selection

from .residual import Ways, same_kind, source, varying_tensors, ways_back

_OUTPUT = "the model's output"
_NO_STACK = "_empty_nn_module_stack"  # the key of nodes that export made for sizes, in no module


@dataclasses.dataclass(frozen=True)
class Bypass:
    """One call of a block: node `exit` answers what `entry` held before `start`, the call's first op."""

    entry: str
    exit: str
    start: str


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block: its module path, its calls, and how many elements of parameters leave with it alone."""

    path: str
    calls: tuple[Bypass, ...]
    parameters: int


def module_paths(program: Program) -> list[str]:
    """The paths of the modules that nodes were traced in, in the order of their first nodes, outer before inner."""
    return list(calls_by_module(program.graph))


def find_blocks(program: Program, paths: Iterable[str]) -> list[Block]:
    """The blocks of the modules `paths`, each with all of its calls.

    Raises PlanError where one is not residual or cannot leave.
    """
    facts = _Facts(program)
    return [_find_block(facts, path) for path in paths]


def _find_block(facts: _Facts, path: str) -> Block:
    if path not in facts.calls:
        raise _unknown(path, list(facts.calls))
    calls = facts.calls[path]
    found = []
    for index, nodes in enumerate(calls):
        where = f'"{path}"' + (f", call {index + 1} of {len(calls)}" if len(calls) > 1 else "")
        found.append(_bypass(facts, nodes, where, lambda: _residual_near(facts, path)))
    return Block(path, tuple(found), _leaving_parameters(facts, path, found))


def calls_by_module(graph: Graph) -> dict[str, list[list[Node]]]:
    """Module path -> the nodes of each of its calls. Export numbers the calls of a module in the keys of the stack."""
    found: dict[str, dict[str, list[Node]]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
                if path and not key.startswith(_NO_STACK):
                    found.setdefault(path, {}).setdefault(key, []).append(node)
    return {path: list(calls.values()) for path, calls in found.items()}


class _Facts:
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


def _bypass(facts: _Facts, nodes: list[Node], where: str, suggest: Callable[[], str]) -> Bypass:
    """The entry and exit of one call of a block."""
    inside = set(nodes)

    def refuse(why: str, do: str) -> PlanError:
        return PlanError("cannot drop this block", where=where, why=why, do=do)

    leaving = _leaving(facts, nodes, inside)
    if not leaving:
        raise refuse("nothing that it computes is read outside", "Take it out of the plan.")
    if len(leaving) > 1:
        readers = {node.name: _reader(node, inside) for node in leaving.values()}
        do = "Drop a block with one output."
        if _OUTPUT in readers.values():
            do = "Turn off what it hands out besides its output (use_cache=False, output_attentions=False)."
        names = ", ".join(f"{name} (read by {reader})" for name, reader in readers.items())
        raise refuse(f"{len(leaving)} tensors leave it: {names}", do + suggest())
    exit = next(iter(leaving))
    if not isinstance(exit.meta.get("val"), Tensor):
        raise refuse(f"what leaves it is no tensor: {exit.name}", f"Drop a block that adds to its input.{suggest()}")
    ways = ways_back(exit, nodes, facts.varying)
    if not ways.entries:
        raise refuse(_why_not(facts, exit, nodes, inside, ways), f"Drop a block that adds to its input.{suggest()}")
    fewest = min(ways.entries.values())
    entries = {source(node, set()): node for node, norms in ways.entries.items() if norms == fewest}
    if len(entries) > 1:
        names = " and ".join(node.name for node in entries.values())
        raise refuse(
            f"its input cannot be told apart: sums lead from {exit.name} back to {names}",
            f"Drop a block that adds to one input only.{suggest()}",
        )
    entry = next(iter(entries.values()))
    start = next(node for node in nodes if facts.place[node] > facts.place[entry])
    problem = _written(facts, nodes, inside, entry, exit, start)
    if problem:
        raise refuse(problem, "Write the model without this write in place (y = y + x for y += x), or keep the block.")
    return Bypass(entry.name, exit.name, start.name)


def _leaving(facts: _Facts, nodes: list[Node], inside: set[Node]) -> dict[Node, Node]:
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
    named = [_OUTPUT if user.op == "output" else user.name for user in users]
    # What only checks a tensor says little about who needs it.
    telling = [name for name, user in zip(named, users) if user.op == "output" or user.meta.get("val") is not None]
    return (telling or named)[0]


def _why_not(facts: _Facts, exit: Node, nodes: list[Node], inside: set[Node], ways: Ways) -> str:
    inputs = [n for node in nodes for n in node.all_input_nodes if n not in inside and n in facts.varying]
    if ways.changed:
        return f"no residual sum: its input {_described(ways.changed[0])} becomes {_described(exit)}"
    if ways.sumless:
        return f"no residual sum: no branch is added on the way from {ways.sumless[0].name} to {exit.name}"
    if inputs and not any(same_kind(node, exit) for node in inputs):
        return f"its shape changes from {_described(inputs[0])} to {_described(exit)}"
    ends = ", ".join(f"{node.name} ({node.target})" for node in list(dict.fromkeys(ways.ends))[:3])
    return f"no residual sum found: the ways back from {exit.name} end at {ends}"


def _described(node: Node) -> str:
    value = node.meta["val"]
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{node.name} [{', '.join(map(str, value.shape))}] {dtype} on {value.device}"


def _written(facts: _Facts, nodes: list[Node], inside: set[Node], entry: Node, exit: Node, start: Node) -> str:
    """Why the block's writes in place keep it from leaving; "" where they do not.

    A write to the entry itself (x += branch) leaves with the block if nobody else looks at that memory afterwards.
    """
    base = facts.memory.base
    for node in nodes:
        for memory in facts.memory.writes.get(node, ()):
            if memory is base[exit] and facts.place[node] > facts.place[exit]:
                return f"{node.name} ({node.target}) writes to its output after the residual sum"
            if memory in inside:
                continue
            if memory is not base[entry]:
                return f"{node.name} ({node.target}) writes to {memory.name}, which is computed outside"
            reader = _reader_beside(facts, memory, nodes, inside, exit, start)
            if reader is not None:
                return f"{node.name} ({node.target}) writes to {memory.name}, which {reader.name} reads later"
    return ""


def _reader_beside(
    facts: _Facts, memory: Node, nodes: list[Node], inside: set[Node], exit: Node, start: Node
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


def _leaving_parameters(facts: _Facts, path: str, calls: Sequence[Bypass]) -> int:
    nodes = {node.name: node for nodes in facts.calls[path] for node in nodes}
    instead = {nodes[call.exit]: facts.named[call.entry] for call in calls}
    left = Counter()
    for node, count in facts.needs.without(set(nodes.values()), instead).items():
        if node in facts.parameter:
            left[facts.parameter[node]] += bool(facts.needs.count[node]) - bool(count)
    leaving = (name for name, count in left.items() if count > 0 and count == facts.reads[name])
    return sum(fetch(facts.program, name).numel() for name in leaving)


def _unknown(path: str, paths: list[str]) -> PlanError:
    children = [p for p in paths if p.startswith(f"{path}.")] if path else []
    if not path:
        why, do = "it is the whole model", "Name a module inside it."
    elif children:
        depth = path.count(".") + 1
        named = list(dict.fromkeys(".".join(p.split(".")[: depth + 1]) for p in children))
        why, do = "it only holds modules that are called one by one", f"Name those: {', '.join(named[:5])}."
    else:
        close = near(path, paths)
        why = "no op that the output depends on was traced in a module of this name"
        do = f"Near it: {', '.join(close)}." if close else "See dict(model.named_modules()) for the names."
    return PlanError("cannot drop this block", where=f'"{path}"', why=why, do=do)


def _residual_near(facts: _Facts, path: str) -> str:
    """In words, up to three blocks inside `path` that could go, or else the next one around it."""
    calls = facts.calls
    around = [p for p in calls if path.startswith(f"{p}.")]
    found: list[str] = []
    for other in [*(p for p in calls if p.startswith(f"{path}.")), *sorted(around, key=len, reverse=True)]:
        if len(found) == 3 or (found and other in around):
            break
        if any(other.startswith(f"{p}.") for p in found):
            continue
        try:
            for nodes in calls[other]:
                _bypass(facts, nodes, other, lambda: "")
        except PlanError:
            continue
        found.append(other)
    return f" These could go: {', '.join(found)}." if found else ""


def choose_blocks(program: Program, plan: Plan | None, replay: Selection | None) -> tuple[str, ...]:
    """The module paths of the blocks that a plan, or an earlier selection, drops. Raises PlanError."""
    if replay is not None:
        return replay.drop
    return tuple(plan.blocks(module_paths(program))) if plan is not None and plan.drops else ()
