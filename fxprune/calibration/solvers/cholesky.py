"""cholesky: factors of positive definite matrices, also where rounding has taken that away."""

from __future__ import annotations

import torch
from torch import Tensor


def factor(matrices: Tensor) -> Tensor:
    """matrices [..., n, n], symmetric -> lower factors, in their dtype.

    Where float32 fails float64 is tried, and then with 1e-8, 1e-7, ... of the mean diagonal added, which always ends.
    Raises ValueError for matrices that are not finite, of which there are no factors.
    """
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if not bool(failed.any()):
        return factors
    if not bool(matrices.isfinite().all()):
        raise ValueError("a matrix to factor is not finite")
    wide = matrices.double()
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    scale = wide.diagonal(dim1=-2, dim2=-1).mean(-1).abs().clamp(min=torch.finfo(torch.float64).tiny)
    extra = 0.0
    while True:
        factors, failed = torch.linalg.cholesky_ex(wide + (extra * scale)[..., None, None] * eye)
        if not bool(failed.any()):
            return factors.to(matrices.dtype)
        extra = 10 * extra if extra else 1e-8


def solve(factors: Tensor, right: Tensor) -> Tensor:
    """Lower factors [..., n, n] of A and right [..., r, n] -> right @ A^-1."""
    return torch.cholesky_solve(right.mT, factors).mT
