"""dense: the weight as it is, zeros and all. Always fits; what the layouts are measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .site import Site

# Multiply-adds per second and thread that a good dense kernel reaches; only orders the report's predictions.
_FLOPS_PER_THREAD = 7e10
# The same of a GPU with tensor cores, and bytes a second.
_GPU_FLOPS, _GPU_BYTES = 3e14, 2e12


def predict_dense(site: Site, tokens: int) -> float:
    """Seconds for x [tokens, i] by operation count; on a GPU by the bytes of the weight where these take longer."""
    if site.weight.is_cuda:
        return max(2 * tokens * site.weight.numel() / _GPU_FLOPS, site.weight.nbytes / _GPU_BYTES)
    return 2 * tokens * site.weight.numel() / (_FLOPS_PER_THREAD * torch.get_num_threads())


def best_dense(site: Site, x: Tensor) -> list[Callable[[], Tensor]]:
    """The dense ways to compute this site for x [m, i] that a compiled model may use.

    Torch's, and with the weight laid out beforehand MKL's in float32 and oneDNN's in bfloat16, which on CPUs with AMX
    takes a half to two thirds of torch's time.
    """
    weight, bias = site.weight, site.bias
    ways: list[Callable[[], Tensor]] = [lambda: functional.linear(x, weight, bias)]
    if x.device.type != "cpu" or len(x) == 0:
        return ways
    if x.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), len(x))
            ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], ""))
    if x.dtype == torch.float32 and torch.backends.mkl.is_available():
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, len(x))
        ways.append(lambda: torch.ops.mkl._mkl_linear(x, packed, weight, bias, len(x)))
    return ways
