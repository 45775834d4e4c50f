"""Calls of every op that has a rule and computes something: one line a call."""

from __future__ import annotations

import torch

from tests.couple.rule_case import B, C, F, Given, I, U, case, each

# pointwise
each(
    """
    relu relu6 gelu silu tanh mish elu celu selu leaky_relu hardswish rrelu abs neg positive square sign sgn sin
    sinh tan asinh atan erf expm1 floor ceil round trunc frac softshrink hardshrink nan_to_num clone contiguous
    detach alias lift_fresh lift_fresh_copy lift _to_copy real angle conj conj_physical resolve_conj resolve_neg
    _conj_physical _neg_view
    deg2rad rad2deg special_erf sigmoid hardsigmoid log_sigmoid exp exp2 cos cosh softplus erfc isnan isinf
    isfinite logical_not special_expit ones_like zeros_like digamma sinc
    """,
    F(3, 4),
)
each("sqrt asin atanh log1p log log2 log10 acos rsqrt reciprocal erfinv logit special_logit lgamma", U(3, 4))
case("imag", C(3, 4))
case("bitwise_not", I(9, 3, 4))
each("rand_like randn_like empty_like", F(3, 4), random=True)
case("bernoulli", Given("certain", (3, 4)))
case("full_like", F(3, 4), 2.0)
case("relu_", F(3, 4))
each("dropout feature_dropout alpha_dropout feature_alpha_dropout", F(3, 4), 0.5, False)
case("dropout", F(3, 4), 0.5, True, random=True)
each(
    """
    mul.Tensor multiply.Tensor logical_and add.Tensor sub.Tensor subtract.Tensor maximum minimum atan2 hypot
    logical_or logical_xor fmax fmin copysign.Tensor eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor
    greater.Tensor greater_equal.Tensor less.Tensor less_equal.Tensor not_equal.Tensor isclose heaviside
    logaddexp logaddexp2 polar complex div.Tensor divide.Tensor true_divide.Tensor floor_divide fmod.Tensor
    remainder.Tensor ldexp.Tensor rsub.Tensor
    """,
    F(2, 3, 4),
    F(3, 1),
)
for _op in ("mul.Tensor", "add.Tensor", "div.Tensor", "maximum"):
    case(_op, F(4), F(2, 1, 4))
    case(_op, F(4, 1, axes="a."), F(4, 4, axes="aa"))
each("bitwise_and.Tensor __and__.Tensor bitwise_or.Tensor bitwise_xor.Tensor __or__.Tensor", I(9, 2, 3, 4), I(9, 3, 1))
case("__xor__.Tensor", I(9, 2, 3, 4), I(9, 3, 1))
case("mul.Scalar", F(3, 4), 2.0)
case("add.Scalar", F(3, 4), 2.0)
case("add.Tensor", F(3, 4), 2.0)
case("add.Scalar", F(3, 4), 0.0)
case("add_.Tensor", F(3, 4), F(4))
case("rsub.Scalar", F(3, 4), 2.0)
case("lerp.Scalar", F(3, 4), F(3, 4), 0.3)
case("lerp.Tensor", F(3, 4), F(3, 4), U(4))
case("xlogy.Tensor", F(3, 4), U(3, 4))
case("special_xlogy", F(3, 4), U(3, 4))
case("addcdiv", F(3, 4), F(3, 4), F(4), value=2.0)
case("addcmul", F(3, 4), F(3, 4), F(4), value=2.0)
case("addcmul", F(3, 1), F(3, 4), F(4))
each("clamp clip", F(3, 4), -0.5, 0.5)
case("clamp", F(3, 4), 0.2, 0.5)
case("clamp", F(3, 4), None, -0.1)
case("clamp.Tensor", F(3, 4), F(4), None)
case("clamp_min", F(3, 4), 0.0)
case("clamp_min", F(3, 4), 0.1)
case("clamp_max", F(3, 4), 0.0)
case("hardtanh", F(3, 4), -1.0, 1.0)
case("hardtanh", F(3, 4), 0.1, 1.0)
case("pow.Tensor_Scalar", F(3, 4), 2)
case("pow.Tensor_Scalar", U(3, 4), -0.5)
case("pow.Tensor_Scalar", F(3, 4), 0)
case("pow.Tensor_Tensor", U(3, 4), U(4))
case("pow.Scalar", 2.0, F(3, 4))
case("masked_fill.Scalar", F(3, 4), B(3, 1), 0.0)
case("masked_fill.Scalar", F(3, 4), B(3, 4), -9.0)
case("masked_fill.Scalar", F(4, axes="a"), B(4, 4, axes="aa"), 0.0)
case("masked_fill.Tensor", F(3, 4), B(4), F())
case("threshold", F(3, 4), 0.1, 0.0)
case("threshold", F(3, 4), -0.1, 0.3)
case("threshold", F(3, 4), 0.1, 0.3)
case("div.Scalar", F(3, 4), 2.0)
case("div.Tensor_mode", F(3, 4), F(4), rounding_mode="floor")
case("where.self", B(3, 4), F(3, 4), F(4))
case("where.self", B(4), F(3, 1), F(3, 4))
case("where.ScalarOther", B(3, 4), F(3, 4), 0.0)
case("where.ScalarOther", B(3, 4), F(3, 4), 1.0)
case("where.ScalarSelf", B(3, 4), 0.0, F(3, 4))
case("where", B(3, 4))
case("prelu", F(2, 4, 3), F(4))
case("prelu", F(2, 4, 3), F(1))
case("prelu", F(4), F(1))
case("zero", F(3, 4))
case("zero_", F(3, 4))
case("fill.Scalar", F(3, 4), 1.5)
case("fill.Scalar", F(3, 4), 0.0)
case("fill_.Tensor", F(3, 4), F())
case("copy", F(3, 4), F(4))
case("copy_", F(3, 4), F(3, 1))
case("to.dtype", F(3, 4), torch.float32)
case("type_as", F(3, 4), F(2))

