"""known_ops: what is known of an op's output. An op that is not listed leaves nothing known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.couple.rules import packet_name
from fxprune.graph.ops import HALF
from fxprune.graph.program import arguments, node_of

from .known import (
    Known,
    State,
    blank,
    by_channel,
    even_along_symbols,
    filled,
    flat,
    has_argument,
    holds_tensors,
    is_even,
    is_symbolic,
    size_of,
)
from .products import OPERANDS, pads, product
from .recurrent import RECURRENT, follow_units

_POINTWISE = {
    "relu", "relu6", "gelu", "silu", "tanh", "mish", "elu", "celu", "selu", "leaky_relu", "hardswish",
    "hardsigmoid", "sigmoid", "log_sigmoid", "softplus", "abs", "neg", "positive", "sqrt", "rsqrt", "square",
    "reciprocal", "sign", "sin", "cos", "exp", "exp2", "log", "log1p", "expm1", "erf", "floor", "ceil", "round",
    "trunc", "softshrink", "hardshrink", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max", "threshold",
    "nan_to_num", "add", "sub", "subtract", "rsub", "div", "divide", "true_divide", "maximum", "minimum", "pow",
    "lerp", "addcmul", "eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or",
    "bitwise_not", "where", "masked_fill", "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "to",
    "_to_copy", "type_as", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
}  # fmt: skip
_PRODUCT = {"mul", "multiply"}
# These may have sizes that are symbolic: they mean the same at any.
_RESHAPING = {
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "ravel", "unsqueeze",
    "squeeze", "permute", "transpose", "swapaxes", "t", "mT", "numpy_T", "movedim", "expand", "expand_as",
    "broadcast_to", "repeat", "tile", "stack",
}  # fmt: skip
_MOVING = {
    "cat", "concat", "concatenate", "split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split",
    "unsafe_split_with_sizes", "slice", "narrow", "select", "unbind", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "native_channel_shuffle", "flip", "roll", "repeat_interleave", "index_select",
}  # fmt: skip
# Each element is a sum, with weights that are not negative, or the largest, of elements of the input.
_WINDOWS = {
    f"{kind}{n}d" for n in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "upsample_nearest")
} | {"upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"}
# The same, and where the largest stood.
_PLACED = {
    f"{kind}{n}d{more}" for n in (1, 2, 3) for kind, more in (("adaptive_max_pool", ""), ("max_pool", "_with_indices"))
}
_SUMS = {"sum", "mean"}
_FILLS = {
    "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "arange",
    "eye", "scalar_tensor",
}  # fmt: skip
NORMS = {"layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"}


def follow(node: Node, states: Mapping[str, Any]) -> State:
    """What is known of an op's output, given what is known of its arguments by name; None for nothing.

    May raise what the op raises where it cannot run on stand-ins.
    """
    op, named = packet_name(node.target), arguments(node)
    if op in OPERANDS:
        return product(node, op, states)
    if op in NORMS:
        return _norm(node, op, states)
    if op == "scaled_dot_product_attention":
        return _attention(node, states)
    if op == "embedding":
        return _embedding(node, states["weight"])
    if op in RECURRENT:
        return follow_units(node, states)
    if op in _FILLS:
        return _fill(node, op, states) if not _symbolic(named.values(), sizes=op not in ("arange", "eye")) else None
    if not any(isinstance(s, Known) for s in flat(states.values())) or _lacks(states, named):
        return None
    if op in _PRODUCT or op in _POINTWISE:
        if _symbolic(named.values(), sizes=False):
            return None
        return _pointwise(node, states, op in _PRODUCT)
    if op in _RESHAPING or (op in _MOVING and not _symbolic(named.values(), sizes=False)):
        return None if op in ("cat", "concat", "concatenate") and _joins_symbols(node) else _move(node, states)
    if op in _WINDOWS or op in _SUMS:
        return _window(node, op, states)
    if op in _PLACED:
        return [_window(node, op, states), None]
    if op in ("prelu", "_prelu_kernel"):
        return _prelu(node, states)
    if op == "upsample_bicubic2d":
        return _by_plane(node, states)
    if op in ("pad", "constant_pad_nd"):
        return _padded(node, states)
    return _gated(node, states) if op == "glu" else None


def _symbolic(values: Any, *, sizes: bool) -> bool:
    """Whether a number among the arguments was computed from sizes; with `sizes` those in lists may be."""

    def is_size(value: Any) -> bool:
        return isinstance(value, Node) and not holds_tensors(value.meta.get("val"))

    return any(is_size(v) or (not sizes and isinstance(v, (list, tuple)) and any(map(is_size, v))) for v in values)


def _lacks(states: Mapping[str, Any], named: Mapping[str, Any]) -> bool:
    """Whether a list of tensors holds one of several outputs of which nothing is known."""
    return any(isinstance(states[name], list) and isinstance(value, Node) for name, value in named.items())


def _completed(node: Node, states: Mapping[str, Any]) -> dict[str, Any]:
    """The states with tensors of which nothing is known in place of None."""
    named = arguments(node)
    some = next(s for s in flat(states.values()) if isinstance(s, Known))

    def complete(argument: Any, state: Any) -> Any:
        if isinstance(argument, Node) and state is None:
            return Known.none(blank(argument, some))
        if isinstance(argument, (list, tuple)):
            return [complete(a, s) for a, s in zip(argument, state)]
        return state

    return {name: complete(named[name], state) for name, state in states.items()}


def _run(node: Node, states: Mapping[str, Any], pick: Callable[[Known], Tensor]) -> Any:
    """The op on one tensor made of each state."""

    def made(state: Any) -> Any:
        if isinstance(state, Known):
            return pick(state)
        if isinstance(state, list):
            return [made(item) for item in state]
        return torch.float32 if state in HALF else state

    target: Any = node.target
    given = {name: made(state) for name, state in states.items()}
    if target._schema.is_mutable:
        first = target._schema.arguments[0].name
        given[first] = given[first].clone()
    # What stands in for a tensor may have other strides, which a view would refuse.
    if packet_name(target) in ("view", "_unsafe_view") and "size" in given:
        return given["self"].reshape(given["size"])
    if packet_name(target) == "view_as":
        return given["self"].reshape(given["other"].shape)
    placed = [argument.name for argument in target._schema.arguments if not argument.kwarg_only]
    positional = [given.pop(name) for name in placed if name in given]
    return target(*positional, **given)


def _pointwise(node: Node, states: Mapping[str, Any], is_product: bool) -> Known | None:
    only = packet_name(node.target) in ("to", "type_as")
    if only and states["self"] is None:
        return None
    states = _completed(node, states)
    value = _run(node, states, filled)
    operands = [s for name, s in states.items() if isinstance(s, Known) and (name == "self" or not only)]
    sure = torch.ones((), dtype=torch.bool, device=value.device).expand(value.shape)
    for operand in operands:
        sure = sure & operand.sure
    if is_product:
        for operand in operands:
            sure = sure | operand.zero
    return Known(value, sure)


def _move(node: Node, states: Mapping[str, Any]) -> State:
    states = _completed(node, states)
    if packet_name(node.target) in _RESHAPING and isinstance(states.get("self"), Known):
        # A pattern along a symbolic size falls elsewhere at another size.
        states["self"] = even_along_symbols(states["self"], node_of(node, "self"))
    index = states.get("index")
    if isinstance(index, Known) and not index.is_whole:
        return None
    values, sure = _run(node, states, filled), _run(node, states, lambda s: s.value if s is index else s.sure)
    if isinstance(values, Tensor):
        return Known(values, sure)
    return [Known(v, s) for v, s in zip(values, sure, strict=True)]


def _joins_symbols(node: Node) -> bool:
    """Whether a concatenation runs along a dimension of symbolic size, whose parts have places that depend on it."""
    named = arguments(node)
    dim = int(named.get("dim", 0))
    return any(is_symbolic(n)[dim] for n in named["tensors"] if isinstance(n, Node) and is_symbolic(n))


def _window(node: Node, op: str, states: Mapping[str, Any]) -> Known | None:
    """Windows, sums and paddings: sure where nothing unsure comes in."""
    name = "self" if "self" in states else "input"
    x = states[name]
    if not isinstance(x, Known):
        return None
    source = node_of(node, name)
    if op in _SUMS:
        dims = states.get("dim")
        dims = range(x.value.dim()) if dims is None or dims == [] else dims if isinstance(dims, list) else [dims]
        over = [d for d in dims if is_symbolic(source)[d]]
        uneven = [d for d in over if not bool(is_even(x.value, d).all())]
        if uneven or (over and op == "sum" and not bool(x.zero.all())):
            x = Known(x.value, x.zero)
    elif any(is_symbolic(source)[-int(op.removesuffix("_with_indices")[-2]) :]):
        if op.startswith("adaptive"):
            return None
        x = even_along_symbols(x, source, range(-int(op.removesuffix("_with_indices")[-2]), 0))
        if op.startswith("avg") and (pads(states) or states.get("ceil_mode") or states.get("divisor_override")):
            x = Known(x.value, x.zero)
    value = _run(node, {**states, name: x}, filled)
    doubt = _run(node, {**states, name: Known.all((~x.sure).float())}, lambda s: s.value)
    if op in _PLACED:
        value, doubt = value[0], doubt[0]
    return Known(value, doubt <= 0)


def _prelu(node: Node, states: Mapping[str, Any]) -> Known | None:
    """Each element by itself, with a slope for its channel."""
    x = states["self"]
    if not isinstance(x, Known) or not _whole(states["weight"]):
        return None
    return Known(_run(node, states, filled), x.sure)


def _by_plane(node: Node, states: Mapping[str, Any]) -> Known | None:
    """Weighted sums whose weights may be negative: sure where the whole plane is."""
    x = states["input"]
    if not isinstance(x, Known):
        return None
    x = even_along_symbols(x, node_of(node, "input"), (-2, -1))
    value = _run(node, {**states, "input": x}, filled)
    return Known(value, x.sure.flatten(-2).all(-1)[..., None, None].expand(value.shape))


def _padded(node: Node, states: Mapping[str, Any]) -> Known | None:
    x, mode = states["self"], states.get("mode", "constant")
    if not isinstance(x, Known):
        return None
    pad, fill = states["pad"], states.get("value") or 0
    given = arguments(node)["pad"]
    # Where an amount is symbolic, there may be more of it at another size.
    touched = [x.value.dim() - 1 - i // 2 for i, n in enumerate(given) if isinstance(n, Node) or n]
    symbolic = any(isinstance(n, Node) for n in given) or any(is_symbolic(node)[d] for d in touched)
    x = even_along_symbols(x, node_of(node, "self"), touched)
    if mode != "constant":
        if symbolic:
            return None
        sure = torch.nn.functional.pad(x.sure.float(), pad, mode=mode)
        return Known(torch.nn.functional.pad(filled(x), pad, mode=mode), sure > 0)
    if symbolic:
        x = Known(x.value, x.sure & (x.value == fill))
    value = torch.nn.functional.pad(filled(x), pad, value=fill)
    return Known(value, torch.nn.functional.pad(x.sure, pad, value=True))


def _gated(node: Node, states: Mapping[str, Any]) -> Known | None:
    x = states["self"]
    if not isinstance(x, Known):
        return None
    first, gate = x.sure.chunk(2, states["dim"])
    zero = x.zero.chunk(2, states["dim"])[0]
    return Known(_run(node, states, filled), (first & gate) | zero)


def _norm(node: Node, op: str, states: Mapping[str, Any]) -> Known | None:
    """What a norm scales by zero is its bias, and so is what an instance norm sees one number of.

    A batch-norm in evaluation also hands on what is known.
    """
    x, weight, bias = states["input"], states.get("weight"), states.get("bias")
    named = arguments(node)
    if any(named.get(k) is not None and not _whole(states[k]) for k in ("weight", "bias")):
        return None
    value = node.meta["val"]
    shape = [size_of(size) for size in value.shape]
    if op == "batch_norm" and named.get("running_mean") is not None and not named.get("training"):
        if not (_whole(states["running_mean"]) and _whole(states["running_var"])):
            return None
        if isinstance(x, Known):
            sure = x.sure
            out = _run(node, {**states, "input": x}, filled)
            return Known(out, sure if weight is None else sure | by_channel(weight.zero, shape))
    single = None
    if op == "instance_norm" and isinstance(x, Known) and named.get("use_input_stats") and x.value.dim() > 2:
        single = (x.sure.flatten(2).all(2) & is_even(x.value.flatten(2), 2)).reshape(
            *shape[:2], *[1] * (len(shape) - 2)
        )
    if single is None and (weight is None or not bool(weight.zero.any())):
        return None
    at = (lambda t: t.expand(shape)) if op in ("layer_norm", "rms_norm") else (lambda t: by_channel(t, shape))
    sure = at(weight.zero) if weight is not None else torch.zeros(shape, dtype=torch.bool, device=value.device)
    sure = sure if single is None else sure | single
    if bias is None:
        return Known(torch.zeros(shape, device=value.device), sure)
    return Known(at(bias.value), sure)


def _whole(state: Any) -> bool:
    return isinstance(state, Known) and state.is_whole


def _attention(node: Node, states: Mapping[str, Any]) -> Known | None:
    """A channel of the values that is one constant for all keys comes out as it is: the rows of a softmax sum to 1."""
    v = states["value"]
    if not isinstance(v, Known) or states.get("dropout_p"):
        return None
    even = v.sure.all(-2) & is_even(v.value, -2)
    value, sure = v.value.select(-2, 0), even
    shape = [size_of(size) for size in node.meta["val"].shape]
    if len(shape) > 2 and states.get("enable_gqa") and shape[-3] != value.shape[-2]:
        each = shape[-3] // value.shape[-2]
        value, sure = value.repeat_interleave(each, -2), sure.repeat_interleave(each, -2)
    if has_argument(node, "attn_mask"):
        # A row without any key is zero, or not a number.
        sure = sure & (value == 0)
    return Known(value.unsqueeze(-2).expand(shape), sure.unsqueeze(-2).expand(shape))


def _embedding(node: Node, weight: Any) -> Known | None:
    """A column that is the same in every row of the table."""
    if not isinstance(weight, Known) or not weight.value.shape[0]:
        return None
    shape = [size_of(size) for size in node.meta["val"].shape]
    row = weight.value[0]
    sure = weight.sure.all(0) & (weight.value == row).all(0)
    return Known(row.expand(shape), sure.expand(shape))


def _fill(node: Node, op: str, states: Mapping[str, Any]) -> Known | None:
    """A tensor made of numbers; one that is like another takes its shape from the graph."""
    value = node.meta["val"]
    if any(isinstance(size, torch.SymInt) for size in value.shape) and op in ("arange", "eye"):
        return None
    given = {k: v for k, v in states.items() if not isinstance(v, Known) and v is not None}
    if op.endswith("_like") or op.startswith("new_"):
        fill: Any = 0.0 if "zeros" in op else 1.0 if "ones" in op else given["fill_value"]
        shape = [size_of(size) for size in value.shape]
        dtype = torch.float32 if value.dtype in HALF else value.dtype
        return Known.all(torch.full(shape, fill, dtype=dtype, device=value.device))
    return Known.all(_run(node, given, filled))
