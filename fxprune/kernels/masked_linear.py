"""masked_linear: a linear layer for training that takes its weight's mask as bits, so that w * m never lies in memory.

Multiplying a weight by its mask before the product makes another weight, and autograd keeps it, and the mask as bools,
until the backward pass. This op keeps x, the weight and one bit an element. On CUDA `triton_kernels.masked` applies
the mask inside the three products; elsewhere, for dtypes that it does not take and for weights that are not contiguous,
the product with the mask is made and dropped in each of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton import cannot_run_on, masked
from .triton import operands as _operands

_library = torch.library.Library("fxprune", "FRAGMENT")
_library.define("masked_linear(Tensor x, Tensor weight, Tensor bits, Tensor? bias) -> Tensor")
_library.define("masked_linear_input(Tensor dy, Tensor weight, Tensor bits) -> Tensor")
_library.define("masked_linear_weight(Tensor dy, Tensor x, Tensor bits) -> Tensor")
op = torch.ops.fxprune.masked_linear.default
_input_gradient = torch.ops.fxprune.masked_linear_input.default
_weight_gradient = torch.ops.fxprune.masked_linear_weight.default


def masked_linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., i], weight [o, i], bits uint8 [ceil(o * i / 8)] (as of PackedMask), bias [o] -> y [..., o].

    An export sees the product that it stands for, so that a trained model is captured as any other. torch.func does not
    go through it.
    """
    if torch.compiler.is_exporting():
        return F.linear(x, weight * masked.unpack(weight, bits), bias)
    return op(x, weight, bits, bias)


def _forward(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    if _reads(x, weight):
        y = masked.forward(_rows(x), weight, bits, bias)
        return y.view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, _product(weight, bits), bias)


def _gradient_of_input(dy: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    if _reads(dy, weight):
        return masked.gradient_input(_rows(dy), weight, bits).view(*dy.shape[:-1], weight.shape[1])
    return dy @ _product(weight, bits)


def _gradient_of_weight(dy: Tensor, x: Tensor, bits: Tensor) -> Tensor:
    if _has_kernel(dy, x):
        return masked.gradient_weight(_rows(dy), _rows(x), bits)
    return _product(dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]), bits)


def _product(weight: Tensor, bits: Tensor) -> Tensor:
    return torch.where(masked.unpack(weight, bits), weight, 0.0)


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    # What has no elements is contiguous to torch whatever its strides, so it is cloned.
    return rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)


def _has_kernel(a: Tensor, b: Tensor) -> bool:
    return a.is_cuda and a.dtype in _operands.DTYPES and a.dtype == b.dtype and not cannot_run_on(a.device)


def _reads(x: Tensor, weight: Tensor) -> bool:
    return _has_kernel(x, weight) and weight.is_contiguous()


def _like_forward(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _like_input(dy: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], weight.shape[1])


def _like_weight(dy: Tensor, x: Tensor, bits: Tensor) -> Tensor:
    return x.new_empty(dy.shape[-1], x.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bits, bias = inputs
    ctx.save_for_backward(x, weight, bits)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bits = ctx.saved_tensors
    for_x, for_weight, _, for_bias = ctx.needs_input_grad
    return (
        _input_gradient(dy, weight, bits) if for_x else None,
        _weight_gradient(dy, x, bits) if for_weight else None,
        None,
        dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.has_bias and for_bias else None,
    )


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _input_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Of dx = dy @ (w * m)."""
    dy, weight, bits = ctx.saved_tensors
    for_dy, for_weight, _ = ctx.needs_input_grad
    return op(g, weight, bits, None) if for_dy else None, _weight_gradient(dy, g, bits) if for_weight else None, None


def _weight_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Of dw = (dy^T @ x) * m."""
    dy, x, bits = ctx.saved_tensors
    for_dy, for_x, _ = ctx.needs_input_grad
    return op(x, g, bits, None) if for_dy else None, _input_gradient(dy, g, bits) if for_x else None, None


def _cast(device: str) -> Any:
    """Under torch.autocast all is cast as for torch's own linear, and the casts pass gradients."""

    def cast(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype(device) if x.dtype is not torch.float64 else x.dtype
        with torch.autocast(device, enabled=False):
            return op(x.to(dtype), weight.to(dtype), bits, None if bias is None else bias.to(dtype))

    return cast


for _name, _kernel, _fake in (
    ("masked_linear", _forward, _like_forward),
    ("masked_linear_input", _gradient_of_input, _like_input),
    ("masked_linear_weight", _gradient_of_weight, _like_weight),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxprune::{_name}", _fake, lib=_library)
torch.library.register_autograd("fxprune::masked_linear", _backward, setup_context=_save, lib=_library)
for _name, _gradient in (("masked_linear_input", _input_backward), ("masked_linear_weight", _weight_backward)):
    torch.library.register_autograd(f"fxprune::{_name}", _gradient, setup_context=_save_gradient, lib=_library)
_library.impl("masked_linear", _cast("cpu"), "AutocastCPU")
_library.impl("masked_linear", _cast("cuda"), "AutocastCUDA")
