"""computed: weights that forward computes from parameters alone, as parameters of the program."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .memory import base, writes
from .program import Program, copy_program, drop_unused, fetch_any, names_of_parameters, replace_parameter
from .weights import is_moved, uses_of

# What knows rows and zeros of its weight.
_PRODUCTS = {"linear", "conv", "embedding"}


def fold_weights(program: Program, kept: Collection[str] = ()) -> tuple[Program, list[str]]:
    """A copy in which weights computed from parameters and buffers alone are parameters, and the names of these.

    Such are those of weight_norm and spectral_norm, standardised ones, W + B @ A, W * scale. Each takes the place of
    the parameter of its shape and dtype that nothing else reads, under that parameter's name; where there is none it
    stays computed, as the product of two thin matrices does. So does a weight that is computed from one named in
    `kept`, other than the one whose name it would take. The program itself where there is nothing to fold.
    """
    canonical = names_of_parameters(program)
    readers: dict[str, set[Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        readers.setdefault(canonical.get(str(node.target), ""), set()).update(node.users)
    found: dict[str, list[Node]] = {}
    for node in _constant_weights(program):
        parts = _parts(node)
        sources = dict.fromkeys(canonical.get(str(n.target), "") for n in parts if n.op == "get_attr")
        own = [n for n in sources if n and _alike(program.get_parameter(n), node) and readers[n] <= set(parts)]
        if own and not {*sources} - {own[0]} & {*kept}:
            found[own[0]] = parts
    if not found:
        return program, []
    values = {name: _computed(program, parts) for name, parts in found.items()}
    result = copy_program(program)
    copied = dict(zip(program.graph.nodes, result.graph.nodes, strict=True))
    for name, parts in found.items():
        computed = copied[parts[-1]]
        with result.graph.inserting_before(computed):
            weight = result.graph.get_attr(name)
        weight.meta = dict(computed.meta)
        computed.replace_all_uses_with(weight)
    for node in reversed([n for n in program.graph.nodes if any(n in parts for parts in found.values())]):
        if not copied[node].users:
            result.graph.erase_node(copied[node])
    for name, value in values.items():
        replace_parameter(result, [alias for alias, first in canonical.items() if first == name], value)
    drop_unused(result)
    result.graph.lint()
    result.recompile()
    return result, list(found)


def _constant_weights(program: Program) -> Iterator[Node]:
    """Nodes that products alone read, as their weight, computed from tensors that nothing writes to."""
    nodes = program.graph.nodes
    written = {memory for node in nodes for memory in writes(node)}
    tensors = {id(fetch_any(program, str(node.target))) for node in written if node.op == "get_attr"}
    made: set[Node] = set()
    for node in nodes:
        if node.op == "get_attr":
            value = fetch_any(program, str(node.target))
            if isinstance(value, Tensor) and id(value) not in tensors:
                made.add(node)
        elif node.all_input_nodes and made.issuperset(node.all_input_nodes) and base(node) not in written:
            if not _is_plain(node.target):
                continue
            made.add(node)
            uses = uses_of(node)
            # A parameter in another shape is one still.
            is_computed = any(part.op != "get_attr" and not is_moved(part) for part in _parts(node))
            if uses and all(use.kind in _PRODUCTS for use in uses) and is_computed:
                yield node


def _is_plain(op: object) -> bool:
    if not isinstance(op, torch._ops.OpOverload):
        return op is operator.getitem
    return not op._schema.is_mutable and torch.Tag.nondeterministic_seeded not in op.tags


def _alike(parameter: Tensor, node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.shape == parameter.shape and value.dtype == parameter.dtype


def _parts(node: Node) -> list[Node]:
    """All that a node is computed from, in the order of the graph, and the node."""
    found, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return sorted(found)


@torch.no_grad()
def _computed(program: Program, parts: list[Node]) -> Tensor:
    """What the last of these nodes computes, in storage of its own."""
    known: dict[Node, Any] = {}
    for part in parts:
        if part.op == "get_attr":
            known[part] = fetch_any(program, str(part.target)).detach()
        else:
            args, kwargs = torch.fx.node.map_arg((part.args, part.kwargs), lambda n: known[n])  # pyright: ignore
            known[part] = part.target(*args, **kwargs)  # pyright: ignore
    return known[parts[-1]].clone(memory_format=torch.contiguous_format)
