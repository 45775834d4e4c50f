"""What passes share: copying a program and replacing its tensors without touching the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from . import compat

Program = torch.fx.GraphModule


def copy_program(program: Program) -> Program:
    """A program with its own graph and module containers; the tensors are shared."""
    graph = torch.fx.Graph()
    copied: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in program.graph.nodes:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph._codegen = program.graph._codegen
    result = torch.fx.GraphModule(program, graph, class_name="Program")
    result._tracer_cls = None
    result.meta = dict(program.meta)
    result.eval()
    return result


def owner(program: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter `name`, and the parameter's last name."""
    path, _, leaf = name.rpartition(".")
    return program.get_submodule(path), leaf


def fetch_any(program: nn.Module, name: str) -> Any:
    """What a get_attr node of target `name` finds. Raises AttributeError where the program does not hold it."""
    module, leaf = owner(program, name)
    return getattr(module, leaf)


def fetch(program: nn.Module, name: str) -> Tensor:
    """The parameter or buffer `name`, without its gradient."""
    return fetch_any(program, name).detach()


def count_elements(program: Program) -> int:
    """The elements of all parameters, tied ones counted once."""
    return sum(p.numel() for p in program.parameters())


def replace_parameter(program: Program, names: list[str], value: Tensor, requires_grad: bool = False) -> None:
    """Puts one new parameter under all of its names."""
    parameter = nn.Parameter(value, requires_grad)
    for name in names:
        module, leaf = owner(program, name)
        module._parameters[leaf] = parameter


def named_arguments(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a call was given, by the names in the op's schema; of what is no ATen op by position."""
    if not isinstance(op, torch._ops.OpOverload):
        return {**{str(place): value for place, value in enumerate(args)}, **kwargs}
    return {**dict(zip((argument.name for argument in op._schema.arguments), args)), **kwargs}


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a node by the names in its op's schema, defaults filled in."""
    given = named_arguments(node.target, node.args, node.kwargs)
    if not isinstance(node.target, torch._ops.OpOverload):
        return given
    schema = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    known = {**defaults, **given}
    return {argument.name: known[argument.name] for argument in schema if argument.name in known}


def node_of(node: Node, name: str) -> Node:
    """The node that stands for one argument of an op."""
    found = arguments(node)[name]
    assert isinstance(found, Node)
    return found


def sizes(shape: Any) -> tuple[Any, ...]:
    """A shape or strides in which symbolic sizes are expressions, so that comparing adds no condition."""
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in shape)


def same_shape(a: Node, b: Node) -> bool:
    """Whether two nodes have tensors of one shape, symbolic sizes included."""
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, Tensor) and isinstance(y, Tensor) and sizes(x.shape) == sizes(y.shape)


def set_argument(node: Node, name: str, value: Any) -> None:
    """Set an argument of an op by its schema name, where it stands or as a keyword."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    index = next(place for place, argument in enumerate(schema) if argument.name == name)
    if index < len(node.args):
        node.update_arg(index, value)
    elif index == len(node.args) and not schema[index].kwarg_only and name not in node.kwargs:
        node.args = (*node.args, value)
    else:
        node.update_kwarg(name, value)


def drop_unused(program: Program) -> None:
    """Removes parameters and buffers that nothing uses any more. A tied tensor that is used keeps all its names."""
    reads = {n: fetch_any(program, str(n.target)) for n in program.graph.find_nodes(op="get_attr")}
    used = {id(value) for node, value in reads.items() if node.users}
    for node, value in reads.items():
        if id(value) not in used:
            program.graph.erase_node(node)
    read = {str(n.target) for n in program.graph.find_nodes(op="get_attr")}
    for path, module in program.named_modules():
        for table in (module._parameters, module._buffers):
            for leaf in [k for k in table if f"{path}.{k}".lstrip(".") not in read]:
                del table[leaf]


def keep_name(weight: str) -> str:
    """The buffer in which a result that trains holds the mask of a weight: a name that torch's pruning leaves free."""
    return f"{weight}_keep"


def in_caches(program: Program) -> dict[Node, str]:
    """The nodes that a program hands out within a cache of transformers, and the name of its class."""
    info = getattr(program.graph._codegen, "pytree_info", None)
    leaves = pytree.tree_leaves(program.graph.output_node().args[0])
    found: dict[Node, str] = {}

    def walk(spec: Any, kind: str, first: int) -> None:
        name = getattr(spec.type, "__name__", "")
        kind = name if name.endswith("Cache") else kind
        if spec.is_leaf() and kind and isinstance(leaves[first], Node):
            found[leaves[first]] = kind
        for child in compat.children_of(spec):
            walk(child, kind, first)
            first += child.num_leaves

    if info is not None and info.out_spec is not None:
        walk(info.out_spec, "", 0)
    return found


def names_of_parameters(program: Program) -> dict[str, str]:
    """Every parameter name -> the first name of the same tensor, so that tied weights have one identity."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name) for name, tensor in program.named_parameters(remove_duplicate=False)
    }


def replace_tensors(module: nn.Module, change: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Puts `change(tensor)` in place of every parameter and buffer; tied ones stay tied. Returns old id -> new."""
    held: list[Tensor] = []  # so that no id is given away while it stands for a tensor
    new: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, old in table.items():
                if old is not None and id(old) not in new:
                    held.append(old)
                    new[id(old)] = change(old)
                if old is not None:
                    table[name] = new[id(old)]  # pyright: ignore[reportArgumentType]
    return new


def put_values(program: Program, values: Mapping[str, Tensor]) -> Program:
    """A copy of the program with these values (parameters and buffers by name) in place of its own.

    They are copied, so that the program shares no storage with them. A tied parameter has its value under all of its
    names. Names that the program lacks, such as those of blocks that were dropped, are passed over.
    """
    if not values:
        return program
    result = copy_program(program)
    canonical = names_of_parameters(result)
    buffers = dict(result.named_buffers())
    for name, value in values.items():
        names = [alias for alias, first in canonical.items() if first == canonical.get(name)]
        if names:
            replace_parameter(result, names, value.to(result.get_parameter(name).device, copy=True))
        elif name in buffers:
            module, leaf = owner(result, name)
            module._buffers[leaf] = value.to(buffers[name].device, copy=True)
    return result
