"""masks: weights multiplied by their masks where they are read, so that what is zero stays zero in training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxprune.capture.own_masks import Held
from fxprune.errors import InputError
from fxprune.graph.program import Program, keep_name, names_of_parameters, owner
from fxprune.kernels.masked_linear import masked_linear
from fxprune.select.mask import PackedMask

aten = torch.ops.aten


def mask_weights(
    draft: Program, masks: Mapping[str, PackedMask], holders: Mapping[str, Held], masked_matmul: bool
) -> set[str]:
    """Multiplies weights by their masks where they are read; returns the names of the mask buffers that are new."""
    canonical = names_of_parameters(draft)
    readers: dict[str, list[Node]] = {}
    for node in draft.graph.nodes:
        if node.op == "get_attr" and node.users and str(node.target) in canonical:
            readers.setdefault(canonical[str(node.target)], []).append(node)
    names: set[str] = set()
    for name, mask in masks.items():
        first = canonical.get(name)
        if first is None or tuple(draft.get_parameter(first).shape) != tuple(mask.shape):
            shape = "no parameter" if first is None else list(draft.get_parameter(first).shape)
            raise InputError(f'cannot mask "{name}"', why=f"the mask is {list(mask.shape)}, the program has {shape}")
        parameter = draft.get_parameter(first)
        keep = mask.unpack().to(parameter.device)
        parameter.data = parameter.detach().masked_fill(~keep, 0)
        held = next((holders[alias] for alias, own in canonical.items() if own == first and alias in holders), None)
        reads = readers.get(first, [])
        in_matmul = masked_matmul and all(map(_only_linears, reads)) and (held is None or held.name == keep_name(first))
        value = mask.bits.to(parameter.device) if in_matmul else keep
        if held is None:
            buffer = keep_name(first)
            module, leaf = owner(draft, buffer)
            while hasattr(module, leaf):
                buffer, leaf = buffer + "_", leaf + "_"
            names.add(buffer)
        else:
            buffer = held.name
            value = value if in_matmul or held.dtype is None else value.to(held.dtype)
        _put_buffer(draft, buffer, value)
        for read in reads:
            (_mask_in_linears if in_matmul else _multiply)(draft.graph, read, buffer)
    return names


def _put_buffer(draft: Program, name: str, value: Tensor) -> None:
    """Registers a buffer, in modules made for it where the program has none any more."""
    module: nn.Module = draft
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_buffer(leaf, value)


def _only_linears(read: Node) -> bool:
    """Whether a weight is read by linear layers alone, and as their weight."""
    return all(
        user.target is aten.linear.default and user.args[1] is read and read not in (user.args[0], *user.args[2:])
        for user in read.users
    )


def _mask_in_linears(graph: Graph, read: Node, buffer: str) -> None:
    """linear(x, weight, bias) -> masked_linear(x, weight, bits, bias) wherever `read` is the weight."""
    for linear in list(read.users):
        x, weight, *bias = linear.args
        bias = bias or [linear.kwargs.get("bias")]
        with graph.inserting_before(linear):
            bits = graph.get_attr(buffer)
            product = graph.call_function(masked_linear, (x, weight, bits, *bias))
        linear.replace_all_uses_with(product)
        graph.erase_node(linear)


def _multiply(graph: Graph, read: Node, buffer: str) -> None:
    """weight -> weight * mask for all that reads it."""
    with graph.inserting_after(read):
        keep = graph.get_attr(buffer)
    with graph.inserting_after(keep):
        masked = graph.call_function(aten.mul.Tensor, (read, keep))
    read.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)
