"""read: what an op of the graph is to a net, or nothing where a net has no step for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import Node

from fxprune.graph.program import arguments, same_shape, sizes
from fxprune.kernels.native.net import Finish, Taps

from .part import Part, dtype_of, is_map, is_tokens
from .read_tokens import read_attention, read_layer_norm, read_linear
from .replay import VIEWS
from .transposed import plain

aten = torch.ops.aten


def read(node: Node) -> Part | None:
    """The node as a part of a net, or None."""
    reader = _READERS.get(node.target) if node.op == "call_function" else None
    if reader is None or not (is_map(node) or is_tokens(node)):
        return None
    return reader(node)


def written(node: Node) -> Node | None:
    """The tensor that an op of `read` writes to."""
    return node.args[0] if node.target in _IN_PLACE else None  # pyright: ignore[reportReturnType]


def _pair(value: Any) -> tuple[int, int] | None:
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(type(number) is int for number in numbers) or len(numbers) not in (1, 2):
        return None
    return numbers[0], numbers[-1]


def _is_constant(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def _conv(node: Node) -> Part | None:
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if not (is_map(x) and _is_constant(weight) and (bias is None or _is_constant(bias))):
        return None
    stride, dilation = _pair(given["stride"]), _pair(given["dilation"])
    o, i, *kernel = weight.meta["val"].shape
    if stride is None or dilation is None or len(kernel) != 2 or dtype_of(weight) != dtype_of(x):
        return None
    if isinstance(given["padding"], str):
        around = [step * (k - 1) if given["padding"] == "same" else 0 for step, k in zip(dilation, kernel)]
        padding = (around[0] // 2, around[0] - around[0] // 2, around[1] // 2, around[1] - around[1] // 2)
    else:
        pair = _pair(given["padding"])
        if pair is None:
            return None
        padding = (pair[0], pair[0], pair[1], pair[1])
    taps = Taps((kernel[0], kernel[1]), stride, padding, dilation)
    channels = x.meta["val"].shape[1]
    if given["groups"] == channels == o and i == 1 and channels > 1:
        return Part("depthwise", (x,), taps, weight=weight, bias=bias)
    return Part("conv", (x,), taps, weight=weight, bias=bias)


def _transposed(node: Node) -> Part | None:
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    pairs = [_pair(given[name]) for name in ("stride", "padding", "dilation", "output_padding")]
    held = _is_constant(weight) and (bias is None or _is_constant(bias))
    if not (is_map(x) and held) or None in pairs or dtype_of(weight) != dtype_of(x):
        return None
    stride, padding, dilation, more = cast(list[tuple[int, int]], pairs)
    kh, kw = weight.meta["val"].shape[2:]
    found = plain(Taps((kh, kw), stride, (padding[0], padding[0], padding[1], padding[1]), dilation), more)
    if found is None:
        return None
    kind = {"as_plain": found, "groups": given["groups"]}
    return Part("transposed conv", (x,), found.taps, weight=weight, bias=bias, times=found.times, **kind)


def _shuffle(node: Node) -> Part | None:
    given = arguments(node)
    times = given["upscale_factor"]
    return Part("shuffle", (given["self"],), times=(times, times)) if is_map(given["self"]) else None


def _pool(kind: Callable[[dict[str, Any]], str]) -> Callable[[Node], Part | None]:
    def reader(node: Node) -> Part | None:
        given = arguments(node)
        x, kernel, padding = given["self"], _pair(given["kernel_size"]), _pair(given["padding"])
        stride, dilation = _pair(given["stride"] or given["kernel_size"]), _pair(given.get("dilation", 1))
        if not is_map(x) or None in (kernel, padding, stride, dilation) or given.get("divisor_override") is not None:
            return None
        assert kernel and padding and stride and dilation
        taps = Taps(kernel, stride, (padding[0], padding[0], padding[1], padding[1]), dilation)
        if given["ceil_mode"]:
            taps = _with_last_window(taps, x.meta["val"].shape[2:], node.meta["val"].shape[2:])
            # What lies beyond the padding is no part of a mean.
            if taps is None or kind(given) != "max":
                return None
        return Part(kind(given), (x,), taps)

    return reader


def _with_last_window(taps: Taps, size: Any, out: Any) -> Taps | None:
    """The taps with so much more padding at the end that the last window is there, which ceil_mode adds."""
    if not all(type(number) is int for number in (*size, *out)):
        return None
    (above, _, left, _), ends = taps.padding, []
    for d, first in enumerate((above, left)):
        needed = (out[d] - 1) * taps.stride[d] + taps.dilation[d] * (taps.kernel[d] - 1) + 1
        ends.append(max(needed - size[d] - first, 0))
    return dataclasses.replace(taps, padding=(above, ends[0], left, ends[1]))


def _average(given: dict[str, Any]) -> str:
    return "mean" if given["count_include_pad"] else "mean inside"


def _global_mean(node: Node) -> Part | None:
    given = arguments(node)
    x = given["self"]
    if node.target is aten.mean.dim:
        dims = {dim % 4 for dim in given["dim"] or ()}
        wanted = dims == {2, 3} and given["keepdim"] and given["dtype"] is None
    else:
        wanted = _pair(given["output_size"]) == (1, 1)
    return Part("global mean", (x,)) if wanted and is_map(x) else None


def _nearest(node: Node) -> Part | None:
    given = arguments(node)
    x = given.get("input", given.get("self"))
    if not isinstance(x, Node) or not is_map(x):
        return None
    size, out = x.meta["val"].shape[2:], node.meta["val"].shape[2:]
    known = all(type(number) is int for number in (*size, *out))
    # With other factors some rows are there more often than others.
    if not known or any(b % a for a, b in zip(size, out)) or not _says(given, size, out):
        return None
    return Part("repeat", (x,), times=(out[0] // size[0], out[1] // size[1]))


def _says(given: dict[str, Any], size: Any, out: Any) -> bool:
    """Whether the factors that a call names, which decide where pixels come from, are those of the sizes."""
    factors = given.get("scale_factors") or [given.get("scales_h"), given.get("scales_w")]
    return all(f is None or f == b / a for f, a, b in zip(factors, size, out))


def _binary(kind: str) -> Callable[[Node], Part | None]:
    def reader(node: Node) -> Part | None:
        given = arguments(node)
        a, b = given["self"], given["other"]
        if given.get("alpha", 1) != 1 or not ((is_map(a) and is_map(b)) or (is_tokens(a) and is_tokens(b))):
            return None
        if same_shape(a, b):
            return Part(kind, (a, b))
        for x, other in ((a, b), (b, a)):
            full, less = sizes(x.meta["val"].shape), sizes(other.meta["val"].shape)
            # An image for all images, a place for all places, or both.
            one_place = is_map(a) and less[1:] == (full[1], 1, 1)
            if (
                less[0] in (1, full[0])
                and (one_place or less[1:] == full[1:])
                and (node.target not in _IN_PLACE or x is a)
            ):
                return Part(kind, (x, other))
        return None

    return reader


def _activation(finish: Callable[[dict[str, Any]], Finish | None]) -> Callable[[Node], Part | None]:
    def reader(node: Node) -> Part | None:
        given = arguments(node)
        found = finish(given)
        x = given["self"]
        return Part("activate", (x,), finish=found) if found is not None and (is_map(x) or is_tokens(x)) else None

    return reader


def _clamp(low: str, high: str) -> Callable[[dict[str, Any]], Finish | None]:
    def finish(given: dict[str, Any]) -> Finish | None:
        bounds = [-math.inf if given[low] is None else given[low], math.inf if given[high] is None else given[high]]
        plain = all(isinstance(bound, (int, float)) for bound in bounds) and bounds[0] <= bounds[1]
        return Finish("relu", float(bounds[0]), float(bounds[1])) if plain else None

    return finish


def _concat(node: Node) -> Part | None:
    given = arguments(node)
    parts = tuple(given["tensors"])
    if given["dim"] % 4 != 1 or not parts or not all(map(is_map, parts)):
        return None
    first = sizes(parts[0].meta["val"].shape)
    others = [sizes(part.meta["val"].shape) for part in parts]
    alike = all(other[0] == first[0] and other[2:] == first[2:] for other in others)
    return Part("concat", parts) if alike else None


def _named(name: str) -> Callable[[dict[str, Any]], Finish]:
    return lambda _: Finish(name)


def _gelu(given: dict[str, Any]) -> Finish:
    return Finish("gelu_tanh" if given["approximate"] == "tanh" else "gelu")


_FINISHES: dict[str, Callable[[dict[str, Any]], Finish | None]] = {
    "relu": lambda _: Finish("relu"),
    "relu6": lambda _: Finish("relu", 0.0, 6.0),
    "hardtanh": _clamp("min_val", "max_val"),
    "clamp": _clamp("min", "max"),
    "clamp_min": lambda given: _clamp("min", "max")({**given, "max": None}),
    "silu": _named("silu"),
    "gelu": _gelu,
    "sigmoid": _named("sigmoid"),
    "hardsigmoid": _named("hardsigmoid"),
    "hardswish": _named("hardswish"),
}
_IN_PLACE: set[Any] = {aten.add_.Tensor, aten.mul_.Tensor}
_READERS: dict[Any, Callable[[Node], Part | None]] = {
    aten.conv2d.default: _conv,
    aten.conv2d.padding: _conv,
    aten.conv_transpose2d.input: _transposed,
    aten.pixel_shuffle.default: _shuffle,
    aten.max_pool2d.default: _pool(lambda _: "max"),
    aten.avg_pool2d.default: _pool(_average),
    aten.adaptive_avg_pool2d.default: _global_mean,
    aten.mean.dim: _global_mean,
    aten.add.Tensor: _binary("add"),
    aten.add_.Tensor: _binary("add"),
    aten.mul.Tensor: _binary("multiply"),
    aten.mul_.Tensor: _binary("multiply"),
    aten.cat.default: _concat,
    aten.upsample_nearest2d.vec: _nearest,
    aten.upsample_nearest2d.default: _nearest,
    aten.linear.default: read_linear,
    aten.layer_norm.default: read_layer_norm,
    **dict.fromkeys(VIEWS, read_attention),
}
# Ops that a net applies to each number.
ACTIVATIONS: set[Any] = set()
for _name, _finish in _FINISHES.items():
    for _op in (_name, f"{_name}_"):
        if hasattr(aten, _op):
            _target = getattr(aten, _op).default
            ACTIVATIONS.add(_target)
            _READERS[_target] = _activation(_finish)
            if _op.endswith("_"):
                _IN_PLACE.add(_target)
