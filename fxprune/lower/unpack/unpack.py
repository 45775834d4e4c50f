"""unpack: a program with packed weights back to plain ATen ops."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxprune.errors import InputError
from fxprune.graph.program import Program, copy_program, drop_unused

from . import attention, linear, net
from .store import Store, Writer

_WRITERS: dict[Any, Callable[[Writer], Node | list[Node]]] = {
    **dict.fromkeys(linear.OPS, linear.write_linear),
    attention.OP: attention.write_attention,
    net.OP: net.write_net,
}


def unpack(program: Program, only: Callable[[Node], bool] | None = None) -> Program:
    """A copy of a program with dense weights, zeros included, and ATen ops that compute the same: none of fxprune's.

    With `only` those nodes alone are unpacked for which it is true; it is asked of each op of fxprune. Sizes that vary
    still do, and nodes need no fake values; new ones have none, but for those that stand for an op's result.

    A weight comes back bit for bit under its own name, of which several linears were stored together the first's; the
    others are called alike with numbers behind. Those of a net are named by its steps, as in
    `layer.in_lanes.conv_3.weight`. All are parameters without gradients.

    Raises InputError for an op that is unknown, or whose tensors the program does not hold or this machine cannot read.
    """
    result = copy_program(program)
    packed = [node for node in result.graph.nodes if _is_packed(node)]
    chosen = [node for node in packed if only is None or only(node)]
    store = Store(result, frozenset(chosen))
    for node in chosen:
        write = _WRITERS.get(node.target)
        if write is None:
            raise InputError(
                "cannot unpack an op",
                where=f"node {node.name}",
                why=f"{node.target} has no weight that could be dense",
                do="Unpack results of transform for inference only.",
            )
        writer = Writer(store, node)
        with result.graph.inserting_before(node):
            found = write(writer)
        _replace(node, found)
        for made in reversed(writer.made):
            if not made.users:
                result.graph.erase_node(made)
    drop_unused(result)
    result.graph.lint()
    result.recompile()
    return result


def _is_packed(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fxprune"


def _replace(node: Node, found: Node | list[Node]) -> None:
    """Lets readers of a packed op read what was found in its place, and erases it with what fed only it."""
    if isinstance(found, Node):
        _stand_for(node, found)
    else:
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise InputError(
                    "cannot unpack an op",
                    where=f"node {node.name}",
                    why=f"node {user.name} reads its results as a list, and not one by one",
                    do="Read each with operator.getitem.",
                )
            _stand_for(user, found[user.args[1]])  # pyright: ignore[reportArgumentType, reportCallIssue]
            user.graph.erase_node(user)
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        if source.op == "get_attr" and not source.users:
            source.graph.erase_node(source)


def _stand_for(old: Node, new: Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
