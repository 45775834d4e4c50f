"""linear: a linear by a packed weight, as aten.linear by the dense one and the activation that follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.errors import InputError
from fxprune.graph.program import arguments

from ..layouts import LAYOUTS
from ..layouts.bitmap import Bitmap, CpuBitmap
from ..layouts.cpu import CpuLayout
from ..layouts.gpu import GpuLayout
from ..layouts.site import Packed
from .store import Store, Writer

aten = torch.ops.aten
_LAYOUTS = [(each.cpu if isinstance(each, Bitmap) else each) for each in LAYOUTS.values()]
_CPU: dict[Any, CpuLayout] = {
    op: each for each in _LAYOUTS if isinstance(each, CpuLayout) for op in (each.op, each.split_op)
}
OPS = (*_CPU, torch.ops.fxprune.packed_linear.default)


def write_linear(w: Writer) -> Node | list[Node]:
    """activation(x [..., i] @ W^T + bias) [..., o], or one such for each part that the rows of W are dealt out to.

    Weights that were stored together come back apart, the first at their name, the others with numbers behind it.
    """
    store, given = w.store, arguments(w.node)
    packed, parts = _packed_nodes(given, w.node)
    widens = _widens(store, w.node, packed)

    def put() -> list[str]:
        weight = _weight(store, w.node, packed, bool(widens))
        name = store.vacate(packed) or "weight"
        rows = [weight] if len(parts) == 1 else [part.clone() for part in weight.split(parts)]
        return [store.put(name, each) for each in rows]

    names = store.once((*(node.target for node in packed), widens, *parts), put)
    results = []
    for name, bias in zip(names, _biases(w, packed, given["bias"], parts), strict=True):
        weight = w.read(name)
        if widens is None:
            weight = w.call(aten.type_as.default, weight, given["x"])
        y = w.call(aten.linear.default, given["x"], weight, bias)
        results.append(w.activate(y, given["activation"]))
    return results if isinstance(given.get("out_features"), (list, tuple)) else results[0]


def _packed_nodes(given: dict[str, Any], node: Node) -> tuple[list[Node], list[int]]:
    """The nodes of the packed tensors, and the rows of each result."""
    if node.target in _CPU:
        rows = given["out_features"]
        tensors = [given[name] for name in _CPU[node.target].tensors]
        return tensors, list(rows) if isinstance(rows, (list, tuple)) else [rows]
    return list(given["packed"]), [given["shape"][0]]


def _gpu(node: Node) -> GpuLayout:
    name = arguments(node)["layout"]
    layout = LAYOUTS.get(name)
    layout = layout.cuda if isinstance(layout, Bitmap) else layout
    if not isinstance(layout, GpuLayout):
        known = sorted(each.name for each in LAYOUTS.values() if isinstance(each, (GpuLayout, Bitmap)))
        raise InputError(
            "cannot unpack a weight",
            where=f"node {node.name}",
            why=f"its layout {name!r} is unknown, known are {', '.join(known)}",
            do="Use the version of fxprune that made the result, or a newer one.",
        )
    return layout


def _weight(store: Store, node: Node, packed: list[Node], widens: bool) -> Tensor:
    """The weight [o, i], bit for bit."""
    tensors = [store.fetch(each) for each in packed]
    if node.target in _CPU:
        # How large it is is told by the tensors.
        layout, shape = _CPU[node.target], (0, 0)
    else:
        o, i = arguments(node)["shape"]
        layout, shape = _gpu(node), (o, i)
    packed_weight = Packed(layout.name, shape, dict(zip(layout.tensors, tensors, strict=True)), widens)
    return LAYOUTS[layout.name].unpack(packed_weight)


def _widens(store: Store, node: Node, packed: list[Node]) -> bool | None:
    """Whether a float32 weight is stored in fewer bits; None where its product's dtype is known at a call only."""
    layout = _CPU.get(node.target)
    if not isinstance(layout, CpuBitmap):
        return False
    stored = store.fetch(packed[layout.tensors.index("values")]).dtype
    given = arguments(node)
    found = [store.dtypes.get(each) for each in (given["bias"], given["x"]) if each is not None]
    dtype = next((dtype for dtype in found if dtype is not None), None)
    return None if dtype is None and stored != torch.float32 else dtype == torch.float32 != stored


def _biases(w: Writer, packed: list[Node], bias: Node | None, parts: list[int]) -> list[Node | None]:
    """A node for the bias of each part."""
    if bias is None:
        return [None for _ in parts]
    if bias.op == "get_attr" and (len(parts) > 1 or not w.store.holds(str(bias.target))):
        names = w.store.once((bias.target, *parts), lambda: _put_biases(w.store, bias, packed, parts))
        return [w.read(name) for name in names]
    if len(parts) == 1:
        return [bias]
    ends = [sum(parts[: j + 1]) for j in range(len(parts))]
    return [w.call(aten.slice.Tensor, bias, 0, end - rows, end) for rows, end in zip(parts, ends)]


def _put_biases(store: Store, bias: Node, packed: list[Node], parts: list[int]) -> list[str]:
    """Gives names to the parts of a bias; one that lay among packed tensors goes beside their weight."""
    holder, _, leaf = str(bias.target).rpartition(".")
    beside = holder in {str(node.target).rpartition(".")[0] for node in packed}
    name = f"{holder.rpartition('.')[0]}.{leaf}".lstrip(".") if beside and holder else str(bias.target)
    return [store.put(name, part.clone()) for part in store.fetch(bias).split(parts)]
