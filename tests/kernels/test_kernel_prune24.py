"""triton_kernels.prune24: selection n of m and 2:4 packing, held against torch."""

from __future__ import annotations

import pytest
import torch

from fxprune.plan.patterns import SemiStructured
from fxprune.select.project import project
from tests.kernels.kernel_case import DEVICES, FLOATS, bits_of, poisoned, same_bits
from triton_kernels import prune24

CASES = [
    (5, 12, 2, 4),
    (3, 35, 2, 7),
    (4, 48, 5, 16),
    (2, 6, 1, 2),
    (3, 5, 1, 5),
    (7, 9, 1, 1),
    (0, 4, 2, 4),
    (3, 0, 2, 4),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_n_of_m(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for o, i, n, m in [*CASES, (2, 8, 0, 4), (2, 8, 4, 4), (30, 1200, 2, 4)]:
        weight = torch.randint(-3, 4, (o, i)).to(device, dtype)
        with poisoned(monkeypatch):
            found = prune24.select(weight, n, m)
        wanted = prune24.reference_select(weight, n, m)
        assert torch.equal(found, bits_of(wanted)), (o, i, n, m)
        if 0 < n < m and weight.numel():
            assert torch.equal(wanted, project(weight.abs().unsqueeze(0), SemiStructured(n, m))[0])


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinity_stay_first(device: str) -> None:
    weight = torch.tensor([[1.0, torch.nan, -torch.inf, 2.0]], device=device)
    assert prune24.select(weight, 2, 4).tolist() == [0b0110]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_packing_two_of_four(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for o, i in ((3, 4), (5, 36), (2, 1100), (7, 64), (0, 8), (2, 0)):
        weight = -torch.randint(-3, 4, (o, i)).to(device, dtype)
        with poisoned(monkeypatch):
            values, meta = prune24.pack(weight)
        wanted = prune24.reference_pack(weight)
        assert same_bits(values, wanted[0]) and torch.equal(meta, wanted[1])
        kept = torch.where(prune24.reference_select(weight, 2, 4), weight, 0.0)
        kept = torch.where(kept == 0, 0.0, kept)
        assert same_bits(prune24.reference_unpack(values, meta), kept)
        with poisoned(monkeypatch):
            assert same_bits(prune24.unpack(values, meta), kept)


def test_weights_that_do_not_fit_are_refused() -> None:
    for call, why in (
        (lambda: prune24.select(torch.randn(2, 6), 2, 4), "rows of 6 are no multiple of 4"),
        (lambda: prune24.select(torch.randn(2, 34), 2, 17), "n of up to 16 neighbours, not 2 of 17"),
        (lambda: prune24.select(torch.randn(2, 4), 5, 4), "not 5 of 4"),
        (lambda: prune24.pack(torch.randn(4, 2).T), "contiguous float matrices, not torch.float32"),
        (lambda: prune24.pack(torch.randn(2, 4).double()), "not torch.float64"),
    ):
        with pytest.raises(ValueError, match=why):
            call()
