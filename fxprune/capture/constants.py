"""constants: what is computed from parameters and buffers alone is computed once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.graph.program import Program, copy_program, drop_unused, fetch_any, owner

# Ops that hand a weight on as a view stay in the graph: folding them would hide the weight's name from the plan.
_VIEWS = {
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
}


def fold_constants(program: Program) -> Program:
    """A copy in which every ATen op over parameters and buffers alone is a buffer (a mask times a weight is a weight).

    Ops that draw random numbers, write in place or make views of a parameter are left as they are.
    """
    result = copy_program(program)
    known: dict[Node, Tensor] = {}
    for node in list(result.graph.nodes):
        if node.op == "get_attr":
            value = fetch_any(result, str(node.target))
            if isinstance(value, Tensor):
                known[node] = value.detach()
        elif _foldable(node, known):
            with torch.no_grad():
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])  # pyright: ignore
                value = node.target(*args, **kwargs)
            if isinstance(value, Tensor):
                known[node] = value
                if not _feeds_constants_only(node, known):
                    _materialise(result, node, value, known)
    for node in reversed(list(result.graph.nodes)):
        if not node.users and node in known:
            result.graph.erase_node(node)
    drop_unused(result)
    result.graph.lint()
    result.recompile()
    return result


def _foldable(node: Node, known: dict[Node, Tensor]) -> bool:
    target = node.target
    return (
        node.op == "call_function"
        and isinstance(target, torch._ops.OpOverload)
        and target not in _VIEWS
        and bool(node.all_input_nodes)
        and all(n in known for n in node.all_input_nodes)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _feeds_constants_only(node: Node, known: dict[Node, Tensor]) -> bool:
    return all(_foldable(user, {**known, node: known[node]}) for user in node.users)


def _materialise(program: Program, node: Node, value: Tensor, known: dict[Node, Tensor]) -> None:
    name = _weight_name(node) or f"folded_{node.name}"
    while _exists(program, name):
        name += "_"
    module, leaf = owner(program, name)
    if value.is_floating_point():
        module.register_parameter(leaf, torch.nn.Parameter(value.contiguous(), requires_grad=False))
    else:
        module.register_buffer(leaf, value)
    with program.graph.inserting_before(node):
        constant = program.graph.get_attr(name)
    constant.meta = dict(node.meta)
    known[constant] = value
    node.replace_all_uses_with(constant)


def _weight_name(node: Node) -> str | None:
    """`a.weight` for what is computed from `a.weight_orig`."""
    for source in node.all_input_nodes:
        if source.op == "get_attr" and str(source.target).endswith("_orig"):
            return str(source.target).removesuffix("_orig")
    return None


def _exists(program: Program, name: str) -> bool:
    try:
        fetch_any(program, name)
    except AttributeError:
        return False
    return True
