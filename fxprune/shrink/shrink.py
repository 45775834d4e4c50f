"""shrink: the one place where sizes change. Slices parameters, and re-derives every literal that came from an axis.

Sizes that the graph computes (symbolic ones) keep meaning the old sizes; where one enters a view it is scaled, and
where one is read off a tensor that shrank it is scaled back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.couple.axis import Axis, atoms
from fxprune.couple.coupling import Coupling
from fxprune.couple.indices import kept_indices
from fxprune.couple.rules import Dims, Resize
from fxprune.graph.memory import base, writes
from fxprune.graph.program import Program, copy_program, fetch, fetch_any, replace_parameter, set_argument

from .add_constants import add_constants

aten = torch.ops.aten


def shrink(
    program: Program,
    coupling: Coupling,
    keep: Mapping[str, Tensor],
    constants: Mapping[str, Tensor] | None = None,
    instead: Mapping[str, tuple[int, int, Tensor]] | None = None,
    *,
    wide: bool = False,
) -> Program:
    """A copy of the program in which each group named in `keep` has only those indices (int64, ascending).

    `constants` are added to the outputs of the nodes that they name, as they were before anything left, and `instead`
    says what stands at one index of one dimension of a weight; with `wide` neither is rounded to half types. `coupling`
    must be that of `program`, which is not changed; tensors that do not shrink are shared with it. Raises PlanError for
    a group that the program does not have.
    """
    by_atom = coupling.atoms_of(keep)
    result = copy_program(program)
    if not by_atom:
        return result
    for name, (dim, index, values) in (instead or {}).items():
        _replace_slice(result, name, dim, index, values, wide=wide)
    _slice_tensors(result, coupling.kept(keep))
    copies = {node.name: node for node in result.graph.nodes}
    _refresh_values(program, coupling, by_atom, copies)
    for old in program.graph.nodes:
        node = copies[old.name]
        if old.target is aten.sym_size.int:
            _pin_size(node, coupling.values.get(old.args[0]), by_atom)
        elif old in coupling.ruled:
            _resize_call(node, coupling, old, by_atom, copies)
    if constants:
        nodes = {node.name: node for node in program.graph.nodes}
        add_constants(
            result, {n: _shrunk(c, coupling.values[nodes[n]], by_atom) for n, c in constants.items()}, wide=wide
        )
    _copy_where_strides_ask(result)
    result.graph.lint()
    result.recompile()
    return result


def _copy_where_strides_ask(program: Program) -> None:
    """Views of what attention makes become reshapes: its kernels leave strides of their own, by the width of a head.

    The model's `contiguous` before such a view is not in the graph where it had nothing to do.
    """
    written = {memory for node in program.graph.nodes for memory in writes(node)}
    for node in program.graph.find_nodes(op="call_function", target=aten.view.default):
        memory = base(node)
        if memory.target is aten.scaled_dot_product_attention.default and memory not in written and not node.kwargs:
            node.target = aten.reshape.default


def _shrunk(constant: Tensor, dims: Dims, by_atom: Mapping[Axis, Tensor]) -> Tensor:
    """What a constant adds to the indices that stay of an output."""
    cuts = [(d, axis) for d, axis in enumerate(dims.axes) if constant.shape[d] > 1]
    changed = [(d, axis) for d, axis in cuts if any(atom in by_atom for atom in atoms(axis))]
    return slice_tensor(constant, [(d, kept_indices(axis, by_atom)) for d, axis in changed])


def _replace_slice(program: Program, name: str, dim: int, index: int, values: Tensor, *, wide: bool) -> None:
    weight = fetch(program, name)
    weight = weight.float() if wide and values.dtype is torch.float32 else weight.clone()
    weight.select(dim, index).copy_(values)
    replace_parameter(program, [name], weight)


def _slice_tensors(program: Program, kept: Mapping[str, list[tuple[int, Tensor]]]) -> None:
    sliced: dict[int, Any] = {}
    wanted: dict[int, list[tuple[int, Tensor]]] = {}
    for name, cuts in kept.items():
        wanted[id(fetch_any(program, name))] = cuts
    # Every name of a tied tensor gets the one new tensor.
    for module in program.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for leaf, tensor in list(table.items()):
                if not isinstance(tensor, Tensor) or id(tensor) not in wanted:
                    continue
                if id(tensor) not in sliced:
                    value = slice_tensor(tensor.detach(), wanted[id(tensor)])
                    if isinstance(tensor, nn.Parameter):
                        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
                    sliced[id(tensor)] = value
                table[leaf] = sliced[id(tensor)]


def slice_tensor(tensor: Tensor, cuts: list[tuple[int, Tensor]]) -> Tensor:
    """The tensor with only these indices along these dimensions, contiguous."""
    for dim, indices in cuts:
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor


def _pin_size(node: Node, dims: Any, by_atom: Mapping[Axis, Tensor]) -> None:
    """A size read off a tensor that shrank is scaled back, for what is computed from it means the old size."""
    sizes = Resize(by_atom, lambda *_: node)
    if not isinstance(dims, Dims) or not sizes.changed(dims[int(str(node.args[1]))]):
        return
    axis = dims[int(str(node.args[1]))]
    users = list(node.users)
    value: Any = node.meta.get("val")
    if value is not None:
        node.meta["val"] = value // sizes.old(axis) * sizes.number(axis)
    scaled = _scaler(node.graph, after=node)(node, sizes.old(axis), sizes.number(axis))
    for user in users:
        user.replace_input_with(node, scaled)


def _scaler(graph: torch.fx.Graph, *, before: Node | None = None, after: Node | None = None) -> Callable[..., Node]:
    """Makes nodes for value * new // old at one place of the graph."""

    def scale(value: Node, new: int, old: int) -> Node:
        place = graph.inserting_before(before) if before is not None else graph.inserting_after(after)
        with place:
            product = graph.call_function(operator.mul, (value, new))
        with graph.inserting_after(product):
            result = graph.call_function(operator.floordiv, (product, old))
        if "val" in value.meta:
            product.meta["val"] = value.meta["val"] * new
            result.meta["val"] = value.meta["val"] * new // old
        return result

    return scale


