"""Norms of channels, computed by torch.norm wherever it can, so that masks equal torch's bit for bit."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from .errors import WrongNormError, WrongTypeError
from .masked import is_byte_float

_NORMS = "Give a number (0, 1, 2, inf, -inf, ...), 'fro' or 'nuc'."


def _compute_norm(t: Tensor, n: float | str | None, dim: int) -> Tensor:
    """t -> the norm of each slice along `dim`: [t.shape[dim]].

    n is p of torch.norm. 'fro' is the 2-norm of all elements of a slice. 'nuc', the sum of singular values, takes a
    slice of three or more dimensions as the matrix [first, rest] and a vector as a matrix of one row. None is 'fro'.
    """
    check_norm(n)
    axis = range(t.dim())[dim]
    dims = [d for d in range(t.dim()) if d != axis]
    if not t.is_floating_point() and not t.is_complex():
        t = t.double()
    elif is_byte_float(t):
        t = t.float()
    if t.numel() == 0:
        return torch.zeros(t.shape[axis], dtype=t.abs().dtype, device=t.device)
    if n == "nuc":
        return _nuclear(t, axis, dims)
    if n == "fro" and len(dims) > 2:
        n = 2
    return torch.norm(t, p=n, dim=dims)  # pyright: ignore[reportArgumentType]


def check_norm(n: object) -> None:
    """Raise a RuntimeError or TypeError, as torch.norm does, unless n is the order of a norm."""
    if isinstance(n, str) and n not in ("fro", "nuc"):
        raise WrongNormError("cannot compute a norm", why=f"there is no norm {n!r}", do=_NORMS)
    if isinstance(n, complex):
        raise WrongNormError("cannot compute a norm", why=f"its order {n!r} is complex", do=_NORMS)
    if n is not None and not isinstance(n, (str, numbers.Real, Tensor)):
        why = f"its order {n!r} is a {type(n).__name__}"
        raise WrongTypeError("cannot compute a norm", why=why, do=_NORMS)


def _nuclear(t: Tensor, axis: int, dims: list[int]) -> Tensor:
    if len(dims) == 1:
        return torch.norm(t, p=2, dim=dims)  # one row has one singular value, its length
    if t.dtype.itemsize < 4 or (t.is_complex() and t.dtype.itemsize < 8):
        t = t.to(torch.complex64 if t.is_complex() else torch.float32)
    if len(dims) > 2:
        t = t.movedim(axis, 0).flatten(2)
        dims = [1, 2]
    return torch.norm(t, p="nuc", dim=dims)


def lowest(score: Tensor, count: int) -> Tensor:
    """score [n] -> the indices of its `count` lowest, NaN above all, among equals the lowest index first."""
    return torch.sort(score, stable=True).indices[:count]
