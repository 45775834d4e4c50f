"""add_constants: puts the constants of what left a graph into biases, or where there are none, into the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.couple.rules import packet_name
from fxprune.graph.program import Program, arguments, fetch, fetch_any, owner, set_argument
from fxprune.graph.weights import norm_behind
from fxprune.shrink.dead.products import CONVS

aten = torch.ops.aten


def add_constants(program: Program, constants: Mapping[str, Tensor], *, wide: bool = False) -> None:
    """Adds to the output of each named node a constant that broadcasts to it, in place.

    The constants are rounded to the output's type, or with `wide` are not, for a program that will run in float32.
    A constant for each channel goes into the bias of a linear layer or convolution, which gets one where it has none.
    Any other is a buffer and a sum of its own, behind the batch-norm that may follow so that both can still be folded.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    reads = Counter(str(n.target) for n in program.graph.nodes if n.op == "get_attr" for _ in n.users)
    tied = Counter(id(p) for _, p in program.named_parameters(remove_duplicate=False))
    for name, constant in constants.items():
        node = nodes[name]
        value = constant if wide else constant.to(node.meta["val"].dtype)
        if _is_for_channels(node, value):
            _into_bias(program, node, value.flatten(), reads, tied)
        else:
            _as_sum(program, node, value)
    program.graph.lint()
    program.recompile()


def _channel(node: Node) -> int | None:
    op = packet_name(node.target)
    return 1 if op in CONVS else node.meta["val"].dim() - 1 if op == "linear" else None


def _is_for_channels(node: Node, constant: Tensor) -> bool:
    at = _channel(node)
    return at is not None and all(size == 1 for dim, size in enumerate(constant.shape) if dim != at)


def _into_bias(program: Program, node: Node, constant: Tensor, reads: Counter[str], tied: Counter[int]) -> None:
    at = _channel(node)
    assert at is not None
    constant = constant.expand(int(node.meta["val"].shape[at]))
    weight, bias = arguments(node)["weight"], arguments(node).get("bias")
    if bias is not None and (bias.op != "get_attr" or reads[str(bias.target)] > 1):
        shape = [1] * node.meta["val"].dim()
        shape[at] = -1
        _as_sum(program, node, constant.reshape(shape))
        return
    name = str(bias.target) if bias is not None else _free_name(program, weight)
    old = fetch(program, name) if bias is not None else None
    if old is not None and tied[id(fetch_any(program, name))] > 1:
        name = _free_name(program, weight)
    module, leaf = owner(program, name)
    value = constant if old is None else (old.double() + constant.double()).to(constant.dtype)
    module.register_parameter(leaf, nn.Parameter(value.contiguous(), requires_grad=False))
    with program.graph.inserting_before(node):
        read = program.graph.get_attr(name)
    read.meta["val"] = node.meta["val"].new_empty([int(node.meta["val"].shape[at])])
    set_argument(node, "bias", read)
    if bias is not None and not bias.users:
        program.graph.erase_node(bias)


def _free_name(program: Program, weight: Any) -> str:
    """`layer.bias` beside `layer.weight` where that name is free, else one made of the weight's."""
    path, _, leaf = str(weight.target).rpartition(".") if weight.op == "get_attr" else ("", "", weight.name)
    module = program.get_submodule(path)
    name = "bias" if leaf == "weight" else f"{leaf}_bias"
    while hasattr(module, name) and getattr(module, name) is not None:
        name = f"{leaf}_{name}"
    return f"{path}.{name}".lstrip(".")


def _as_sum(program: Program, node: Node, constant: Tensor) -> None:
    norm = norm_behind(node)
    if norm is not None:
        constant, node = (constant * _scale(program, norm)).to(constant.dtype), norm
    name = f"{node.name}_constant"
    program.register_buffer(name, constant.contiguous())
    with program.graph.inserting_after(node):
        read = program.graph.get_attr(name)
    read.meta["val"] = node.meta["val"].new_empty(constant.shape)
    with program.graph.inserting_after(read):
        total = program.graph.call_function(aten.add.Tensor, (node, read))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _scale(program: Program, norm: Node) -> Tensor:
    """What a batch-norm multiplies by, [1, c, 1, ...]."""
    named = arguments(norm)
    scale = (fetch(program, str(named["running_var"].target)).double() + float(named["eps"])).rsqrt()
    if named.get("weight") is not None:
        scale = scale * fetch(program, str(named["weight"].target)).double()
    return scale.reshape(1, -1, *[1] * (norm.meta["val"].dim() - 2))
