"""attention: a decoder's step attends to keys and values where they lie, those of the tokens before beside its own.

Joined they would be copied for every token, and each head again for all that share it.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fxprune.graph.program import Program, arguments, sizes
from fxprune.kernels import native
from fxprune.kernels.native.attention import attention
from fxprune.measure.timing import interleave_steady

from .nets.gain import sizes_of
from .nets.masks import put_scores
from .nets.replay import VIEWS, replay, sizes_for
from .share import moments

aten = torch.ops.aten

# Queries up to which keys and values are read, not computed with, and by how much a call must be faster.
MOST_QUERIES = 8
MARGIN = 1.1
SECONDS = 0.1
# Elements up to which it is worth finding out by numbers where a tensor comes from.
_MOST_NUMBERS = 1 << 24


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys or values [n, kv_heads, tokens_j, size] that follow one another, and `group` heads that share each."""

    parts: tuple[Node, ...]
    group: int


@dataclasses.dataclass(frozen=True)
class Attention:
    """An attention of few queries: its node, what it reads, what is added to the scores, and their scale."""

    node: Node
    query: Node
    keys: Cache
    values: Cache
    mask: Node | None
    scale: float


def lower_attention(program: Program) -> list[float]:
    """Puts a call of fxprune::attention in place of each attention that is faster so.

    Returns how many times faster each was measured to be.
    """
    if not native.status().available:
        return []
    gains: dict[Any, float] = {}
    taken = []
    since = moments(program.graph)
    for node in list(program.graph.nodes):
        found = _read(node, since) if node.target is aten.scaled_dot_product_attention.default else None
        if found is None:
            continue
        alike = _likeness(found)
        if alike not in gains:
            gains[alike] = _gain(found)
        if gains[alike] >= MARGIN:
            _replace(program, found)
            taken.append(gains[alike])
    if taken:
        program.graph.eliminate_dead_code()
        program.graph.lint()
        program.recompile()
    return taken


def _read(node: Node, since: dict[Node, int]) -> Attention | None:
    """An attention that the op can compute, else None."""
    given = arguments(node)
    query, mask, scale = given["query"], given["attn_mask"], given["scale"]
    if not all(_is_heads(given[name]) for name in ("query", "key", "value")) or given["is_causal"]:
        return None
    heads, queries, size = query.meta["val"].shape[1:]
    kv_heads = given["key"].meta["val"].shape[1]
    if not all(type(each) is int for each in (heads, queries, size, kv_heads)) or not 1 <= queries <= MOST_QUERIES:
        return None
    if given["dropout_p"] or not isinstance(scale, (int, float, type(None))):
        return None
    if mask is not None and not _is_mask(mask):
        return None
    if given["value"].meta["val"].shape[1] != kv_heads or (kv_heads != heads and not given["enable_gqa"]):
        return None
    of_keys, of_values = (sizes(given[name].meta["val"].shape) for name in ("key", "value"))
    if of_keys[0] != of_values[0] or of_keys[0] != sizes(query.meta["val"].shape)[0] or of_keys[3] != size:
        return None  # One of them is the same for all images.
    keys, values = (_shared(given[name], node, since) for name in ("key", "value"))
    if keys.group != values.group:
        keys, values = Cache((given["key"],), 1), Cache((given["value"],), 1)
    joined = [_parts(cache.parts[0], node, since) for cache in (keys, values)]
    lengths = [[sizes(part.meta["val"].shape)[2] for part in parts] for parts in joined]
    if lengths[0] == lengths[1]:
        keys, values = (dataclasses.replace(each, parts=parts) for each, parts in zip((keys, values), joined))
    scale = 1 / math.sqrt(size) if scale is None else float(scale)
    return Attention(node, query, keys, values, mask, scale)


def _is_heads(x: Any) -> bool:
    value = x.meta.get("val") if isinstance(x, Node) else None
    if not isinstance(value, Tensor) or value.dim() != 4 or value.dtype != torch.float32:
        return False
    return value.device.type == "cpu" and type(value.shape[3]) is int


def _is_mask(x: Any) -> bool:
    value = x.meta.get("val") if isinstance(x, Node) else None
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() <= 4


def _shared(x: Node, reader: Node, since: dict[Node, int]) -> Cache:
    """What the heads of x are copies of, each for several heads in a row, where nothing is written to since they were
    copied; else x itself.
    """
    result, source, chain = Cache((x,), 1), x, []
    while _is_view(source) and isinstance(above := source.args[0], Node):
        chain.insert(0, source)
        source = above
        if _is_heads(source) and since.get(chain[0]) == since[reader]:
            group = _copies(source, chain)
            result = Cache((source,), group) if group else result
    return result


