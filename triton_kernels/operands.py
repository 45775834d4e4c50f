"""operands: what every linear kernel asks of x, of the stored weight and of the bias."""

from __future__ import annotations

import torch
from torch import Tensor

from .language import WHY_NOT

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(x: Tensor, values: Tensor, shape: tuple[int, int], bias: Tensor | None) -> None:
    """x [m, i], some values of a weight [o, i], bias [o]: raises ValueError where a kernel cannot read them.

    Raises RuntimeError where there is no Triton to run one.
    """
    if WHY_NOT:
        raise RuntimeError(WHY_NOT)
    o, i = shape
    if x.dtype not in DTYPES or x.dtype != values.dtype:
        raise ValueError(f"x is {x.dtype} and the weight {values.dtype}; both are to be one of {DTYPES}")
    if x.dim() != 2 or x.shape[1] != i:
        raise ValueError(f"x {list(x.shape)} does not fit a weight [{o}, {i}]")
    if x.stride(1) != 1 and i > 1:
        raise ValueError("the rows of x are not contiguous")
    if x.device != values.device:
        raise ValueError(f"x is on {x.device}, the weight on {values.device}")
    if bias is not None and (bias.shape != (o,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(f"the bias is {bias.dtype} {list(bias.shape)} on {bias.device}, not {x.dtype} [{o}]")


def check_meta(meta: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
    """Raises ValueError where meta is not that of the 2:4 weight [o, i] of these values."""
    o, i = shape
    if i % 4 or meta.dtype is not torch.int32 or meta.shape != (o, -(-i // 32)) or meta.device != values.device:
        raise ValueError(f"meta is {meta.dtype} {list(meta.shape)} on {meta.device}, not int32 [{o}, {-(-i // 32)}]")
    if not (values.is_contiguous() and meta.is_contiguous()):
        raise ValueError("values and meta are not contiguous")


def as_integers(x: Tensor) -> Tensor:
    """x -> its bits as integers of its shape: -0.0 is not 0 there, and copies of a NaN are that NaN."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def precision(x: Tensor) -> str:
    """How products of float32 are taken: as IEEE has them, unless torch allows TF32."""
    if not x.is_cuda or x.dtype is not torch.float32:
        return "ieee"
    # Reading the older switch raises where the newer one was set.
    matmul = torch.backends.cuda.matmul
    allowed = getattr(matmul, "fp32_precision", None)
    return "tf32" if allowed == "tf32" or (allowed is None and matmul.allow_tf32) else "ieee"
