"""attention: keys and values that lie in several tensors, joined again for torch's own attention."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Node

from fxprune.graph.program import arguments
from fxprune.kernels.native.attention import attention as OP

from .store import Writer

__all__ = ["OP", "write_attention"]
aten = torch.ops.aten


def write_attention(w: Writer) -> Node:
    """softmax(scale * query @ keys^T + mask) @ values [n, queries, heads, v_size], contiguous."""
    given = arguments(w.node)
    query, keys = given["query"], given["keys"]
    heads = [w.call(aten.sym_size.int, x, 1) for x in (query, keys[0])]
    group = w.call(operator.floordiv, *heads)
    k, v = (_for_all_heads(w, given[name], group) for name in ("keys", "values"))
    attend = aten.scaled_dot_product_attention.default
    y = w.call(attend, query, k, v, given["mask"], 0.0, False, scale=given["scale"])
    return w.call(aten.contiguous.default, w.call(aten.transpose.int, y, 1, 2))


def _for_all_heads(w: Writer, parts: Sequence[Node], group: Node) -> Node:
    """The parts joined by tokens, and each head for the `group` heads of the query that share it.

    Where each head has its own this is a view. Attention's own flag for it is refused by ONNX's where it does nothing.
    """
    x = w.call(aten.cat.default, list(parts), 2) if len(parts) > 1 else parts[0]
    apart = w.call(aten.expand.default, w.call(aten.unsqueeze.default, x, 2), [-1, -1, group, -1, -1])
    return w.call(aten.flatten.using_ints, apart, 1, 2)