def _copies(source: Node, chain: list[Node]) -> int:
    """How many copies of each head the views make of `source`, one after another; 0 where they make something else."""
    kv_heads, heads = source.meta["val"].shape[1], chain[-1].meta["val"].shape[1]
    numbers = math.prod(sizes_for(source))
    if type(kv_heads) is not int or not 0 < kv_heads <= heads or heads % kv_heads or numbers > _MOST_NUMBERS:
        return 0
    numbered = torch.arange(numbers, dtype=torch.int32).view(sizes_for(source))
    found = replay(chain, source, numbered)
    wanted = numbered.repeat_interleave(heads // kv_heads, 1)
    return heads // kv_heads if found is not None and torch.equal(found, wanted) else 0


def _parts(x: Node, reader: Node, since: dict[Node, int]) -> tuple[Node, ...]:
    """The tensors that x joins by tokens, where nothing else needs them joined and none is written to since."""
    if x.target is not aten.cat.default or since.get(x) != since[reader] or not _is_read_by(x, reader):
        return (x,)
    given = arguments(x)
    if given["dim"] not in (2, -2) or not all(_is_heads(part) for part in given["tensors"]):
        return (x,)
    return tuple(given["tensors"])


def _is_read_by(x: Node, reader: Node) -> bool:
    """Whether x and what views are made of it go into `reader` alone."""
    return all(user is reader or (_is_view(user) and _is_read_by(user, reader)) for user in x.users)


def _is_view(x: Node) -> bool:
    return x.target is aten.expand.default or (x.target in VIEWS and x.target is not operator.getitem)


def _likeness(found: Attention) -> tuple[Any, ...]:
    """What attentions alike agree on."""
    parts = [tuple(sizes_of(part)) for cache in (found.keys, found.values) for part in cache.parts]
    mask = None if found.mask is None else (tuple(sizes_of(found.mask)), found.mask.meta["val"].dtype)
    return (*sizes_of(found.query), *parts, found.keys.group, mask)


@torch.no_grad()
def _gain(found: Attention) -> float:
    """How many times faster the op is than torch's, which joins and copies first; on random inputs."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(sizes_of(found.query), generator=generator)
    keys, values = (
        [torch.randn(sizes_of(part), generator=generator) for part in cache.parts]
        for cache in (found.keys, found.values)
    )
    group, grouped = found.keys.group, query.shape[1] != keys[0].shape[1]
    mask = None if found.mask is None else torch.zeros(sizes_of(found.mask))
    scores = None if mask is None else mask[(None,) * (4 - mask.dim())]
    if not all(x.numel() for x in (query, *keys, *values)):
        return 0.0

    def joined(parts: list[Tensor]) -> Tensor:
        x = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
        return x.repeat_interleave(group, 1) if group > 1 else x

    def plain() -> Tensor:
        k, v = joined(keys), joined(values)
        shared = grouped and group == 1
        return F.scaled_dot_product_attention(query, k, v, mask, scale=found.scale, enable_gqa=shared)

    (ours, theirs), _ = interleave_steady(
        [lambda: attention(query, keys, values, scores, found.scale), plain], seconds=SECONDS
    )
    return theirs.typical / ours.typical


def _replace(program: Program, found: Attention) -> None:
    node, graph = found.node, program.graph
    value: Tensor = node.meta["val"]
    n, heads, queries, size = value.shape
    with graph.inserting_before(node):
        scores = None if found.mask is None else put_scores(graph, found.mask)
        result = graph.call_function(
            attention, (found.query, list(found.keys.parts), list(found.values.parts), scores, found.scale)
        )
        result.meta = {**node.meta, "val": value.new_empty(n, queries, heads, size)}
        last = graph.call_function(aten.transpose.int, (result, 1, 2))
        last.meta = {**node.meta, "val": result.meta["val"].transpose(1, 2)}
        if queries > 1 and not _in_order_of(last.meta["val"], value):
            below = last
            last = graph.call_function(aten.clone.default, (below,), {"memory_format": torch.contiguous_format})
            last.meta = dict(node.meta)
    node.replace_all_uses_with(last)
    graph.erase_node(node)


def _in_order_of(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of a shape lie in memory alike."""
    return sizes(a.stride()) == sizes(b.stride())
