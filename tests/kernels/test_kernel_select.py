"""triton_kernels.select: exactly the k smallest magnitudes over many tensors, held against sorting all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_case import DEVICES, FLOATS, bits_of, poisoned
from triton_kernels import select


def check(tensors: list[Tensor], k: int) -> None:
    found = select.keep_all_but(select.chunks(tensors), k)
    for bits, keep in zip(found, select.reference(tensors, k), strict=True):
        assert torch.equal(bits, bits_of(keep))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_all_amounts_over_tensors_of_any_size(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(7, 13), (70001,), (5,), (0,), (1,), (3, 8)]
    tensors = [torch.randn(size).to(device, dtype) for size in sizes]
    tensors[2].zero_()
    total = sum(x.numel() for x in tensors)
    with poisoned(monkeypatch):
        for k in (0, 1, 4, 6, total // 3, total - 1, total):
            check(tensors, k)


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_by_lowest_index_across_chunks(device: str) -> None:
    size = 2 * select.CHUNK + 100
    values = torch.randint(0, 3, (size,)).to(device, torch.bfloat16) * -1.0
    other = torch.zeros(50, dtype=torch.bfloat16, device=device)
    zeros = int((values == 0).sum())
    for k in (1, zeros // 2, zeros - 1, zeros, zeros + 20, zeros + 50, zeros + 51, size):
        check([values, other], k)


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_of_both_signs_are_equal_and_nan_is_above_all(device: str) -> None:
    x = torch.tensor([-0.0, 0.0, 1.0, -torch.inf, torch.nan, torch.inf, -0.0], device=device)
    for k in range(8):
        check([x], k)
    assert select.keep_all_but(select.chunks([x]), 6)[0].tolist() == [1 << 4]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_masked_already_neither_counts_nor_stays(device: str, dtype: torch.dtype) -> None:
    tensors = [torch.randn(n).to(device, dtype) for n in (40, 70000, 9)]
    alive = [torch.rand(40, device=device) < 0.5, None, torch.zeros(9, dtype=torch.bool, device=device)]
    chunks = select.chunks(tensors, [None if mask is None else bits_of(mask) for mask in alive])
    counts = [int(mask.sum()) if mask is not None else len(x) for mask, x in zip(alive, tensors, strict=True)]
    assert select.elements(chunks) == sum(counts)
    left = [x if mask is None else x[mask] for x, mask in zip(tensors, alive, strict=True)]
    for k in (0, 1, counts[0], 35000, sum(counts)):
        found = select.keep_all_but(chunks, k)
        for bits, mask, keep in zip(found, alive, select.reference(left, k), strict=True):
            wanted = keep if mask is None else torch.zeros_like(mask).masked_scatter_(mask, keep)
            assert torch.equal(bits, bits_of(wanted))
    with pytest.raises(ValueError, match=f"cannot take {sum(counts) + 1} of {sum(counts)} elements"):
        select.keep_all_but(chunks, sum(counts) + 1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_narrows_the_search(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_SAMPLE", 1 << 12)
    tensors = [torch.randn(n).to(device, dtype) for n in (90000, 30, 70000)]
    widths = []
    for name in ("count_few", "count_many"):
        plain = getattr(select, name)
        monkeypatch.setattr(select, name, lambda *a, plain=plain, name=name: widths.append(name) or plain(*a))
    for k in (3, 80000, 160000, 160029):
        check(tensors, k)
    # One walk tells, and with float32 a second where equal keys are shared out among chunks.
    assert len(widths) <= 4 * 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_that_misleads_costs_a_walk_and_no_more(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100_000).to(device)
    k = 60_000
    key = int(select._keys(x).sort().values[k - 1])
    for bracket in (
        (0, 5),
        (key + 1, key + 9),
        (key - 40, key),
        (key - 1000, key + 70_000),
        (key, key + 1),
        (0, 1 << 31),
        *((key - (1 << 18) + off, key) for off in (1, 2, 3)),
    ):
        monkeypatch.setattr(select, "_bracket", lambda *_, bracket=bracket: bracket)
        check([x], k)


@pytest.mark.parametrize("device", DEVICES)
def test_sampled_keys_are_the_tensors(device: str) -> None:
    x = torch.arange(1, 70001, device=device, dtype=torch.float32)
    found = select.sample(select.chunks([x]))
    assert found.shape[0] == 2 and bool((found[0] > 0).all())
    keys = set(select._keys(x).tolist())
    seen = found[found >= 0].tolist()
    assert len(set(seen)) == len(seen) and set(seen) <= keys
    # What lies past the end is no element.
    assert int((found[1] < 0).sum()) > 0.9 * found.shape[1]


def test_what_the_kernels_cannot_read_is_refused() -> None:
    x = torch.randn(8, 8)
    for tensors, alive, why in (
        ([], None, "there are no tensors"),
        ([x.double()], None, "tensor 0 is torch.float64"),
        ([x, x.half()], None, "tensor 1 is torch.float16 on cpu, the first torch.float32"),
        ([x, x.T], None, "tensor 1 is not contiguous in memory"),
        ([x.view(-1)[1:]], None, "tensor 0 is not contiguous in memory, from a multiple of 16 bytes on"),
        ([x], [torch.zeros(7, dtype=torch.uint8)], r"mask 0 is torch.uint8 \[7\], not uint8 \[8\]"),
        ([x], [torch.zeros(16, dtype=torch.uint8)[::2]], "mask 0 is not contiguous on cpu"),
    ):
        with pytest.raises(ValueError, match=why):
            select.chunks(tensors, alive)
    with pytest.raises(ValueError, match="cannot take -1 of 64 elements"):
        select.keep_all_but(select.chunks([x]), -1)