# contract
case("linear", F(2, 3, 6), F(4, 6), F(4))
case("linear", F(2, 3, 6), F(4, 6))
case("linear", F(6), F(4, 6), F(4))
case("linear", F(4, 4, axes="ab"), F(4, 4, axes="ab"), F(4, axes="a"))
case("linear", F(2, 4, axes=".a"), F(4, 4, axes="aa"))
case("mm", F(3, 6), F(6, 4))
case("mm", F(4, 6, axes="ab"), F(6, 4, axes="ba"))
case("bmm", F(2, 3, 6), F(2, 6, 4))
case("dot", F(6), F(6))
case("vdot", F(6), F(6))
case("mv", F(4, 6), F(6))
case("outer", F(4), F(6))
case("outer", F(4, axes="a"), F(4, axes="a"))
case("ger", F(4), F(6))
case("embedding", F(9, 4), I(9, 2, 3))
case("bilinear", F(2, 3, 4), F(2, 3, 6), F(5, 4, 6), F(5))
case("bilinear", F(2, 4), F(2, 6), F(5, 4, 6))
for _op in ("matmul", "linalg_matmul"):
    case(_op, F(6), F(6))
    case(_op, F(6), F(2, 6, 4))
    case(_op, F(2, 3, 6), F(6))
    case(_op, F(2, 1, 3, 6), F(5, 6, 4))
    case(_op, F(3, 6), F(2, 6, 4))
