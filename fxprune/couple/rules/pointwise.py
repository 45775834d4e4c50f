"""Pointwise ops: dimensions line up from the right; families differ in where zeros survive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .relation import (
    Atoms,
    Dims,
    Here,
    Relation,
    Zero,
    add,
    by_dimension,
    nowhere,
    of_first,
    relation,
    tensors,
    tie_broadcast,
)


def pointwise(says: str, zero: Zero, *ops: str) -> None:
    """Declare ops that work element by element with broadcasting."""

    def tie(here: Here, out: Dims, **arguments: Any) -> None:
        tie_broadcast(here, out, tensors(arguments.values()))

    for op in ops:
        add(op, Relation(tie, zero, None, says))


def _any(here: Here, out: Dims, **arguments: Any) -> Atoms:
    return by_dimension(out, tensors(arguments.values()), every=False)


def _all(here: Here, out: Dims, **arguments: Any) -> Atoms:
    numbers = [v for k, v in arguments.items() if k in ("self", "other") and not isinstance(v, Dims) and v != 0]
    return set() if numbers else by_dimension(out, tensors(arguments.values()), every=True)


def _where(condition: Callable[..., bool]) -> Zero:
    """Zero where the first tensor is, if the other arguments say so."""

    def zero(here: Here, out: Dims, **arguments: Any) -> Atoms:
        return of_first(here, out, **arguments) if condition(**arguments) else set()

    return zero


def _clamps_around_zero(**a: Any) -> bool:
    low, high = a.get("min", a.get("min_val")), a.get("max", a.get("max_val"))
    low, high = 0.0 if low is None else low, 0.0 if high is None else high
    return isinstance(low, (int, float)) and isinstance(high, (int, float)) and low <= 0.0 <= high


def _positive_power(**a: Any) -> bool:
    return isinstance(a["exponent"], (int, float)) and a["exponent"] > 0


def _fills_with_zero(**a: Any) -> bool:
    return isinstance(a["value"], (int, float)) and a["value"] == 0


pointwise("f(x) with f(0) = 0", of_first,
    "relu", "relu6", "gelu", "silu", "tanh", "mish", "elu", "celu", "selu", "leaky_relu", "hardswish", "rrelu",
    "abs", "neg", "positive", "sqrt", "square", "sign", "sgn", "sin", "sinh", "tan", "asin", "asinh", "atan", "atanh",
    "erf", "expm1", "log1p", "floor", "ceil", "round", "trunc", "frac", "softshrink", "hardshrink", "nan_to_num",
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
    "clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy", "lift", "_to_copy", "real", "imag",
    "angle", "conj", "conj_physical", "resolve_conj", "resolve_neg", "_conj",
    "_conj_physical", "_neg_view", "deg2rad", "rad2deg", "special_erf",
)  # fmt: skip
pointwise("x * y", _any, "mul", "multiply", "logical_and", "bitwise_and", "__and__")
pointwise("x + y", _all,
    "add", "sub", "subtract", "rsub", "maximum", "minimum", "atan2", "hypot", "lerp", "logical_or",
    "logical_xor", "bitwise_or", "bitwise_xor", "fmax", "fmin", "copysign",
)  # fmt: skip
pointwise("f(x) with f(0) not 0, or not known to be", nowhere,
    "sigmoid", "hardsigmoid", "log_sigmoid", "exp", "exp2", "log", "log2", "log10", "cos", "cosh", "acos",
    "rsqrt", "reciprocal", "softplus", "erfc", "erfinv", "eq", "ne", "lt", "le", "gt", "ge", "isnan",
    "isinf", "isfinite", "logical_not", "bitwise_not", "isclose", "logit", "special_expit", "special_logit",
    "ones_like", "full_like", "rand_like", "randn_like", "empty_like", "heaviside", "__or__", "__xor__", "bernoulli",
    "lgamma", "digamma", "sinc", "logaddexp", "logaddexp2", "xlogy", "special_xlogy", "addcdiv", "polar", "complex",
    "greater", "greater_equal", "less", "less_equal", "not_equal", "ldexp",
)  # fmt: skip
pointwise("a clamp", _where(_clamps_around_zero), "clamp", "hardtanh", "clip", "clamp_min", "clamp_max")
pointwise("x where above a threshold, else a value",
    _where(lambda threshold, value, **_: threshold >= 0 and value == 0), "threshold",
)  # fmt: skip
pointwise("x ** n", _where(_positive_power), "pow")
pointwise("x where not masked, else a value", _where(_fills_with_zero), "masked_fill")


def _zero_of_quotient(here: Here, out: Dims, **arguments: Any) -> Atoms:
    above, below = arguments["self"], arguments["other"]
    if not isinstance(above, Dims):
        return set()
    zero = by_dimension(out, [above], every=True)
    if not isinstance(below, Dims):
        return zero
    for atom in zero & below.zero:
        here.freeze(atom, "0 / 0 at its removed indices")
    return zero - below.zero


pointwise("x / y", _zero_of_quotient, "div", "divide", "true_divide", "floor_divide", "fmod", "remainder")


def _zero_of_where(here: Here, out: Dims, **arguments: Any) -> Atoms:
    chosen = [v for k, v in arguments.items() if k != "condition"]
    if isinstance(out, list) or any(not isinstance(v, Dims) and v != 0 for v in chosen):
        return set()
    return by_dimension(out, tensors(chosen), every=True)


@relation("where", zero=_zero_of_where)
def where(here: Here, out: Any, **a: Any) -> None:
    """x where a condition holds, else y"""
    if isinstance(out, list):
        here.freeze_all([out, a["condition"]], "what it picks depends on values")
        return
    tie_broadcast(here, out, tensors(a.values()))


def _zero_of_addcmul(here: Here, out: Dims, **a: Any) -> Atoms:
    factors = by_dimension(out, [a["tensor1"], a["tensor2"]], every=False)
    return factors & by_dimension(out, [a["self"]], every=True)


pointwise("x + v * y * z", _zero_of_addcmul, "addcmul")


@relation("prelu", zero=of_first)
def prelu(here: Here, out: Dims, self: Dims, weight: Dims, **_: Any) -> None:
    """b c *, c -> b c *"""
    tie_broadcast(here, out, [self])
    if len(self) > 1 and len(weight):
        here.tie(weight[0], self[1])


pointwise("zeros of the same shape", lambda here, out, **_: out.atoms(), "zeros_like", "zero")
pointwise("one value in the same shape", nowhere, "fill")
pointwise("y broadcast to the shape of x", lambda here, out, src, **_: by_dimension(out, [src], every=True), "copy")


@relation("to", "type_as", zero=of_first)
def convert(here: Here, out: Dims, self: Dims, **_: Any) -> None:
    """the same values in another type"""
    tie_broadcast(here, out, [self])
