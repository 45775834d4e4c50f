"""The bitmap layout on the CPU and its ops: exact storage, right products at every size and dtype, and refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune import Plan, Rule, Unstructured
from fxprune.kernels import native
from fxprune.kernels.native import bitmap
from fxprune.lower.layouts import LAYOUTS
from fxprune.lower.layouts.bitmap import Bitmap, CpuBitmap
from fxprune.lower.layouts.site import Packed, Site
from tests.kernels.kernel_case import FLOATS, assert_sums, same_bits, sparse

layout = CpuBitmap()
ACTIVATIONS = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def site(w: Tensor, tokens: tuple[int, ...] = (1,), activation: str = "") -> Site:
    return Site("fc.weight", "linear", w, None, tokens, activation)


def assert_product(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """y = x @ w.T + bias, but for what sums in float32 and the results' dtype lose."""
    given, exact = bias is not None, (None if bias is None else bias.double())
    wanted = F.linear(x.double(), w.double(), exact)
    scale = F.linear(x.double().abs(), w.double().abs(), exact.abs() if exact is not None else None)
    assert y.dtype == x.dtype and y.shape == wanted.shape and y.is_contiguous()
    assert_sums(y, wanted, scale, int((w != 0).sum(1).max()) + given)


@settings(max_examples=60, deadline=None)
@given(
    o=st.integers(1, 300),
    i=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
)
def test_unpack_gives_back_every_bit(o: int, i: int, density: float, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    w = sparse(o, i, density, dtype, "cpu")
    w.view(-1)[::7] *= -0.0  # kept elements that are -0.0, and zeros
    w.view(-1)[3::11] = torch.nan
    if dtype is torch.float32:
        w.view(torch.int32).view(-1)[5::13] = 0x7F800123  # a nan that says more than nan
    packed = layout.pack(site(w))
    assert packed.layout == "bitmap" and packed.shape == (o, i) and tuple(packed.tensors) == layout.tensors
    assert same_bits(layout.unpack(packed), w)
    counted = int((w.view(torch.int32 if dtype is torch.float32 else torch.int16) != 0).sum())
    assert packed.tensors["rows"][-1] == counted == len(packed.tensors["values"]) - bitmap.WORD


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_float32_weight_of_16_bits_is_stored_so_without_loss(stored: torch.dtype) -> None:
    torch.manual_seed(0)
    w = sparse(70, 90, 0.5, torch.float32, "cpu").to(stored).float()
    w[3, 4], w[5, 6], w[7, 8] = -0.0, torch.inf, 2.0**-14
    packed = layout.pack(site(w))
    assert packed.tensors["values"].dtype == stored and packed.bytes() < 1.1 * layout.bytes_of(w)
    assert same_bits(layout.unpack(packed), w)
    w[1, 2] = 1.0 + 2.0**-23  # needs all bits
    for each in (w, w.masked_fill(w == torch.inf, 1e-30)):
        packed = layout.pack(site(each))
        assert packed.tensors["values"].dtype == torch.float32 and same_bits(layout.unpack(packed), each)


def test_a_float32_model_of_16_bits_is_right_and_small() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.GELU(), nn.Linear(200, 100)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * (torch.rand_like(p) < 0.5)).bfloat16().float())
    options: dict[str, Any] = {"layout": "bitmap", "compile": False, "measure": False}
    fast = fxprune.transform(model, None, (torch.randn(1, 300),), options=options, progress=False)
    values = [value for name, value in fast.state_dict().items() if name.endswith("values")]
    assert [value.dtype for value in values] == [torch.bfloat16] * 2
    x = torch.randn(3, 300)
    torch.testing.assert_close(fast(x), model(x))


def test_a_float32_weight_is_rounded_and_stored_in_16_bits_where_that_is_asked_for() -> None:
    torch.manual_seed(0)
    model = nn.Linear(300, 200).eval()
    torch.nn.utils.prune.random_unstructured(model, "weight", 0.5)
    options: dict[str, Any] = {"layout": "bitmap", "compile": False, "measure": False, "dtype": "bfloat16"}
    fast = fxprune.transform(model, None, (torch.randn(1, 300),), options=options, progress=False)
    (values,) = [value for name, value in fast.state_dict().items() if name.endswith("values")]
    x = torch.randn(3, 300)
    assert values.dtype == torch.bfloat16
    wanted = F.linear(x, model.weight.bfloat16().float(), model.bias)
    torch.testing.assert_close(fast(x), wanted)