case("matmul", F(4, 4, axes="aa"), F(4, 6, axes="a."))
case("addmm", F(4), F(3, 6), F(6, 4))
case("addmm", F(3, 1), F(3, 6), F(6, 4))
case("addmm", F(3, 4), F(3, 6), F(6, 4), beta=0.5, alpha=2.0)
case("addmm", F(4, axes="a"), F(4, 6, axes="ab"), F(6, 4, axes="ba"))
case("baddbmm", F(2, 3, 4), F(2, 3, 6), F(2, 6, 4))
case("baddbmm", F(3, 1), F(2, 3, 6), F(2, 6, 4))
case("addbmm", F(3, 4), F(2, 3, 6), F(2, 6, 4))
case("addmv", F(4), F(4, 6), F(6))
case("addmv", F(1), F(4, 6), F(6))
case("addr", F(4), F(3), F(4))
case("inner", F(2, 3, 6), F(4, 6))
case("inner", F(), F(4, 6))
case("tensordot", F(3, 4, 6), F(6, 5, 3), [0, 2], [2, 0])
case("tensordot", F(3, 4, 6), F(6, 5), [-1], [0])
case("linalg_multi_dot", [F(3, 4), F(4, 6), F(6, 5)])
case("linalg_multi_dot", [F(4), F(4, 6), F(6)])
case("linalg_multi_dot", [F(4), F(4, 6), F(6, 2)])
case("chain_matmul", [F(3, 4), F(4, 6), F(6, 5)])
case("einsum", "bij,bkj->bik", [F(2, 3, 6), F(2, 4, 6)])
case("einsum", "...ij,jk", [F(2, 3, 4), F(4, 5)])
case("einsum", "bhid,hde->bihe", [F(2, 3, 4, 6), F(3, 6, 5)])
case("einsum", "...i,oi->...o", [F(2, 3, 6), F(4, 6)])
case("einsum", "...ij->j", [F(2, 3, 4)])
case("einsum", "oi,bi->bo", [F(4, 6), F(2, 6)])
case("einsum", "bij->ji", [F(2, 3, 4)])
case("einsum", "ba", [F(3, 4)])
case("einsum", "bi,bi->b", [F(2, 6), F(1, 6)])
case("einsum", "ii->i", [F(4, 4)])
case("einsum", "i,j,k->ikj", [F(2), F(3), F(4)])
case("scaled_dot_product_attention", F(2, 4, 3, 6), F(2, 4, 5, 6), F(2, 4, 5, 4))
case("scaled_dot_product_attention", F(2, 3, 6), F(2, 5, 6), F(2, 5, 4), F(3, 5))
case("scaled_dot_product_attention", F(2, 4, 3, 6), F(2, 4, 3, 6), F(2, 4, 3, 4), is_causal=True)
case("scaled_dot_product_attention", F(2, 4, 3, 6), F(2, 4, 5, 6), F(2, 4, 5, 4), F(2, 4, 1, 5), scale=0.3)
case("scaled_dot_product_attention", F(2, 6, 3, 4), F(2, 2, 5, 4), F(2, 2, 5, 4), enable_gqa=True)
case("scaled_dot_product_attention", F(2, 4, 3, 6), F(1, 1, 5, 6), F(1, 4, 5, 4))
case("scaled_dot_product_attention", F(2, 3, 4, axes=".ab"), F(2, 5, 4, axes="..b"), F(2, 5, 4, axes="..b"))
for _mode in (0, 1, 2):
    case("embedding_bag", F(9, 4), I(9, 6), I(1, 1), False, _mode)
_ROWS, _EXPERTS, _ENDS = Given("single", (6, 16)), Given("single", (2, 16, 16)), Given("ends", (2,), high=6)
case("_grouped_mm", _ROWS, _EXPERTS, _ENDS, aligned=True)

each("_conj _conj_physical conj_physical resolve_conj", C(2, 3, 4))

# compare
case("cosine_similarity", F(2, 4, 3), F(2, 4, 3), 1)
case("cosine_similarity", F(2, 1, 6), F(3, 6), -1)
case("cosine_similarity", F(2, 4, 3), F(3), 0)
case("cdist", F(2, 3, 6), F(2, 4, 6))
case("cdist", F(3, 6), F(2, 4, 6), 1.0)
case("cdist", F(3, 6), F(4, 6), 0.0)
case("cdist", F(4, 6, axes="ab"), F(4, 6, axes="ab"))
case("pairwise_distance", F(3, 6), F(3, 6))
case("pairwise_distance", F(3, 6), F(6), keepdim=True)
case("cross", F(2, 3, 4), F(2, 3, 4), 1)
case("cross", F(3, 4), F(3, 4))
case("linalg_cross", F(1, 2, 3), F(4, 2, 3))
case("bucketize.Tensor", F(3, 4), Given("sorted", (5,)))
case("bucketize.Scalar", 0.1, Given("sorted", (5,)))
case("isin.Tensor_Tensor", I(9, 3, 4), I(9, 4))
case("isin.Tensor_Scalar", I(3, 3, 4), 1)
case("isin.Scalar_Tensor", 1, I(3, 3, 4))
case("searchsorted.Tensor", Given("sorted", (5,)), F(3, 4))

# conv
for _n in (1, 2, 3):
    _k, _s = [3] * _n, [5] * _n
    case(f"conv{_n}d", F(2, 6, *_s), F(4, 6, *_k), F(4))
    case(f"conv{_n}d", F(2, 6, *_s), F(4, 6, *_k))
    case(f"conv{_n}d", F(2, 6, *_s), F(8, 3, *_k), F(8), [1] * _n, [1] * _n, [1] * _n, 2)
    case(f"conv_transpose{_n}d", F(2, 6, *_s), F(6, 4, *_k), F(4))
    case(f"conv_transpose{_n}d", F(2, 6, *_s), F(6, 4, *_k), F(8), [1] * _n, [0] * _n, [0] * _n, 2)
