"""drop: whole residual blocks leave the graph, and what read a block's output reads its input.

A block is the nodes traced in one call of a module. It is residual if one tensor leaves it, and a way leads from that
tensor back to an input of the same shape through at least one sum (residual.py says what else the way may pass).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..alias import base, chain, live, writes
from ..capture import Program
from ..errors import PlanError
from ..plan import near
from ..weights import names_of_parameters
from .edit import copy_program, drop_unused, fetch
from .residual import Ways, alike, sizes, source, varying_tensors, ways_back

aten = torch.ops.aten
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

    @property
    def entry(self) -> str:
        """The node that is the first call's residual input."""
        return self.calls[0].entry

    @property
    def exit(self) -> str:
        """The node that is the first call's output."""
        return self.calls[0].exit


def module_paths(program: Program) -> list[str]:
    """The paths of the modules that nodes were traced in, in the order of their first nodes, outer before inner."""
    return list(_calls(program.graph))


def find_block(program: Program, path: str) -> Block:
    """The block of the module `path` with all of its calls.

    Raises PlanError where it is not residual or cannot leave.
    """
    calls = _calls(program.graph)
    if path not in calls:
        raise _unknown(path, list(calls))
    facts = _Facts(program.graph)
    found = []
    for index, nodes in enumerate(calls[path]):
        where = f'"{path}"' + (f", call {index + 1} of {len(calls[path])}" if len(calls[path]) > 1 else "")
        found.append(_bypass(facts, nodes, where, lambda: _residual_near(facts, calls, path)))
    return Block(path, tuple(found), _leaving_parameters(program, path, found))


def bypasses(blocks: Iterable[Block]) -> dict[str, str]:
    """Exit -> entry over all calls of the blocks. Where an inner block ends as an outer one does, the outer counts."""
    return {call.exit: call.entry for _, call in _last_calls(blocks)}


def drop_blocks(program: Program, blocks: Sequence[Block]) -> Program:
    """A copy without the blocks, and without what only they needed: ops, parameters and buffers."""
    result = copy_program(program)
    graph = result.graph
    nodes = {old.name: new for old, new in zip(program.graph.nodes, graph.nodes, strict=True)}
    gone = _inside(graph, [block.path for block in blocks])
    place = {node: index for index, node in enumerate(graph.nodes)}
    # From the last to the first, so that a block's entry may be the exit of one before it.
    for block, call in sorted(_last_calls(blocks), key=lambda pair: place[nodes[pair[1].exit]], reverse=True):
        exit, entry = nodes[call.exit], nodes[call.entry]
        memory = {base(entry), base(exit)}
        later = (n for n in graph.nodes if n not in gone and place.get(n, -1) > place[exit])
        if any(memory.intersection(writes(n)) for n in later):
            # The block's output was memory of its own: a write to it must not reach the entry, nor the reverse.
            with graph.inserting_after(exit):
                copied = graph.call_function(aten.clone.default, (entry,))
            copied.meta["val"] = entry.meta["val"].clone()
            entry = copied
        readers = {user for user in exit.users if user not in gone}
        exit.replace_all_uses_with(entry)
        if sizes(exit.meta["val"].stride()) != sizes(entry.meta["val"].stride()):
            _follow_strides(graph, readers, block.path)
    needed = live(graph, gone)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node not in needed:
            graph.erase_node(node)
    graph.lint()
    drop_unused(result)
    result.recompile()
    return result


class Bypassing(torch.fx.Interpreter):
    """Runs a program as if the blocks handed on their input: the definition of a right answer."""

    def __init__(self, program: Program, blocks: Iterable[Block] = ()) -> None:
        super().__init__(program)
        nodes = {node.name: node for node in program.graph.nodes}
        self._starting: dict[str, list[tuple[str, Node]]] = {}
        for _, call in _last_calls(blocks):
            self._starting.setdefault(call.start, []).append((call.exit, nodes[call.entry]))
        self._held: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """The node's value; at a block's exit, what its entry held as the block began."""
        for exit, entry in self._starting.get(n.name, ()):
            # The block may write to its input, so this must be a copy, made now.
            self._held[exit] = self.env[entry].clone()
        if n.name in self._held:
            return self._held.pop(n.name)
        return super().run_node(n)