def _resize_call(
    node: Node, coupling: Coupling, old: Node, by_atom: Mapping[Axis, Tensor], copies: Mapping[str, Node]
) -> None:
    call = coupling.ruled[old]
    if call.rule.resize is None or not call.carries(by_atom):
        return
    make = _scaler(node.graph, before=node)
    sizes = Resize(by_atom, lambda value, new, before: make(copies[value.name], new, before))
    changed = call.rule.resize(sizes, call.out, **call.arguments)
    if (pieces := changed.pop("pieces", None)) is not None:
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], pieces, call.arguments.get("dim", 0)), {}
    if (target := changed.pop("target", None)) is not None:
        node.target, node.args, node.kwargs = target, node.args[:1], {}
    if (factor := changed.pop("output_scale", None)) is not None:
        _scale_output(node, factor)
    for dim, indices in changed.pop("select", ()):
        _select_output(node, old, dim, indices)
    for name, value in changed.items():
        set_argument(node, name, _in_copy(value, copies))


def _in_copy(value: Any, copies: Mapping[str, Node]) -> Any:
    """Nodes of the original graph replaced by their copies."""
    if isinstance(value, list):
        return [_in_copy(item, copies) for item in value]
    return copies.get(value.name, value) if isinstance(value, Node) else value


def _scale_output(node: Node, factor: float) -> None:
    with node.graph.inserting_after(node):
        scaled = node.graph.call_function(aten.mul.Tensor, (node, factor))
    scaled.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _select_output(node: Node, old: Node, dim: int, indices: Tensor) -> None:
    """The op runs as before, over all indices, and those that leave are taken off its output."""
    graph = node.graph
    name = f"{node.name}_kept_{dim}"
    assert graph.owning_module is not None
    graph.owning_module.register_buffer(name, indices.to(old.meta["val"].device), persistent=False)
    with graph.inserting_after(node):
        kept = graph.get_attr(name)
    with graph.inserting_after(kept):
        selected = graph.call_function(aten.index_select.default, (node, dim, kept))
    shrunk = selected.meta["val"] = node.meta["val"]
    # Its other dimensions shrink with what it reads.
    shape = [*shrunk.shape[:dim], old.meta["val"].shape[dim], *shrunk.shape[dim + 1 :]]
    node.meta["val"] = shrunk.new_empty(shape)
    node.replace_all_uses_with(selected, delete_user_cb=lambda user: user is not selected)


def _refresh_values(
    program: Program, coupling: Coupling, by_atom: Mapping[Axis, Tensor], copies: Mapping[str, Node]
) -> None:
    """Give meta["val"] of every value that shrank its new shape. Strides keep their order, without gaps."""
    sizes = Resize(by_atom, lambda value, *_: value)
    for old in program.graph.nodes:
        dims, value = coupling.values.get(old), old.meta.get("val")
        if isinstance(dims, Dims) and isinstance(value, Tensor):
            copies[old.name].meta["val"] = _resized(sizes, dims, value)
        elif isinstance(dims, list) and isinstance(value, (list, tuple)):
            resized = [_resized(sizes, d, v) if isinstance(v, Tensor) else v for d, v in zip(dims, value)]
            copies[old.name].meta["val"] = type(value)(resized) if type(value) in (list, tuple) else tuple(resized)


def _resized(sizes: Resize, dims: Dims, value: Tensor) -> Tensor:
    if not any(sizes.changed(axis) for axis in dims.axes):
        return value
    shape = [
        size // sizes.old(axis) * sizes.number(axis) if sizes.changed(axis) else size
        for axis, size in zip(dims.axes, value.shape)
    ]
    strides: list[Any] = [0] * len(shape)
    step: Any = 1
    for dim in sorted(range(len(shape)), key=lambda d: _hint(value.stride(d))):
        if _hint(value.stride(dim)) != 0 or _hint(shape[dim]) == 1:
            strides[dim] = step
            step = step * shape[dim]
    return value.new_empty_strided(shape, strides)


def _hint(size: Any) -> int:
    """A size as a number to sort by: the example's, for a symbolic one."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.hint is not None else 1 << 40