case("conv2d", F(2, 6, 5, 5), F(6, 1, 3, 3), F(6), [1, 1], [0, 0], [1, 1], 6)
case("conv2d", F(2, 6, 5, 5), F(12, 1, 3, 3), F(12), [1, 1], [0, 0], [1, 1], 6)
case("conv2d", F(2, 12, 5, 5), F(6, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], 6)
case("conv2d", F(2, 12, 5, 5), F(12, 3, 1, 1), None, [1, 1], [0, 0], [1, 1], 4)
case("conv2d", F(6, 5, 5), F(4, 6, 3, 3), F(4))
case("conv2d.padding", F(2, 6, 5, 5), F(4, 6, 3, 3), F(4), [1, 1], "same")
case("conv2d", F(2, 4, 3, 3, axes=".a.."), F(4, 4, 1, 1, axes="aa.."))
case("conv2d", F(2, 4, 3, 3, axes=".a.."), F(4, 2, 1, 1, axes="a..."), None, [1, 1], [0, 0], [1, 1], 2, out=".a..")
case("conv_transpose2d", F(2, 6, 5, 5), F(6, 1, 3, 3), None, [1, 1], [0, 0], [0, 0], 6)
case("conv_transpose2d", F(2, 6, 5, 5), F(6, 2, 3, 3), F(12), [1, 1], [0, 0], [0, 0], 6)
case("convolution", F(2, 6, 5, 5), F(8, 3, 3, 3), F(8), [1, 1], [0, 0], [1, 1], False, [0, 0], 2)
case("convolution", F(2, 6, 5, 5), F(6, 4, 3, 3), F(8), [1, 1], [0, 0], [1, 1], True, [0, 0], 2)

# norm
case("batch_norm", F(2, 6, 5), F(6), F(6), F(6), U(6), False, 0.1, 1e-5, False)
case("batch_norm", F(2, 6), None, None, F(6), U(6), False, 0.1, 1e-5, False)
case("batch_norm", F(2, 6, 5), F(6), F(6), F(6), U(6), True, 0.1, 1e-5, False)
case("batch_norm", F(2, 6, 5), F(6), F(6), None, None, True, 0.1, 1e-5, False)
case("instance_norm", F(2, 6, 5), F(6), F(6), None, None, True, 0.1, 1e-5, False)
case("instance_norm", F(2, 6, 5), None, None, None, None, True, 0.1, 1e-5, False)
case("instance_norm", F(2, 6, 5), F(6), F(6), F(6), U(6), False, 0.1, 1e-5, False)
case("layer_norm", F(2, 3, 6), [6], F(6), F(6))
case("layer_norm", F(2, 4, 6), [4, 6], F(4, 6), F(4, 6))
case("layer_norm", F(2, 3, 6), [6])
case("rms_norm", F(2, 3, 6), [6], F(6), 1e-5)
case("rms_norm", F(2, 3, 6), [6])
case("group_norm", F(2, 6, 5), 2, F(6), F(6))
case("group_norm", F(2, 6, 5, 3), 3)
case("group_norm", F(2, 6, 5), 6, F(6), F(6))
case("group_norm", F(2, 6, 5), 6)
case("group_norm", F(2, 6, 5), 1, F(6), F(6))
case("_weight_norm", F(4, 6, 3), F(4, 1, 1), 0)
case("_weight_norm", F(4, 6), F(1, 6), 1)

# reduce
for _op in ("sum", "mean"):
    case(_op, F(3, 4))
    case(f"{_op}.dim{'_IntList' if _op == 'sum' else ''}", F(2, 4, 3), [1])
    case(f"{_op}.dim{'_IntList' if _op == 'sum' else ''}", F(2, 4, 3), [-1, 1], True)
    case(f"{_op}.dim{'_IntList' if _op == 'sum' else ''}", F(2, 4), None)
case("sum.dim_IntList", F(4, 4, axes="aa"), [1])
for _ord in (2, 1, 0, float("inf"), float("-inf")):
    case("linalg_vector_norm", F(3, 4), _ord, [1])
