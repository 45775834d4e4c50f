"""net_attention: the attention of a net over the heads that lie side by side in the channels of tokens."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from fxprune.kernels.native import net

from .store import Writer

aten = torch.ops.aten


def write_heads(w: Writer, step: net.Attention, tokens: tuple[Node, Node, Node], mask: Node | None) -> Node:
    """softmax(scale * q k^T + mask) v over q, k and v [n, w, c], as tokens [n, w, heads * v_size].

    torch's attention answers zero for a query that sees no key, as the net does.
    """
    where = (
        (step.first_q, step.size),
        (step.first_k, step.size),
        (step.first_v, step.v_size),
    )
    q, k, v = (_heads(w, x, first, step.heads, size) for x, (first, size) in zip(tokens, where, strict=True))
    causal = step.causal
    if causal and mask is not None:
        # torch takes one of the two.
        mask, causal = _hide_later(w, mask, tokens[0], tokens[1]), False
    y = w.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal, scale=step.scale)
    return w.call(aten.flatten.using_ints, w.call(aten.transpose.int, y, 1, 2), 2, 3)


def _heads(w: Writer, x: Node, first: int, heads: int, size: int) -> Node:
    """Channels from `first` on as heads [n, heads, w, size]."""
    own = w.call(aten.slice.Tensor, x, 2, first, first + heads * size)
    return w.call(aten.transpose.int, w.call(aten.unflatten.int, own, 2, [heads, size]), 1, 2)


def _hide_later(w: Writer, mask: Node, queries: Node, keys: Node) -> Node:
    """The mask, and -inf for keys that come after their query."""
    size = [w.call(aten.sym_size.int, x, 1) for x in (queries, keys)]
    seen = w.call(aten.tril.default, w.call(aten.ones.default, size, dtype=torch.bool))
    return w.call(aten.where.ScalarOther, seen, mask, -math.inf)
