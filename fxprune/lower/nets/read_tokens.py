"""read_tokens: what an op on tokens [n, w, c] is to a net: a linear, a layer norm, or attention with the views around.

Tokens are a map of one row whose places are the tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.graph.program import arguments, sizes

from .part import DTYPES, Heads, Part, dtype_of, is_tokens
from .replay import VIEWS, replay, sizes_for, views_above

aten = torch.ops.aten


def read_linear(node: Node) -> Part | None:
    """A linear of tokens whose weight is held, as [o, i] or transposed."""
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    held, views = views_above(weight)
    if not (is_tokens(x) and is_tokens(node) and _is_held(held) and (bias is None or _is_held(bias))):
        return None
    if held.meta["val"].dim() != 2 or dtype_of(held) != dtype_of(x):
        return None
    numbers = torch.arange(held.meta["val"].numel(), dtype=torch.int32).view(held.meta["val"].shape)
    found = replay(views, held, numbers)
    for transposed, wanted in ((False, numbers), (True, numbers.t())):
        if found is not None and torch.equal(found, wanted):
            return Part("linear", (x,), weight=held, bias=bias, transposed=transposed, inside=tuple(views))
    return None


def read_layer_norm(node: Node) -> Part | None:
    """A layer norm over the channels of tokens."""
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    held = all(each is None or _is_held(each) for each in (weight, bias))
    if not (is_tokens(x) and held and list(given["normalized_shape"]) == [x.meta["val"].shape[2]]):
        return None
    return Part("layer norm", (x,), weight=weight, bias=bias, epsilon=given["eps"])


def read_attention(node: Node) -> Part | None:
    """Attention whose heads lie side by side in the channels of tokens, at the view that brings them together again."""
    if node.target not in VIEWS or not is_tokens(node):
        return None
    core, after = views_above(node)
    if core.target is not aten.scaled_dot_product_attention.default:
        return None
    given = arguments(core)
    q, k, v = (_heads_of(given[name]) for name in ("query", "key", "value"))
    if q is None or k is None or v is None or given["dropout_p"] or given["enable_gqa"]:
        return None
    if q.heads != k.heads or q.heads != v.heads or q.size != k.size or not _side_by_side(core, after):
        return None
    mask: Any = given["attn_mask"]
    while isinstance(mask, Node) and mask.target is aten.expand.default:
        mask = mask.args[0]
    if mask is not None and not _is_mask(mask):
        return None
    scale = 1 / math.sqrt(q.size) if given["scale"] is None else given["scale"]
    if not isinstance(scale, (int, float)):
        return None
    firsts = (q.first, k.first, v.first)
    heads = Heads(q.heads, q.size, v.size, firsts, given["is_causal"], float(scale))
    inside = dict.fromkeys([*q.chain, *k.chain, *v.chain, core, *after[:-1]])
    return Part("attention", (q.tokens, k.tokens, v.tokens), heads=heads, mask=mask, inside=tuple(inside))


@dataclasses.dataclass(frozen=True)
class _Source:
    """Tokens whose channels from `first` on are heads, and the views that take them."""

    tokens: Node
    heads: int
    size: int
    first: int
    chain: list[Node]


def _heads_of(x: Any) -> _Source | None:
    """Where x [n, heads, w, size] lies in tokens [n, w, c], if head by head in channels side by side."""
    if not isinstance(x, Node) or x.meta["val"].dim() != 4:
        return None
    tokens, chain = views_above(x)
    n, heads, w, size = x.meta["val"].shape
    if not is_tokens(tokens) or not (type(heads) is int and type(size) is int):
        return None
    if sizes(tokens.meta["val"].shape)[:2] != sizes((n, w)):
        return None
    numbers = torch.arange(math.prod(sizes_for(tokens)), dtype=torch.int32).view(sizes_for(tokens))
    found = replay(chain, tokens, numbers)
    if found is None or list(found.shape) != sizes_for(x):
        return None
    first = int(found[0, 0, 0, 0])
    if first + heads * size > numbers.shape[2]:
        return None
    wanted = numbers[:, :, first : first + heads * size].unflatten(2, (heads, size)).transpose(1, 2)
    return _Source(tokens, heads, size, first, chain) if torch.equal(found, wanted) else None


def _side_by_side(core: Node, after: list[Node]) -> bool:
    """Whether the views bring [n, heads, w, size] to tokens [n, w, heads * size]."""
    numbers = torch.arange(math.prod(sizes_for(core)), dtype=torch.int32).view(sizes_for(core))
    found = replay(after, core, numbers)
    return found is not None and torch.equal(found, numbers.transpose(1, 2).flatten(2))


def _is_mask(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.dim() not in (2, 4):
        return False
    return value.dtype in (torch.bool, *DTYPES)


def _is_held(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"
