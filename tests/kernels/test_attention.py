"""fxprune::attention against plain torch in float64: sizes, strides, parts, groups of heads, masks, nan and inf."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.errors import InputError
from fxprune.kernels import native
from fxprune.kernels.native.attention import attention as op
from fxprune.kernels.native.attention import attention_reference

needs_kernel = pytest.mark.skipif(not native.status().available, reason="needs a C++ compiler")


def heads(n: int, count: int, tokens: int, size: int, form: str, generator: torch.Generator) -> Tensor:
    """Random [n, count, tokens, size] as projections leave it, as a cache keeps it, or with channels far apart."""
    if form == "tokens first":
        return torch.randn(n, tokens, count, size, generator=generator).transpose(1, 2)
    if form == "channels apart":
        return torch.randn(n, count, size, tokens, generator=generator).transpose(2, 3)
    return torch.randn(n, count, tokens, size, generator=generator)


def wanted(query: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor | None, scale: float) -> Tensor:
    """The same in float64, op by op."""
    k, v = torch.cat(keys, 2).double(), torch.cat(values, 2).double()
    group = query.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = scale * query.double() @ k.transpose(2, 3)
    if mask is not None:
        scores = scores + mask.double()
    shares = torch.nan_to_num(scores.softmax(3), nan=0.0)
    return (shares @ v).transpose(1, 2)


def agrees(y: Tensor, exact: Tensor, values: list[Tensor]) -> None:
    """Within what sums in float32 and the kernel's exponential lose of the greatest value."""
    assert y.shape == exact.shape and y.dtype == torch.float32 and y.is_contiguous()
    most = max((float(v.abs().max()) for v in values if v.numel()), default=0.0)
    assert float((y.double() - exact).abs().max()) <= 2e-6 * max(1.0, most) if y.numel() else True


@needs_kernel
@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 3),
    kv_heads=st.integers(1, 4),
    group=st.sampled_from([1, 1, 2, 3, 5]),
    queries=st.integers(1, 5),
    tokens=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 40]), min_size=1, max_size=3),
    size=st.sampled_from([1, 7, 16, 24, 64, 80, 130]),
    v_size=st.sampled_from([1, 5, 16, 33, 64, 96, 128, 131]),
    forms=st.tuples(*[st.sampled_from(["plain", "tokens first", "channels apart"])] * 3),
    mask=st.sampled_from(["", "full", "row", "hides"]),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_random(
    n: int, kv_heads: int, group: int, queries: int, tokens: list[int], size: int, v_size: int,
    forms: tuple[str, str, str], mask: str, threads: int, seed: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    query = heads(n, kv_heads * group, queries, size, forms[0], g)
    keys = [heads(n, kv_heads, each, size, forms[1], g) for each in tokens]
    values = [heads(n, kv_heads, each, v_size, forms[2], g) for each in tokens]
    added = None
    if mask:
        shape = (1, 1, queries, sum(tokens)) if mask == "row" else (n, kv_heads * group, queries, sum(tokens))
        added = torch.randn(shape, generator=g)
    if mask == "hides" and added is not None:
        added[torch.rand(added.shape, generator=g) < 0.5] = -math.inf
        added[:, :, 0] = -math.inf  # the first query sees nothing
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = op(query, keys, values, added, 1 / math.sqrt(size))
    finally:
        torch.set_num_threads(before)
    agrees(y, wanted(query, keys, values, added, 1 / math.sqrt(size)), values)


def test_reference_is_the_definition() -> None:
    g = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 6, 3, 8, generator=g), [torch.randn(2, 3, t, 8, generator=g) for t in (5, 1)]
    values = [torch.randn(2, 3, t, 4, generator=g) for t in (5, 1)]
    mask = torch.randn(2, 1, 1, 6, generator=g)
    agrees(attention_reference(query, keys, values, mask, 0.3), wanted(query, keys, values, mask, 0.3), values)


@needs_kernel
def test_many_threads_share_the_heads() -> None:
    g = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 12, 1, 64, generator=g), [torch.randn(2, 12, t, 64, generator=g) for t in (500, 1)]
    values = [torch.randn(2, 12, t, 64, generator=g) for t in (500, 1)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(op(query, keys, values, None, 0.125))
    finally:
        torch.set_num_threads(before)
    agrees(found[0], wanted(query, keys, values, None, 0.125), values)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "keys", "values", "mask"])
def test_nan_and_inf_come_out_as_in_torch(where: str, bad: float) -> None:
    g = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {
        "query": torch.randn(1, 2, 1, 16, generator=g), "keys": torch.randn(1, 2, 9, 16, generator=g),
        "values": torch.randn(1, 2, 9, 16, generator=g), "mask": torch.zeros(1, 2, 1, 9),
    }  # fmt: skip
    given[where][0, 0, 0, 3] = bad
    query, keys, values, mask = given.values()
    y = op(query, [keys], [values], mask, 0.25).transpose(1, 2)
    exact = F.scaled_dot_product_attention(query, keys, values, mask, scale=0.25)
    assert torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isposinf(), exact.isposinf())
    finite = exact.isfinite()
    torch.testing.assert_close(y[finite], exact[finite], rtol=1e-5, atol=1e-6)


@needs_kernel
def test_empty() -> None:
    none = op(torch.zeros(0, 2, 1, 8), [torch.zeros(0, 2, 3, 8)], [torch.zeros(0, 2, 3, 8)], None, 1.0)
    assert none.shape == (0, 1, 2, 8)
    no_keys = op(torch.ones(1, 2, 1, 8), [torch.zeros(1, 2, 0, 8)], [torch.zeros(1, 2, 0, 4)], None, 1.0)
    assert torch.equal(no_keys, torch.zeros(1, 1, 2, 4))


@needs_kernel
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"keys": []}, "as many keys as values"),
        ({"query": torch.zeros(1, 3, 1, 8)}, "multiple of the keys'"),
        ({"query": torch.zeros(1, 2, 1, 7)}, "other sizes than the query"),
        ({"values": [torch.zeros(1, 2, 4, 8)]}, "other sizes than keys"),
        ({"query": torch.zeros(1, 2, 1, 8, dtype=torch.float64)}, "query must be float32"),
        ({"mask": torch.zeros(1, 2, 1, 4)}, "mask has other sizes"),
        ({"mask": torch.zeros(3)}, "mask must be float32 in four dimensions"),
    ],
)
def test_refuses(change: dict[str, Any], why: str) -> None:
    given: dict[str, Any] = {
        "query": torch.zeros(1, 2, 1, 8), "keys": [torch.zeros(1, 2, 5, 8)],
        "values": [torch.zeros(1, 2, 5, 8)], "mask": None,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=why):
        op(*{**given, **change}.values(), 1.0)


def test_reference_refuses() -> None:
    with pytest.raises(InputError, match="keys without values"):
        attention_reference(torch.zeros(1, 2, 1, 8), [], [], None, 1.0)
    with pytest.raises(InputError, match="heads that do not fit"):
        attention_reference(torch.zeros(1, 3, 1, 8), [torch.zeros(1, 2, 5, 8)], [torch.zeros(1, 2, 5, 8)], None, 1.0)
