"""validate: every call of a packed op in a graph, and the tensors that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxprune.errors import FileError
from fxprune.graph.program import fetch_any
from fxprune.kernels.masked_linear import masked_linear
from fxprune.kernels.native.segments import Segments
from fxprune.lower.layouts import LAYOUTS
from fxprune.lower.layouts.bitmap import Bitmap
from fxprune.lower.layouts.gpu import GpuLayout

from .bits import fault_of_bitmap, fault_of_tiles
from .nets import fault_of_net
from .segments import fault_of_segments, first

_Faults = Callable[[Mapping[str, Tensor], Mapping[str, Any]], str]


def validate(root: nn.Module, graph: Graph) -> None:
    """Raises FileError where packed tensors are not of their format, are computed, or are open to writes."""
    packed: dict[int, str] = {}
    for node in graph.nodes:
        given = _given(node)
        if given is None:
            continue
        tensors, others, faults = given
        read = {name: _tensor(root, node, name, value) for name, value in tensors.items()}
        for name, tensor in read.items():
            packed[tensor.untyped_storage().data_ptr()] = f"{node.name}.{name}"
        try:
            fault = faults(read, others)
        except (RuntimeError, ValueError, TypeError, LookupError, OverflowError) as error:
            fault = f"they cannot be read ({error})"
        if fault:
            raise _refused(node, fault)
    packed.pop(0, None)
    _refuse_other_readers(root, graph, packed)


def _given(node: Node) -> tuple[dict[str, Any], dict[str, Any], _Faults] | None:
    """The packed tensors and the other arguments of a call of a packed op, and what finds their faults."""
    if node.target is masked_linear:
        names = ("x", "weight", "bits", "bias")
        arguments = {**dict(zip(names, node.args)), **node.kwargs}
        return {"bits": arguments["bits"]}, {}, lambda tensors, _: _fault_of_mask(tensors["bits"])
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "fxprune":
        return None
    name = node.target._schema.name.removeprefix("fxprune::")
    if node.kwargs or name not in _OPS:
        if name in _FREE:
            return None
        raise _refused(node, f"fxprune::{name} is not called so by a saved result")
    names = [argument.name for argument in node.target._schema.arguments]
    arguments: dict[str, Any] = dict(zip(names, node.args))
    if name == "packed_linear":
        layout = LAYOUTS.get(str(arguments["layout"]))
        layout = layout.cuda if isinstance(layout, Bitmap) else layout
        if not isinstance(layout, GpuLayout) or len(arguments["packed"]) != len(layout.tensors):
            raise _refused(node, "there is no such layout")
        return dict(zip(layout.tensors, arguments["packed"])), {**arguments, "of": layout}, _fault_of_packed
    tensors, faults = _OPS[name]
    return {key: arguments[key] for key in tensors}, arguments, faults


def _fault_of_nonzeros(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> str:
    values, columns, order, counts, blocks = tensors.values()
    kinds = [tensor.dtype for tensor in tensors.values()]
    if kinds != [torch.float32, torch.int16, torch.int16, torch.int16, torch.int64] or len(blocks) < 5:
        return "its tensors are of other kinds"
    o, i, rows, k_block = blocks[:4].tolist()
    if min(o, i, rows, k_block) < 1 or max(rows, k_block) > 0x7FFF:
        return "a size is not what it can be"
    k_blocks = -(-i // k_block)
    last = first(i - (k_blocks - 1) * k_block)
    segments = Segments(values, columns, order, counts, blocks[4:])
    return fault_of_segments(segments, o, rows, k_blocks, first(k_block), last)


def _fault_of_packed(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> str:
    """Unpacked and packed again it must be the same: nothing is known of its format here."""
    layout, shape = others["of"], others["shape"]
    if layout.name == "cusparselt":
        return "its format is the library's alone, and no file holds it"
    if len(shape) != 2 or min(shape) < 1:
        return "it has no shape"
    weight = layout.join(list(tensors.values()), (shape[0], shape[1]))
    again = layout.split(weight)
    same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors.values(), again, strict=True))
    return "" if same else "it is not as this layout packs a weight"


def _fault_of_mask(bits: Tensor) -> str:
    return "" if bits.dtype == torch.uint8 and bits.dim() == 1 else "a mask is no bits"


# Op -> the names of its packed tensors, and what finds their faults.
_OPS: dict[str, tuple[tuple[str, ...], _Faults]] = {
    "packed_linear": ((), _fault_of_packed),
    "net": (
        ("values", "columns", "order", "counts", "starts", "dense", "words", "brains"),
        lambda tensors, others: fault_of_net(tensors, others["program"]),
    ),
}
for _op in ("", "_split"):
    _OPS[f"nonzeros_linear{_op}"] = (("values", "columns", "order", "counts", "blocks"), _fault_of_nonzeros)
    _OPS[f"bitmap_linear{_op}"] = (("bits", "values", "rows"), lambda tensors, _: fault_of_bitmap(**tensors))
    _OPS[f"tiles_linear{_op}"] = (
        ("values", "bits", "columns", "starts"),
        lambda tensors, _: fault_of_tiles(**tensors),
    )
# These take no packed tensors, and look at all that they are given.
_FREE = {"attention"}


def _tensor(root: nn.Module, node: Node, name: str, value: Any) -> Tensor:
    """The tensor of the file that a packed op is given. Raises FileError where it is computed."""
    if not isinstance(value, Node) or value.op != "get_attr":
        raise _refused(node, f"{name} is computed")
    try:
        found = fetch_any(root, str(value.target))
    except AttributeError:
        found = None
    if not isinstance(found, Tensor) or isinstance(found, nn.Parameter) or not found.is_contiguous():
        raise _refused(node, f"{name} is no buffer of the file")
    return found


def _refuse_other_readers(root: nn.Module, graph: Graph, packed: Mapping[int, str]) -> None:
    """What another op reads it might write to, or hand out to who writes."""
    for node in graph.find_nodes(op="get_attr"):
        try:
            value = fetch_any(root, str(node.target))
        except AttributeError as error:
            raise FileError("cannot read the file", where=f"node {node.name}", why=str(error)) from error
        if not isinstance(value, Tensor) or value.untyped_storage().data_ptr() not in packed:
            continue
        for user in node.users:
            given = _given(user)
            if given is None or sum(value is node for value in _flat(user.args)) != sum(
                value is node for value in given[0].values()
            ):
                raise _refused(
                    user, f"it reads {packed[value.untyped_storage().data_ptr()]}, which is a packed weight's"
                )


def _flat(arguments: Sequence[Any]) -> list[Any]:
    return [each for value in arguments for each in (_flat(value) if isinstance(value, (list, tuple)) else [value])]


def _refused(node: Node, why: str) -> FileError:
    return FileError("cannot use a packed weight of the file", where=f"node {node.name}", why=why)
