"""drop: residual blocks and branches leave the graph: what read a block's output reads its input, or its stream."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.errors import PlanError
from fxprune.graph.memory import Memory, Needs, base
from fxprune.graph.program import Program, copy_program, drop_unused, sizes

from .blocks import Block, Bypass, find_blocks
from .facts import calls_by_module

aten = torch.ops.aten


def without_blocks(program: Program, paths: Sequence[str]) -> Program:
    """The program without the residual blocks of these module paths. Raises PlanError where one cannot leave."""
    return drop_blocks(program, find_blocks(program, paths)) if paths else program


def drop_blocks(program: Program, blocks: Sequence[Block]) -> Program:
    """A copy without the blocks, and without what only they needed: ops, parameters and buffers."""
    result = copy_program(program)
    graph = result.graph
    nodes = {old.name: new for old, new in zip(program.graph.nodes, graph.nodes, strict=True)}
    gone = _leaving(graph, blocks, nodes)
    memory = Memory(graph)
    place = memory.place
    written_at: defaultdict[Node, list[int]] = defaultdict(list)
    for node, tensors in memory.writes.items():
        for tensor in tensors if node not in gone else ():
            written_at[tensor].append(place[node])
    restrided: dict[Node, str] = {}
    # From the last to the first, so that a block's entry may be the exit of one before it.
    for block, call in sorted(_last_calls(blocks), key=lambda pair: place[nodes[pair[1].exit]], reverse=True):
        exit, entry = nodes[call.exit], nodes[call.entry]
        own = written_at[memory.base[exit]]
        is_written = any(places and places[-1] > place[exit] for places in (own, written_at[memory.base[entry]]))
        if is_written or _is_handed_out(exit, entry):
            # The block's output was memory of its own: a write to it must not reach the entry, nor the reverse.
            with graph.inserting_after(exit):
                copied = graph.call_function(aten.clone.default, (entry,))
            copied.meta["val"] = entry.meta["val"].clone()
            entry = copied
            # What wrote to the output later writes to the copy now.
            del own[bisect_left(own, place[exit]) :]
        readers = [user for user in exit.users if user not in gone]
        exit.replace_all_uses_with(entry)
        if sizes(exit.meta["val"].stride()) != sizes(entry.meta["val"].stride()):
            restrided.update(dict.fromkeys(readers, block.path))
    needed = Needs(graph, Memory(graph)).needed(gone)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node not in needed:
            graph.erase_node(node)
    _follow_strides(graph, restrided)
    graph.lint()
    drop_unused(result)
    result.recompile()
    return result


def _is_handed_out(exit: Node, entry: Node) -> bool:
    """Whether callers get a block's output, who could not tell its memory from other memory that they know."""
    handed = {base(node) for node in exit.graph.output_node().all_input_nodes}
    mine, theirs = base(exit), base(entry)
    return mine in handed and mine is not theirs and (theirs.op != "call_function" or theirs in handed)


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


def _last_calls(blocks: Iterable[Block]) -> list[tuple[Block, Bypass]]:
    """The calls of the blocks, one for each exit: the outermost."""
    outer_last = sorted(blocks, key=lambda block: -len(block.path))
    return list({call.exit: (block, call) for block in outer_last for call in block.calls}.values())


def _leaving(graph: Graph, blocks: Iterable[Block], named: dict[str, Node]) -> set[Node]:
    """The nodes of the blocks' modules, and those that lead from a branch to its sum."""
    calls = calls_by_module(graph)
    inside = {node for block in blocks for nodes in calls[block.path] for node in nodes}
    return inside | {named[name] for block in blocks for call in block.calls for name in call.tail}


def _follow_strides(graph: Graph, readers: dict[Node, str]) -> None:
    """Recomputes meta["val"] from `readers` on, whose input has other strides since the block named there is gone.

    Raises PlanError where an op cannot take these strides.
    """
    mode = detect_fake_mode([node.meta.get("val") for node in graph.find_nodes(op="placeholder")])
    if mode is None or not readers:
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
                    where=f'"{readers[node]}"',
                    why=f"its input has other strides than its output, which {node.name} ({node.target}) cannot take: "
                    + str(error).split("\n", 1)[0][:200],
                    do="Write the model with reshape in place of view there, or keep the block.",
                ) from error
            if _strides(value) != _strides(node.meta.get("val")):
                for user in node.users:
                    readers.setdefault(user, readers[node])
            node.meta["val"] = value


def _strides(value: Any) -> list[tuple[Any, ...]]:
    return [sizes(leaf.stride()) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
