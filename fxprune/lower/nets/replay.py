"""replay: where the elements of a tensor come from, through views, by running the views on numbers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

aten = torch.ops.aten

VIEWS: set[Any] = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    operator.getitem,
}
# Sizes that stand for symbolic ones: none divides another, and few dimensions have them by chance.
_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23)
_numbers: WeakKeyDictionary[Any, dict[Any, int]] = WeakKeyDictionary()


def views_above(node: Node) -> tuple[Node, list[Node]]:
    """The node that a tensor is a view of, and the views from there to it, in order."""
    chain: list[Node] = []
    while node.target in VIEWS and isinstance(above := node.args[0], Node):
        if node.target is operator.getitem and above.target not in VIEWS:
            break  # One of several results of an op that is no view.
        chain.append(node)
        node = above
    return node, chain[::-1]


def size_of(size: Any) -> int:
    """A size as a number, in which each symbol stands for a prime of its own."""
    if not isinstance(size, torch.SymInt):
        return size
    expression, known = size.node.expr, _numbers.setdefault(size.node.shape_env, {})
    for symbol in sorted(expression.free_symbols, key=str):
        known.setdefault(symbol, _PRIMES[len(known) % len(_PRIMES)])
    return int(expression.subs(known))


def sizes_for(node: Node) -> list[int]:
    """The sizes of a node's tensor, as `size_of` has them."""
    return [size_of(size) for size in node.meta["val"].shape]


def replay(chain: Sequence[Node], source: Node, numbers: Tensor) -> Tensor | None:
    """What the views make of `numbers`, which stand for the tensor of `source`; None where they cannot be run so."""
    values: dict[Node, Any] = {source: numbers}

    def value(node: Node) -> Any:
        return values[node] if node in values else size_of(node.meta["val"])

    try:
        for node in chain:
            args, kwargs = map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError):
        return None
    return values[chain[-1]] if chain else numbers