def test_rows_packed_in_several_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    w = sparse(50, 70, 0.5, torch.float32, "cpu")
    whole = bitmap.pack(w)
    monkeypatch.setattr(bitmap, "_ELEMENTS", 7 * 70)
    assert all(torch.equal(a, b) for a, b in zip(bitmap.pack(w), whole, strict=True))
    assert same_bits(bitmap.unpack(whole), w)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [*range(18), 31, 33, 64, 100])
def test_product_at_every_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    for (o, i), density in itertools.product(((1, 1), (3, 31), (67, 131), (130, 64), (200, 513)), (0.1, 0.6)):
        w = sparse(o, i, density, dtype, "cpu")
        packed = layout.pack(site(w))
        x, bias = torch.randn(tokens, i).to(dtype), torch.randn(o).to(dtype)
        assert_product(layout.call(x, packed), x, w)
        assert_product(layout.call(x, packed, bias), x, w, bias)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_values_of_fewer_bits_than_x(tokens: int, stored: torch.dtype) -> None:
    w, x, bias = sparse(70, 90, 0.5, stored, "cpu"), torch.randn(tokens, 90), torch.randn(70)
    assert_product(layout.call(x, layout.pack(site(w)), bias), x, w.float(), bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_activations_follow_the_bias(activation: str, tokens: int, dtype: torch.dtype) -> None:
    w, bias = sparse(77, 90, 0.4, dtype, "cpu"), torch.randn(77).to(dtype)
    x = (3 * torch.randn(tokens, 90)).to(dtype)
    for b in (bias, None):
        y = layout.call(x, layout.pack(site(w)), b, activation)
        wanted = ACTIVATIONS[activation](F.linear(x.double(), w.double(), None if b is None else b.double()))
        torch.testing.assert_close(y, wanted.to(dtype), atol=3e-5, rtol=2 * torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_number_comes_out_as_it_is_rounded_by_torch(dtype: torch.dtype) -> None:
    # An all-zero weight leaves the bias; all numbers of 16 bits, among them nan, inf and subnormals, come back.
    bias = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(dtype)
    packed = layout.pack(site(torch.zeros(len(bias), 3, dtype=dtype)))
    y = layout.call(torch.ones(1, 3, dtype=dtype), packed, bias)[0]
    torch.testing.assert_close(y, bias, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_round_to_the_nearest_and_ties_to_even(dtype: torch.dtype) -> None:
    # 1 + k / 512 has more bits than the dtypes have; some of them are ties in bfloat16, and with 2048ths in float16.
    terms = torch.tensor([[1.0, k / 512, k / 4096] for k in range(40)]).to(dtype)
    sums = terms.float().sum(1)
    y = layout.call(torch.ones(1, 3, dtype=dtype), layout.pack(site(terms)))[0]
    assert torch.equal(y, sums.to(dtype))


def test_zeros_of_the_weight_are_multiplied_as_dense_arithmetic_does() -> None:
    w = sparse(40, 50, 0.3, torch.float32, "cpu")
    for tokens, value in itertools.product((1, 2, 5, 16), (torch.inf, torch.nan)):
        x = torch.randn(tokens, 50)
        x[0, 3] = value
        y = layout.call(x, layout.pack(site(w)))
        assert torch.equal(y.isnan(), F.linear(x, w).isnan()) and bool(y[1:].isfinite().all())


def test_leading_dimensions_and_strides() -> None:
    w, bias = sparse(50, 40, 0.4, torch.float32, "cpu"), torch.randn(50)
    packed = layout.pack(site(w))
    base = torch.randn(3, 40, 7)
    for x in (
        base.transpose(1, 2), torch.randn(40), torch.randn(2, 3, 4, 40), torch.randn(9, 80)[:, ::2],
        torch.randn(0, 5, 40), torch.randn(40).expand(6, 40),
    ):  # fmt: skip
        assert_product(layout.call(x, packed, bias), x, w, bias)


@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_threads_do_not_change_a_bit(tokens: int) -> None:
    # Rows of very different length, which the threads share by their bytes.
    w, x, before = sparse(700, 384, 0.5, torch.float32, "cpu"), torch.randn(tokens, 384), torch.get_num_threads()
    w[100:600] = 0.0
    packed = layout.pack(site(w))
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(layout.call(x, packed, None, "silu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    torch.testing.assert_close(results[0], F.silu(F.linear(x, w)), atol=1e-4, rtol=1e-4)


def test_nothing_left_from_an_earlier_call_is_read() -> None:
    # The kernel keeps its scratch memory between calls; fill it with nan first.
    big = layout.pack(site(sparse(200, 600, 0.5, torch.float32, "cpu")))
    for tokens in (1, 3, 5, 9, 16, 20):
        layout.call(torch.full((20, 600), torch.nan), big)
        w, x = sparse(45, 61, 0.2, torch.float32, "cpu"), torch.randn(tokens, 61)
        assert_product(layout.call(x, layout.pack(site(w))), x, w)


def split(
    x: Tensor, packed: Packed, sizes: tuple[int, ...], bias: Tensor | None = None, activation: str = ""
) -> list[Tensor]:
    """The split op on a packed weight."""
    return layout.split_op(x, *packed.tensors.values(), bias, sizes, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 130, 67), (1,) * 200, (0, 199, 0, 1), (96, 104)], ids=lambda s: f"{len(s)}parts")
@pytest.mark.parametrize("tokens", [0, 1, 7, 20])
def test_parts_equal_the_whole(sizes: tuple[int, ...], tokens: int, dtype: torch.dtype) -> None:
    x, bias, before = torch.randn(2, tokens, 90).to(dtype), torch.randn(200).to(dtype), torch.get_num_threads()
    packed = layout.pack(site(sparse(200, 90, 0.5, dtype, "cpu")))
    for (b, activation), threads in itertools.product(((None, ""), (bias, "gelu")), (1, 2)):
        try:
            torch.set_num_threads(threads)
            parts, whole = split(x, packed, sizes, b, activation), layout.call(x, packed, b, activation)
        finally:
            torch.set_num_threads(before)
        assert [p.shape for p in parts] == [(2, tokens, size) for size in sizes]
        assert all(torch.equal(p, q) and p.is_contiguous() for p, q in zip(parts, whole.split(sizes, -1), strict=True))
        assert len({part.untyped_storage().data_ptr() for part in parts if part.numel()} | {0}) == 1 + sum(
            part.numel() > 0 for part in parts
        )


def test_ops_under_fake_tensors() -> None:
    w, bias = sparse(24, 40, 0.4, torch.float32, "cpu"), torch.randn(24)
    tensors = tuple(layout.pack(site(w)).tensors.values())
    torch.library.opcheck(layout.op, (torch.randn(3, 40), *tensors, bias, 24, "relu"))
    torch.library.opcheck(layout.split_op, (torch.randn(3, 40), *tensors, None, (5, 19), "relu"))


@pytest.mark.slow
def test_ops_under_compile_with_dynamic_sizes() -> None:
    w, bias = sparse(24, 40, 0.4, torch.float32, "cpu"), torch.randn(24)
    tensors = tuple(layout.pack(site(w)).tensors.values())

    def function(x: Tensor) -> Tensor:
        first, second = layout.split_op(x * 2, *tensors, bias, [7, 17], "silu")
        return torch.cat([layout.op(x * 2, *tensors, bias, 24, "silu"), first, second], -1) + 1

    compiled = torch.compile(function, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in (5, 1, 64, 9):
            x = torch.randn(2, tokens, 40)
            torch.testing.assert_close(compiled(x), function(x))


def changed(packed: Packed, **tensors: Tensor) -> Packed:
    return Packed(packed.layout, packed.shape, {**packed.tensors, **tensors})


def test_wrong_arguments_are_refused() -> None:
    packed, x = layout.pack(site(sparse(20, 70, 0.5, torch.float32, "cpu"))), torch.randn(4, 70)
    half = layout.pack(site(sparse(20, 70, 0.5, torch.float16, "cpu")))
    t = packed.tensors
    calls = [
        lambda: layout.call(torch.randn(4, 71), packed),
        lambda: layout.call(torch.randn(()), packed),
        lambda: layout.call(x.double(), packed),
        lambda: layout.call(x.bfloat16(), packed),
        lambda: layout.call(x.bfloat16(), half),
        lambda: layout.call(x, packed, torch.randn(21)),
        lambda: layout.call(x, packed, torch.randn(20).double()),
        lambda: layout.call(x, packed, None, "tanh"),
        lambda: layout.call(x, Packed("bitmap", (21, 70), t)),
        lambda: split(x, packed, (10, 9)),
        lambda: split(x, packed, (10, 11)),
        lambda: split(x, packed, (-1, 21)),
        lambda: split(x, packed, ()),
    ]
    if native.status().available:
        calls += [
            lambda: layout.call(x, changed(packed, values=t["values"][:-1])),
            lambda: layout.call(x, changed(packed, values=t["values"].double())),
            lambda: layout.call(x, changed(packed, bits=t["bits"][:, :-1])),
            lambda: layout.call(x, changed(packed, bits=t["bits"].long())),
            lambda: layout.call(x, changed(packed, rows=t["rows"][:2])),
            lambda: layout.call(x, changed(packed, rows=t["rows"].int())),
            lambda: layout.call(x, changed(packed, rows=-t["rows"])),
            lambda: layout.call(x, changed(packed, rows=torch.cat([t["rows"][:1], t["rows"][1:].flip(0)]))),
        ]
    for call in calls:
        with pytest.raises((RuntimeError, ValueError)):
            call()


def test_fits_says_why_not() -> None:
    both = LAYOUTS["bitmap"]
    assert isinstance(both, Bitmap)
    for dtype in FLOATS:
        assert both.fits(site(torch.ones(4, 4, dtype=dtype))).ok
    assert both.fits(site(torch.ones(4, 4), (16, 4096))).ok
    for w, tokens, why in (
        (torch.ones(4, 4, dtype=torch.float64), (1,), "torch.float64 is not float32, bfloat16 or float16"),
        (torch.ones(4, 4, 1), (1,), "3 dimensions"),
        (torch.ones(4, 4, device="meta"), (1,), "meta"),
        (torch.ones(0, 4), (1,), "empty"),
        (torch.ones(4, 4), (17, 128), "its kernel is for up to 16 tokens"),
    ):
        fit = both.fits(site(w, tokens))
        assert not fit.ok and why in fit.why
    assert not both.fits(site(torch.ones(4, 4), (1,), "tanh")).ok


@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_are_foretold_and_fewer_than_dense_from_few_zeros_on(dtype: torch.dtype) -> None:
    for zeros in (0.1, 0.33, 0.9):
        w = sparse(256, 1024, 1 - zeros, dtype, "cpu")
        packed = layout.pack(site(w))
        assert packed.bytes() == pytest.approx(layout.bytes_of(w), rel=0.01) and packed.bytes() < w.nbytes


def test_prediction_grows_with_the_work() -> None:
    dense, half = site(torch.ones(512, 512)), site(sparse(512, 512, 0.5, torch.float32, "cpu"))
    assert 0 < layout.predict(half, 1) < layout.predict(dense, 1) < layout.predict(dense, 16)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_model_of_each_dtype(dtype: torch.dtype) -> None:
    model, x = Attention().eval().to(dtype), torch.randn(1, 5, 64).to(dtype)
    options: dict[str, Any] = {"layout": "bitmap", "measure": False, "compile": False}
    fast = fxprune.transform(model, Plan([Rule("*.weight", Unstructured(0.5))]), (x,), options=options, progress=False)
    assert {row.layout for row in fast.report.weights} == {"bitmap"}
    # q, k and v read the same activations, so that they are stored together; gelu is computed by the kernel.
    targets = [node.target for node in fast.graph.nodes]
    assert targets.count(layout.split_op) == 1 and targets.count(layout.op) == 2
    assert torch.ops.aten.gelu.default not in targets
    assert {name.rpartition(".")[2] for name in fast.state_dict()} == {"bits", "values", "rows", "bias"}
    plain = fxprune.transform(
        model,
        Plan([Rule("*.weight", Unstructured(0.5))]),
        (x,),
        options={"compile": False, "layout": "dense"},
        progress=False,
    )
    for batch in (1, 3, 9):
        other = torch.randn(batch, 5, 64).to(dtype)
        torch.testing.assert_close(
            fast(other), plain(other), rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps
        )
