"""triton_kernels.masked: products with a weight that is masked in the kernel, held against float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_case import ARITHMETIC, assert_sums, bits_of, normal, poisoned
from triton_kernels import masked

SIZES = [(5, 7, 13), (33, 40, 72), (1, 64, 16), (70, 33, 130), (3, 5, 0), (0, 4, 8), (2, 0, 8), (130, 20, 24)]


@pytest.mark.parametrize(("m", "o", "i"), SIZES)
@pytest.mark.parametrize(("device", "dtype"), ARITHMETIC)
def test_products(device: str, dtype: torch.dtype, m: int, o: int, i: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, dy = (normal(*size, dtype=dtype, device=device) for size in ((m, i), (o, i), (m, o)))
    bias = normal(o, dtype=dtype, device=device)
    keep = torch.rand(o, i) < 0.4
    keep[:1] = False
    keep = keep.to(device)
    bits = bits_of(keep)
    a, w, d = x.double(), torch.where(keep, weight, 0.0).double(), dy.double()
    # What a mask leaves out may hold anything.
    weight = torch.where(keep, weight, torch.nan)
    with poisoned(monkeypatch):
        y = masked.forward(x, weight, bits, bias)
        plain = masked.forward(x, weight, bits)
        dx = masked.gradient_input(dy, weight, bits)
        dw = masked.gradient_weight(dy, x, bits)
    assert_sums(y, a @ w.T + bias.double(), a.abs() @ w.abs().T + bias.double().abs(), i)
    assert_sums(plain, a @ w.T, a.abs() @ w.abs().T, i)
    assert_sums(dx, d @ w, d.abs() @ w.abs(), o)
    assert_sums(dw, torch.where(keep, d.T @ a, 0.0), d.abs().T @ a.abs(), m)
    assert not dw[~keep].any()
    torch.testing.assert_close(
        masked.reference(x, weight, bits, bias).double(), a @ w.T + bias.double(), rtol=2e-2, atol=6e-2
    )


@pytest.mark.parametrize(("device", "dtype"), ARITHMETIC)
def test_rows_that_lie_apart(device: str, dtype: torch.dtype) -> None:
    wide, weight = normal(6, 40, dtype=dtype, device=device), normal(16, 24, dtype=dtype, device=device)
    bits = torch.full((48,), 255, dtype=torch.uint8, device=device)
    x = wide[::2, 8:32]
    found = masked.forward(x, weight, bits)
    assert_sums(found, x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T, 24)


def test_what_the_kernels_cannot_read_is_refused() -> None:
    x, weight, bits = torch.randn(3, 8), torch.randn(4, 8), torch.full((4,), 255, dtype=torch.uint8)
    for given, why in (
        ((x.half(), weight, bits), "x is torch.float16 and the weight torch.float32"),
        ((x.double(), weight.double(), bits), "x is torch.float64"),
        ((x[:, :7], weight, bits), r"x \[3, 7\] does not fit a weight \[4, 8\]"),
        ((x.T.contiguous().T, weight, bits), "the rows of x are not contiguous"),
        ((x, weight.T.contiguous().T, bits), r"the weight \[4, 8\] is no contiguous matrix"),
        ((x, weight, bits[:3]), r"the mask is torch.uint8 \[3\], not uint8 \[4\]"),
        ((x, weight, bits, torch.randn(3)), r"the bias is torch.float32 \[3\] on cpu, not torch.float32 \[4\]"),
    ):
        with pytest.raises(ValueError, match=why):
            masked.forward(*given)
    with pytest.raises(ValueError, match="dy has 2 rows and x 3"):
        masked.gradient_weight(torch.randn(2, 4), x, bits)
