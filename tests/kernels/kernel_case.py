"""What the tests of Triton kernels share: where they run, what they run on, and how exact they must be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fxprune.select.mask import pack_bits

# The interpreter computes bfloat16 wrongly, so arithmetic in it is tested on a GPU alone.
CPU = pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels need a GPU"))
DEVICES = [CPU, pytest.param("cuda", marks=pytest.mark.cuda)]
ARITHMETIC = [
    pytest.param("cpu", torch.float32, marks=CPU.marks),
    pytest.param("cpu", torch.float16, marks=CPU.marks),
    pytest.param("cuda", torch.float32, marks=pytest.mark.cuda),
    pytest.param("cuda", torch.float16, marks=pytest.mark.cuda),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.cuda),
]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal numbers; the same on every device."""
    return torch.randn(*shape).to(device, dtype)


def sparse(o: int, i: int, density: float, dtype: torch.dtype, device: str) -> Tensor:
    """A weight [o, i] with +0.0 where it is pruned; its first row is all zero."""
    weight = torch.where(torch.rand(o, i) < density, torch.randn(o, i), 0.0)
    weight[:1] = 0.0
    return weight.to(device, dtype)


def bits_of(keep: Tensor) -> Tensor:
    """A bool mask as packed bits."""
    return pack_bits(keep.reshape(-1))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit, -0.0 and NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_raw(a), _raw(b))


def _raw(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_sums(found: Tensor, wanted: Tensor, scale: Tensor, terms: int) -> None:
    """found = wanted but for rounding: `wanted` in float64 of sums of `terms` products of absolute sum `scale`.

    Each of the float32 additions is off by half a unit of what is summed so far, and the result is rounded once.
    """
    allowed = (terms + 8) * torch.finfo(torch.float32).eps * scale + torch.finfo(found.dtype).eps * wanted.abs() + 1e-7
    off = (found.double() - wanted).abs()
    assert not found.isnan().any()
    assert bool((off <= allowed).all()), float((off / allowed).max())


@contextlib.contextmanager
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has torch.empty give NaN (255 for integers), so that what a kernel does not write shows."""
    plain = torch.empty

    def empty(*args: object, **kwargs: object) -> Tensor:
        made = plain(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(torch.iinfo(made.dtype).max)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
