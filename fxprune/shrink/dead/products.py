"""products: what is known of a sum of products: linear layers, convolutions, matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.graph.program import arguments, node_of

from .known import Known, blank, by_channel, even_along_symbols, filled, has_argument, is_symbolic

CONVS = {f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)}


def product(node: Node, op: str, states: Mapping[str, Any], *, bias: bool = True) -> Known | None:
    """What is known of a sum of products; with `bias` False what is added to it does not count.

    A term is sure where both factors are, or one is a sure zero.
    """
    x_name, w_name, b_name = OPERANDS[op]
    x: Known | None = states[x_name]
    w: Known | None = states[w_name]
    added = states.get(b_name) if bias and has_argument(node, b_name) else None
    if (x is None and w is None) or (added is None and bias and has_argument(node, b_name)):
        return None
    if x is None and w is not None and w.is_whole:
        found = _of_zero_rows(node, op, w)
        if found is None:
            return None
    else:
        some = x if x is not None else w
        assert some is not None
        x = x if x is not None else Known.none(blank(node_of(node, x_name), some))
        w = w if w is not None else Known.none(blank(node_of(node, w_name), some))
        if op in CONVS and len(is_symbolic(node)) != w.value.dim():
            return None
        x, w = _at_any_size(node, op, x, w, states)
        found = _multiplied(node, op, x, w, {k: v for k, v in states.items() if k not in (x_name, w_name, b_name)})
    value, sure = found
    if op in ("addmm", "baddbmm"):
        value = states.get("alpha", 1) * value
    if added is None:
        return Known(value, sure)
    if op in ("addmm", "baddbmm"):
        return Known(value + states.get("beta", 1) * filled(added), sure & added.sure)
    shape = [-1, *[1] * (value.dim() - 2)] if op in CONVS else [-1]
    return Known(value + filled(added).reshape(shape), sure & added.sure.reshape(shape))


def sizes_show(node: Node, op: str, states: Mapping[str, Any]) -> bool:
    """Whether a convolution makes of one constant several, at places that depend on a symbolic size."""
    return (pads(states) or op.startswith("conv_transpose")) and any(is_symbolic(node)[2:])


def _at_any_size(node: Node, op: str, x: Known, w: Known, states: Mapping[str, Any]) -> tuple[Known, Known]:
    """What is known of the factors and leads to the same at every size: zeros always do."""
    x_node = node_of(node, OPERANDS[op][0])
    if op in CONVS:
        x = even_along_symbols(x, x_node, range(2, x.value.dim()))
        return (Known(x.value, x.zero) if sizes_show(node, op, states) else x), w
    if is_symbolic(x_node)[-1]:
        return Known(x.value, x.zero), Known(w.value, w.zero)
    return x, w


def _of_zero_rows(node: Node, op: str, w: Known) -> Known | None:
    """Zeros where the weight that makes an output is zero throughout, whatever comes in; None where none is."""
    if op in CONVS:
        if len(is_symbolic(node)) != w.value.dim():
            return None
        if op.startswith("conv_transpose"):
            if int(arguments(node).get("groups", 1)) != 1:
                return None
            dead = w.zero.transpose(0, 1).flatten(1).all(1)
        else:
            dead = w.zero.flatten(1).all(1)
    elif w.value.dim() < 2:
        return None
    else:
        dead = w.zero.all(1) if op == "linear" else w.zero.all(-2)
    if not bool(dead.any()):
        return None
    value = blank(node, w)
    sure = by_channel(dead, list(value.shape)) if op in CONVS else _at_columns(dead, op, value)
    return Known(value, sure)


def _at_columns(dead: Tensor, op: str, value: Tensor) -> Tensor:
    return (dead if op == "linear" or value.dim() == 1 else dead.unsqueeze(-2)).expand(value.shape)


def _multiplied(node: Node, op: str, x: Known, w: Known, settings: Mapping[str, Any]) -> Known:
    target: Any = node.target

    def run(left: Tensor, right: Tensor) -> Tensor:
        if op in CONVS:
            return target(left, right, None, **settings)
        return torch.nn.functional.linear(left, right) if op == "linear" else torch.matmul(left, right)

    dtype = torch.promote_types(x.value.dtype, w.value.dtype)
    value = run(filled(x).to(dtype), filled(w).to(dtype))
    # A product is in doubt where one factor is unknown and the other is not a sure zero.
    doubt = torch.zeros((), device=value.device)
    if not x.is_whole:
        doubt = doubt + run((~x.sure).float(), (~w.zero).float())
    if not w.is_whole:
        doubt = doubt + run((~x.zero).float(), (~w.sure).float())
    return Known(value, (doubt < 0.5).expand(value.shape))


# op -> (activations, weight, what is added), by the names in its schema
OPERANDS: dict[str, tuple[str, str, str]] = {
    "linear": ("input", "weight", "bias"),
    "matmul": ("self", "other", ""),
    "mm": ("self", "mat2", ""),
    "bmm": ("self", "mat2", ""),
    "addmm": ("mat1", "mat2", "self"),
    "baddbmm": ("batch1", "batch2", "self"),
    **{op: ("input", "weight", "bias") for op in CONVS},
}


def pads(states: Mapping[str, Any]) -> bool:
    padding = states.get("padding", 0)
    if isinstance(padding, (list, tuple)):
        return any(bool(p) for p in padding)
    return padding not in (0, "valid")
