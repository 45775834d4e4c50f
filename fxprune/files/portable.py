"""portable: weights in a format that only a library on this machine reads, in one that any machine reads, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.emit.pruned import PrunedModule
from fxprune.graph.note import Note, some
from fxprune.graph.program import Program, copy_program, drop_unused, fetch, owner
from fxprune.lower.layouts import LAYOUTS
from fxprune.lower.layouts.gpu import GpuLayout, op
from fxprune.lower.layouts.site import Packed

_OWN, _OPEN = "cusparselt", "semi24"


def portable(result: GraphModule) -> Program:
    """The result, or a copy of it in which weights of cuSPARSELt are in the open 2:4 format."""
    names = {node.name for node in result.graph.nodes if _is_in(node, _OWN)}
    if not names:
        return result
    copied = copy_program(result)
    _change(copied, [node for node in copied.graph.nodes if node.name in names], _OPEN)
    return copied


def restore(result: PrunedModule) -> None:
    """Puts weights that its report says were in cuSPARSELt's format into it again, in place, where it is to be had."""
    stored = {weight.name for weight in result.report.weights if weight.layout == _OWN}
    nodes = [node for node in result.graph.nodes if _is_in(node, _OPEN) and _name(node) in stored]
    if not nodes:
        return
    if torch.cuda.is_available() and torch.backends.cusparselt.is_available():
        _change(result, [node for node in nodes if _tensors(result, node)[0].is_cuda], _OWN)
    else:
        names = some(sorted(map(_name, nodes)))
        note = Note(
            f"there is no cuSPARSELt here, so that these weights are in the layout {_OPEN}: {names}", "fallback"
        )
        result.meta["report"].notes.append(note)


def _change(program: Program, nodes: Sequence[Node], layout: str) -> None:
    for node in nodes:
        _repack(program, node, layout)
    drop_unused(program)
    program.recompile()


def _is_in(node: Node, layout: str) -> bool:
    return node.target is op and node.args[3] == layout


def _name(node: Node) -> str:
    """The weight's name: its tensors are called `<weight>.<tensor>`."""
    return str(node.args[1][0].target).rpartition(".")[0]  # pyright: ignore


def _tensors(program: Program, node: Node) -> list[Tensor]:
    return [fetch(program, str(tensor.target)) for tensor in node.args[1]]  # pyright: ignore


def _repack(program: Program, node: Node, name: str) -> None:
    x, before_reads, bias, old, shape, activation = node.args
    before, after = LAYOUTS[str(old)], LAYOUTS[name]
    assert isinstance(before, GpuLayout) and isinstance(after, GpuLayout)
    weight_name = _name(node)
    packed = _tensors(program, node)
    weight = before.unpack(Packed(str(old), (shape[0], shape[1]), dict(zip(before.tensors, packed))))  # pyright: ignore
    module, leaf = owner(program, weight_name)
    holder = nn.Module()
    for key, value in zip(after.tensors, after.split(weight)):
        holder.register_buffer(key, value)
    module._modules[leaf] = holder
    with program.graph.inserting_before(node):
        reads = [program.graph.get_attr(f"{weight_name}.{key}") for key in after.tensors]
    node.args = (x, reads, bias, name, shape, activation)
    for read in before_reads:  # pyright: ignore
        if not read.users:  # pyright: ignore
            program.graph.erase_node(read)  # pyright: ignore
