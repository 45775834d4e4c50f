"""Ops over complex numbers and frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .relation import Dims, Here, dimension_list, of_self, relation


@relation("view_as_complex", zero=of_self)
def view_as_complex(here: Here, out: Dims, self: Dims, **_: Any) -> None:
    """* 2 -> *"""
    here.freeze(self[-1], "positions along it matter")
    here.tie_rows(self.axes, out.axes)


@relation("view_as_real", zero=of_self)
def view_as_real(here: Here, out: Dims, self: Dims, **_: Any) -> None:
    """* -> * 2"""
    here.freeze(out[-1], "positions along it matter")
    here.tie_rows(self.axes, out.axes)


@relation(*(f"fft_{kind}" for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")),
          *(f"fft_{kind}2" for kind in ("fft", "ifft", "rfft", "irfft")),
          *(f"fft_{kind}n" for kind in ("fft", "ifft", "rfft", "irfft")),
          "fft_fftshift", "fft_ifftshift", zero=of_self)  # fmt: skip
def fourier(here: Here, out: Dims, self: Dims, dim: Any = None, s: Sequence[Any] | None = None, **_: Any) -> None:
    """a Fourier transform along some dimensions, which freeze"""
    if dim is None and s is not None:
        dim = list(range(-len(s), 0))
    here.tie_or_freeze(self.axes, out.axes, dimension_list(dim, self), "a transform runs over it")
