"""The CPU op fxprune::attention: attention of few queries over keys and values that lie in several tensors.

A decoder's step attends to the tokens before, whose keys and values it is given, and to its own token. Joining the two
copies all of the former, which takes longer than to read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.errors import InputError

from . import register


def attention_reference(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale * query @ keys^T + mask) @ values [n, queries, heads, v_size]: the definition, and the fallback.

    query   [n, heads, queries, size]
    keys    [n, kv_heads, tokens, size] each, which follow one another
    values  [n, kv_heads, tokens, v_size] each; a head of keys and values is that of heads / kv_heads of the query
    mask    [n, heads, queries, all tokens], in which any size may be 1

    All are float32. Of a query that sees no key the result is zero.
    """
    if len(keys) != len(values) or not keys:
        raise InputError("attention got keys without values", why=f"{len(keys)} keys, {len(values)} values")
    k, v = torch.cat(list(keys), 2), torch.cat(list(values), 2)
    group = query.shape[1] // max(1, k.shape[1])
    if query.shape[1] != group * k.shape[1]:
        why = f"the query has {query.shape[1]} heads, the keys have {k.shape[1]}"
        raise InputError("attention got heads that do not fit together", why=why)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    y = F.scaled_dot_product_attention(query, k, v, mask, scale=scale)
    return y.transpose(1, 2).contiguous()


def _shape(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *_: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], values[0].shape[3])


register(
    "attention",
    "Tensor query, Tensor[] keys, Tensor[] values, Tensor? mask, float scale",
    "Tensor",
    attention_reference,
    _shape,
)

attention: torch._ops.OpOverload = torch.ops.fxprune.attention.default
