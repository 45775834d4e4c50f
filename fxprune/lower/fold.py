"""fold: masks become part of the weights, and batch-norm part of the convolution before it (inference only)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.graph.program import (
    Program,
    copy_program,
    drop_unused,
    fetch,
    names_of_parameters,
    owner,
    replace_parameter,
)
from fxprune.graph.weights import norm_behind
from fxprune.select.selection import Selection
from fxprune.select.subnormal import flush_hidden

aten = torch.ops.aten
_CONVS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}


def fold(program: Program, selection: Selection) -> Program:
    """A copy with the selection's masks in its weights and its batch-norms in their convolutions."""
    return fold_batch_norm(fold_masks(program, selection))


def fold_masks(program: Program, selection: Selection) -> Program:
    """A copy of the program whose masked weights hold +0.0 where the selection removed them."""
    result = copy_program(program)
    canonical = names_of_parameters(result)
    for name in selection.mask:
        aliases = [n for n, first in canonical.items() if first == name]
        module, leaf = owner(result, name)
        weight = module._parameters[leaf]
        if weight is not None:
            replace_parameter(result, aliases, selection.apply(name, weight.detach()))
    return result


def fold_batch_norm(program: Program) -> Program:
    """A copy with each inference batch-norm folded into the convolution before it.

    Folds where the convolution's output has no other reader and neither its weight nor its bias is used elsewhere.
    w' = w * g / sqrt(var + eps), b' = (b - mean) * g / sqrt(var + eps) + beta, computed in float64. What becomes
    subnormal beside ordinary numbers is zero.
    """
    result = copy_program(program)
    for node in list(result.graph.nodes):
        if node.target is aten.batch_norm.default and _foldable(node):
            _fold(result, node)
    result.graph.lint()
    drop_unused(result)
    result.recompile()
    return result


def _foldable(norm: Node) -> bool:
    conv = norm.args[0]
    if not (isinstance(conv, Node) and conv.target in _CONVS and norm_behind(conv) is norm and not conv.kwargs):
        return False
    constants = [a for a in conv.args[1:3] if a is not None]
    if not all(isinstance(a, Node) and a.op == "get_attr" for a in constants):
        return False
    reads = norm.graph.find_nodes(op="get_attr", target=constants[0].target)  # pyright: ignore
    return sum(len(read.users) for read in reads) == 1


def _fold(program: Program, norm: Node) -> None:
    conv = norm.args[0]
    assert isinstance(conv, Node)
    weight_node = conv.args[1]
    assert isinstance(weight_node, Node)
    weight = fetch(program, str(weight_node.target))
    gamma, beta, mean, var = (_optional(program, a) for a in norm.args[1:5])
    assert mean is not None and var is not None
    eps = float(norm.args[7])  # pyright: ignore[reportArgumentType]
    scale = (var.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    old_bias = _optional(program, conv.args[2] if len(conv.args) > 2 else None)
    bias = -mean.double() * scale if old_bias is None else (old_bias.double() - mean.double()) * scale
    if beta is not None:
        bias = bias + beta.double()
    new_weight = (weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    name = str(weight_node.target)
    module, leaf = owner(program, name)
    replace_parameter(program, [name], flush_hidden(new_weight))
    bias_name = f"{name.rpartition('.')[0]}.{leaf}_folded_bias".lstrip(".")
    module._parameters[f"{leaf}_folded_bias"] = torch.nn.Parameter(
        flush_hidden(bias.to(weight.dtype)), requires_grad=False
    )
    read = [a for a in (*conv.args[2:3], *norm.args) if isinstance(a, Node) and a.op == "get_attr"]
    with program.graph.inserting_before(conv):
        bias_node = program.graph.get_attr(bias_name)
    arguments = list(conv.args)
    arguments[2:3] = [bias_node]
    conv.args = tuple(arguments)
    norm.replace_all_uses_with(conv)
    program.graph.erase_node(norm)
    for node in dict.fromkeys(read):
        if not node.users:
            program.graph.erase_node(node)


def _optional(program: Program, argument: object) -> Tensor | None:
    return fetch(program, str(argument.target)) if isinstance(argument, Node) else None