case("linalg_norm", F(3, 4), None, [1])
case("linalg_norm", F(3, 4))
case("linalg_norm", F(2, 3, 4), 1, [1, 2])
case("linalg_norm.ord_str", F(2, 3, 4), "nuc", [1, 2])
case("linalg_matrix_norm", F(2, 3, 4), -1)
case("linalg_matrix_norm.str_ord", F(2, 3, 4))
case("norm.Scalar", F(3, 4))
case("norm.ScalarOpt_dim", F(3, 4), None, [1], True)
case("norm.ScalarOpt_dim", F(3, 4), -1, [1])
case("frobenius_norm.dim", F(3, 4), [1])
case("nuclear_norm", F(3, 4))
case("nansum", F(3, 4), [1])
case("count_nonzero", F(3, 4), 1)
each("amax amin", F(2, 4, 3), [1])
case("amax", F(2, 4, 3), [0, 2], True)
case("aminmax", F(3, 4), dim=1)
case("prod.dim_int", F(3, 4), 1)
case("any.dim", F(3, 4), 1)
case("all.dim", F(3, 4), 1)
for _op in ("std", "var", "std_mean", "var_mean"):
    case(f"{_op}.correction", F(2, 4, 3), [1], correction=0, keepdim=True)
case("var.correction", F(2, 4, 3), None)
case("nanmean", F(3, 4), [1])
each("argmax argmin", F(3, 4), 1)
case("argmax", F(3, 4))
case("logsumexp", F(3, 4), [1])
case("median.dim", F(3, 4), 1)
case("nanmedian.dim", F(3, 4), 1)
case("mode", F(3, 4), 1)
case("kthvalue", F(3, 4), 2, 1)
for _op in ("max", "min"):
    case(_op, F(3, 4))
    case(f"{_op}.dim", F(2, 4, 3), 1)
    case(f"{_op}.other", F(3, 4), F(4))
each("softmax.int log_softmax.int special_softmax", F(3, 4), 1)
each("_softmax _log_softmax", F(3, 4), 1, False)
each("cumsum cumprod logcumsumexp cummax cummin", F(3, 4), 1)
case("sort", F(3, 4))
case("sort.stable", F(3, 4), stable=True, dim=0)
case("argsort", F(3, 4), 0)
case("topk", F(3, 4), 2)
case("msort", F(3, 4))

# recurrent


def _layers(gates: int, layers: int, directions: int, biases: bool, projected: int = 0) -> list[Given]:
    """The parameters of layers of 6 units over 4 inputs, as torch lists them."""
    found: list[Given] = []
    for layer in range(layers):
        for _ in range(directions):
            width = 4 if layer == 0 else (projected or 6) * directions
            found += [F(gates * 6, width), F(gates * 6, projected or 6)]
            found += [F(gates * 6), F(gates * 6)] if biases else []
            found += [F(projected, 6)] if projected else []
    return found


def _recurrent(
    op: str, layers: int, directions: int, biases: bool = True, batch_first: bool = False, projected: int = 0
) -> None:
    gates = {"lstm": 4, "gru": 3}.get(op, 1)
    batch = 3 if batch_first else 2
    states: list[Given] = [F(layers * directions, batch, projected or 6)]
    states += [F(layers * directions, batch, 6)] if op == "lstm" else []
    parameters = _layers(gates, layers, directions, biases, projected)
    flags = (biases, layers, 0.0, False, directions == 2, batch_first)
    case(f"{op}.input", F(3, 2, 4), states if op == "lstm" else states[0], parameters, *flags)


_recurrent("lstm", 1, 1)
_recurrent("lstm", 1, 1, biases=False, batch_first=True)
_recurrent("lstm", 2, 2)
_recurrent("lstm", 2, 1, projected=3)
_recurrent("gru", 1, 1)
_recurrent("gru", 2, 2, batch_first=True)
for _op in ("rnn_tanh", "rnn_relu"):
    _recurrent(_op, 1, 1)
    _recurrent(_op, 2, 2, biases=False)
_packed = [F(1, 3, 6), F(1, 3, 6)], _layers(4, 1, 1, True), True, 1, 0.0, False, False
case("lstm.data", F(6, 4), Given("full", (2,), high=3), *_packed)
case("lstm_cell", F(3, 4), [F(3, 6), F(3, 6)], F(24, 4), F(24, 6), F(24), F(24))
case("gru_cell", F(3, 4), F(3, 6), F(18, 4), F(18, 6), F(18), F(18))
each("rnn_tanh_cell rnn_relu_cell", F(3, 4), F(3, 6), F(6, 4), F(6, 6))
