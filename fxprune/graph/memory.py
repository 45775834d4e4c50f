"""alias: which nodes are one tensor's memory, who writes to it, and which nodes an output needs."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
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


def chain(node: Node, instead: Mapping[Node, Node] | None = None) -> Iterator[Node]:
    """The node, and in turn what each has its memory from: back through views and writes in place.

    `instead` names nodes that other nodes stand for.
    """
    swap = instead or {}
    following: Node | None = node
    while following is not None:
        following = swap.get(following, following)
        yield following
        following = aliased(following)


def base(node: Node, instead: Mapping[Node, Node] | None = None) -> Node:
    """The node whose memory this node's tensor is, or may be."""
    *_, last = chain(node, instead)
    return last


def written(node: Node) -> list[Node]:
    """The tensors that an op writes to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    found: list[Node] = []
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _nodes(_argument(node, index, argument.name))
    return found


def writes(node: Node, instead: Mapping[Node, Node] | None = None) -> list[Node]:
    """The bases of the tensors that an op writes to."""
    return [base(n, instead) for n in written(node)]


def live(graph: Graph, gone: set[Node], instead: Mapping[Node, Node] | None = None) -> set[Node]:
    """The nodes that the output needs, with writes in place to what it reads, and checks of the inputs.

    Writes and checks in `gone` do not count; `instead` names nodes that other nodes stand for.
    """
    swap = instead or {}
    place = {node: index for index, node in enumerate(graph.nodes)}
    writers: dict[Node, list[Node]] = {}
    waiting: list[Node] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            waiting.append(node)
        elif node not in gone:
            bases = writes(node, instead)
            for memory in bases:
                writers.setdefault(memory, []).append(node)
            if any(memory.op != "call_function" for memory in bases) or checks_inputs(node, bases):
                waiting.append(node)
    found: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        for read in (swap.get(n, n) for n in node.all_input_nodes):
            waiting.append(read)
            waiting += [w for w in writers.get(base(read, instead), ()) if place[w] < place[node]]
    checks = [n for n in graph.nodes if n.target is _ASSERT and n not in gone]
    return found | {n for n in checks if found.issuperset(n.all_input_nodes)}


def checks_inputs(node: Node, bases: list[Node]) -> bool:
    """Whether a node is there for an effect other than writing to a tensor or drawing random numbers."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op == "call_function" and node.is_impure() and not bases and not seeded and node.target is not _ASSERT


def aliased(node: Node) -> Node | None:
    """The node that this one has its memory from, or may have."""
    if node.target is operator.getitem:
        whole = node.all_input_nodes[0]
        if whole.target not in _ONE_BY_ONE:
            return whole
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