def _calls(graph: Graph) -> dict[str, list[list[Node]]]:
    """Module path -> the nodes of each of its calls. Export numbers the calls of a module in the keys of the stack."""
    found: dict[str, dict[str, list[Node]]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
                if path and not key.startswith(_NO_STACK):
                    found.setdefault(path, {}).setdefault(key, []).append(node)
    return {path: list(calls.values()) for path, calls in found.items()}


def _inside(graph: Graph, paths: Iterable[str]) -> set[Node]:
    calls = _calls(graph)
    return {node for path in paths for nodes in calls[path] for node in nodes}


def _last_calls(blocks: Iterable[Block]) -> list[tuple[Block, Bypass]]:
    """The calls of the blocks, one for each exit: the outermost."""
    outer_last = sorted(blocks, key=lambda block: -len(block.path))
    return list({call.exit: (block, call) for block in outer_last for call in block.calls}.values())


class _Facts:
    """What is asked of a graph for each of its blocks."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.place = {node: index for index, node in enumerate(graph.nodes)}
        self.varying = varying_tensors(graph)
        self.writes = {node: bases for node in graph.nodes if (bases := writes(node))}


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
    problem = _written(facts, inside, entry, exit, start)
    if problem:
        raise refuse(problem, "Write the model without this write in place (y = y + x for y += x), or keep the block.")
    return Bypass(entry.name, exit.name, start.name)


def _leaving(facts: _Facts, nodes: list[Node], inside: set[Node]) -> dict[Node, Node]:
    """The values computed inside and read outside -> the node that is read.

    Sizes of the inputs, and outer tensors that are handed on as they are, are not computed inside.
    """
    rewritten = {memory for node in nodes for memory in facts.writes.get(node, ())}
    written = {node for node in nodes if base(node) in rewritten}
    found: dict[Node, Node] = {}
    for node in nodes:
        if any(user not in inside for user in node.users):
            first = source(node, written)
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
    if inputs and not any(alike(node, exit) for node in inputs):
        return f"its shape changes from {_described(inputs[0])} to {_described(exit)}"
    ends = ", ".join(f"{node.name} ({node.target})" for node in list(dict.fromkeys(ways.ends))[:3])
    return f"no residual sum found: the ways back from {exit.name} end at {ends}"


def _described(node: Node) -> str:
    value = node.meta["val"]
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{node.name} [{', '.join(map(str, value.shape))}] {dtype} on {value.device}"


def _written(facts: _Facts, inside: set[Node], entry: Node, exit: Node, start: Node) -> str:
    """Why the block's writes in place keep it from leaving; "" where they do not.

    A write to the entry itself (x += branch) leaves with the block if nobody else looks at that memory afterwards.
    """
    for node in facts.writes.keys() & inside:
        for memory in facts.writes[node]:
            if memory == base(exit) and facts.place[node] > facts.place[exit]:
                return f"{node.name} ({node.target}) writes to its output after the residual sum"
            if memory in inside:
                continue
            if memory != base(entry):
                return f"{node.name} ({node.target}) writes to {memory.name}, which is computed outside"
            later = [n for n in facts.graph.nodes if n not in inside and facts.place[n] > facts.place[start]]
            readers = [n for n in later if any(base(s) == memory and exit not in chain(s) for s in n.all_input_nodes)]
            if readers:
                return f"{node.name} ({node.target}) writes to {memory.name}, which {readers[0].name} reads later"
    return ""


def _leaving_parameters(program: Program, path: str, calls: Sequence[Bypass]) -> int:
    graph = program.graph
    nodes = {node.name: node for node in graph.nodes}
    instead = {nodes[call.exit]: nodes[call.entry] for call in calls}
    for exit in instead:
        while instead[exit] in instead:
            instead[exit] = instead[instead[exit]]
    canonical = names_of_parameters(program)
    before, after = (
        {canonical[str(n.target)] for n in needed if n.op == "get_attr" and n.target in canonical}
        for needed in (live(graph, set()), live(graph, _inside(graph, [path]), instead))
    )
    return sum(fetch(program, name).numel() for name in before - after)


def _follow_strides(graph: Graph, readers: set[Node], path: str) -> None:
    """Recomputes meta["val"] from `readers` on, whose input has other strides now.

    Raises PlanError where an op cannot take these strides.
    """
    mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes if node.op == "placeholder"])
    if mode is None:
        return
    quiet = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with quiet, mode, torch.no_grad():
        for node in graph.nodes:
            if node not in readers or node.op != "call_function":
                continue
            arguments = map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
            try:
                value = node.target(*arguments[0], **arguments[1])  # pyright: ignore
            except Exception as error:
                raise PlanError(
                    "cannot drop this block",
                    where=f'"{path}"',
                    why=f"its input has other strides than its output, which {node.name} ({node.target}) cannot take: "
                    + str(error).split("\n", 1)[0][:200],
                    do="Write the model with reshape in place of view there, or keep the block.",
                ) from error
            if _strides(value) != _strides(node.meta.get("val")):
                readers |= node.users.keys()
            node.meta["val"] = value


def _strides(value: Any) -> list[tuple[Any, ...]]:
    return [sizes(leaf.stride()) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


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


def _residual_near(facts: _Facts, calls: Mapping[str, list[list[Node]]], path: str) -> str:
    """In words, up to three blocks inside `path` that could go, or else the next one around it."""
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
