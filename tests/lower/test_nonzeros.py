"""The nonzeros layout and its op: exact storage, right products at every size, and refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.kernels import native
from fxprune.lower.layouts.nonzeros import Nonzeros
from fxprune.lower.layouts.site import Packed, Site

layout = Nonzeros()
ACTIVATIONS = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
TOKENS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 512)


def weight(o: int, i: int, sparsity: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(o, i, generator=generator)
    return torch.where(torch.rand(o, i, generator=generator) < sparsity, torch.zeros(()), dense)


def site(w: Tensor, tokens: tuple[int, ...] = (128,), activation: str = "") -> Site:
    return Site("fc.weight", "linear", w, None, tokens, activation)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32)


def assert_close(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None, activation: str = "") -> None:
    """|y - exact| within what fp32 sums of this length may lose, in the worst order of summation."""
    with torch.no_grad():
        exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
        size = F.linear(x.double().abs(), w.double().abs(), None if bias is None else bias.double().abs())
        exact = ACTIVATIONS[activation](exact)
        terms = int((w != 0).sum(1).max()) + 4
        # No activation here has a slope above 1.13; they add 1e-6 of their own.
        bound = 1.13 * torch.finfo(torch.float32).eps * terms * size + (1e-6 if activation else 1e-30)
        assert y.shape == exact.shape and y.is_contiguous()
        assert bool(((y - exact).abs() <= bound).all()), float(((y - exact).abs() - bound).max())


@settings(max_examples=60, deadline=None)
@given(
    o=st.integers(1, 600),
    i=st.integers(1, 400),
    sparsity=st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]),
    tokens=st.sampled_from([(), (1,), (8,), (16,), (32,), (128,), (1, 512)]),
    seed=st.integers(0, 1000),
)
def test_unpack_gives_back_every_bit(o: int, i: int, sparsity: float, tokens: tuple[int, ...], seed: int) -> None:
    w = weight(o, i, sparsity, seed)
    w.view(-1)[::7] *= -0.0  # kept elements that are -0.0 and 0.0
    packed = layout.pack(site(w, tokens))
    assert packed.layout == "nonzeros" and packed.shape == (o, i)
    assert packed.tensors["values"].numel() == int((bits(w) != 0).sum())
    assert torch.equal(bits(layout.unpack(packed)), bits(w))
    counts = packed.tensors["counts"]
    assert int(counts.sum()) == packed.tensors["blocks"][-1] and bool((counts >= 0).all())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("tuned", [1, 8, 128])
def test_product_at_every_number_of_tokens(tokens: int, tuned: int) -> None:
    for (o, i), sparsity in itertools.product(((67, 131), (300, 513)), (0.5, 0.9)):
        w = weight(o, i, sparsity)
        packed = layout.pack(site(w, (tuned,)))
        x, bias = torch.randn(tokens, i), torch.randn(o)
        assert_close(layout.call(x, packed), x, w)
        assert_close(layout.call(x, packed, bias), x, w, bias)
        assert_close(layout.call(x, packed, bias, "relu"), x, w, bias, "relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
def test_activations_follow_the_bias(activation: str, tokens: int) -> None:
    w, x, bias = weight(77, 90, 0.8), 3 * torch.randn(tokens, 90), torch.randn(77)
    packed = layout.pack(site(w))
    assert_close(layout.call(x, packed, bias, activation), x, w, bias, activation)
    assert_close(layout.call(x, packed, None, activation), x, w, None, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_activation_itself_is_accurate(activation: str, tokens: int) -> None:
    # An all-zero weight leaves activation(bias): every value of a fine grid, and what is not finite.
    values = torch.cat([torch.linspace(-20, 20, 20001), torch.linspace(-200, 200, 400), torch.zeros(1)])
    packed = layout.pack(site(torch.zeros(len(values), 3)))
    y = layout.call(torch.randn(tokens, 3), packed, values, activation)
    exact = ACTIVATIONS[activation](values.double()).expand(tokens, -1)
    assert bool(((y - exact).abs() <= 1e-6 * exact.abs().clamp(min=1)).all()), float((y - exact).abs().max())

    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    packed = layout.pack(site(torch.zeros(3, 3)))
    y = layout.call(torch.randn(tokens, 3), packed, special, activation)
    # torch's vectorised gelu(inf) is nan on some CPUs; the formula says inf.
    expected = {"relu": [torch.inf, 0.0], "": [torch.inf, -torch.inf]}.get(activation, [torch.inf, torch.nan])
    torch.testing.assert_close(y, torch.tensor([*expected, torch.nan]).expand(tokens, -1), equal_nan=True)


def test_inf_and_nan_in_x_reach_only_what_reads_them() -> None:
    w = weight(40, 50, 0.9)
    packed = layout.pack(site(w))
    for tokens in (1, 8, 70):
        x = torch.randn(tokens, 50)
        x[0, 3] = torch.nan
        y = layout.call(x, packed)
        assert torch.equal(y[0].isnan(), w[:, 3] != 0) and bool(y[1:].isfinite().all())


@pytest.mark.parametrize(
    "w",
    [
        pytest.param(torch.zeros(33, 20), id="zero"),
        pytest.param(torch.zeros(1, 1), id="zero-1x1"),
        pytest.param(torch.ones(1, 1), id="1x1"),
        pytest.param(weight(5, 1, 0.0), id="i=1"),
        pytest.param(weight(1, 300, 0.5), id="o=1"),
        pytest.param(weight(64, 64, 0.0), id="dense"),
    ],
)
def test_odd_weights(w: Tensor) -> None:
    bias = torch.randn(len(w))
    for tuned, tokens in itertools.product((1, 128), (1, 2, 8, 65)):
        x = torch.randn(tokens, w.shape[1])
        assert_close(layout.call(x, layout.pack(site(w, (tuned,))), bias), x, w, bias)


def test_more_columns_than_16_bits() -> None:
    w = weight(9, 70001, 0.95)
    for tuned, tokens in ((1, 1), (1, 9), (128, 1), (128, 70)):
        packed, x = layout.pack(site(w, (tuned,))), torch.randn(tokens, 70001)
        assert torch.equal(layout.unpack(packed), w)
        assert_close(layout.call(x, packed), x, w)


def test_leading_dimensions_and_strides() -> None:
    w, bias = weight(50, 40, 0.8), torch.randn(50)
    packed = layout.pack(site(w))
    base = torch.randn(3, 40, 7)
    for x in (
        base.transpose(1, 2), torch.randn(40), torch.randn(2, 3, 4, 40), torch.randn(9, 80)[:, ::2],
        torch.randn(0, 5, 40), torch.randn(40).expand(6, 40),
    ):  # fmt: skip
        y = layout.call(x, packed, bias, "gelu")
        assert_close(y, x, w, bias, "gelu")


def test_rows_of_very_different_length() -> None:
    w = weight(520, 300, 0.9)
    w[::3] = 0
    w[5] = torch.randn(300)
    x = torch.randn(66, 300)
    for tuned in (1, 8, 128):
        assert_close(layout.call(x, layout.pack(site(w, (tuned,)))), x, w)


@pytest.mark.parametrize("tokens", [1, 64, 200])
def test_threads_do_not_change_a_bit(tokens: int) -> None:
    w, x = weight(1100, 384, 0.8), torch.randn(tokens, 384)
    packed, before = layout.pack(site(w)), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(layout.call(x, packed, None, "silu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_nothing_left_from_an_earlier_call_is_read() -> None:
    # The kernel keeps its scratch memory between calls; fill it with nan first.
    big = layout.pack(site(weight(600, 200, 0.5)))
    for tokens in (1, 3, 8, 20, 64, 70):
        layout.call(torch.full((70, 200), torch.nan), big)
        w, x = weight(45, 61, 0.9), torch.randn(tokens, 61)
        w[7] = 0
        assert_close(layout.call(x, layout.pack(site(w))), x, w)


def test_op_under_fake_tensors_export_and_opcheck() -> None:
    w, bias = weight(24, 16, 0.7), torch.randn(24)
    packed = layout.pack(site(w))
    tensors = [packed.tensors[name] for name in layout.arguments(packed)]
    torch.library.opcheck(layout.op, (torch.randn(3, 16), *tensors, bias, 24, "relu"))
    torch.library.opcheck(layout.split_op, (torch.randn(3, 16), *tensors, None, (5, 19), "relu"))

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in packed.tensors.items():
                self.register_buffer(name, tensor)

        def forward(self, x: Tensor) -> Tensor:
            buffers = [getattr(self, name) for name in layout.arguments(packed)]
            first, second = layout.split_op(x, *buffers, bias, [7, 17], "gelu")
            return torch.cat([layout.op(x, *buffers, bias, 24, "gelu"), first, second], -1)

    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Linear(), (torch.randn(3, 16),), dynamic_shapes=dynamic)
    x = torch.randn(11, 16)
    whole, parts = program.module()(x).split(24, -1)
    assert_close(whole.contiguous(), x, w, bias, "gelu")
    assert torch.equal(whole, parts)


@pytest.mark.slow
def test_op_under_compile_with_dynamic_sizes() -> None:
    w, bias = weight(48, 32, 0.7), torch.randn(48)
    packed = layout.pack(site(w))

    def function(x: Tensor) -> Tensor:
        return layout.call(x * 2, packed, bias, "silu") + 1

    compiled = torch.compile(function, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in (5, 1, 64, 9):
            x = torch.randn(2, tokens, 32)
            torch.testing.assert_close(compiled(x), function(x))


def split(
    x: Tensor, packed: Packed, sizes: tuple[int, ...], bias: Tensor | None = None, activation: str = ""
) -> list[Tensor]:
    """The split op on a packed weight."""
    tensors = (packed.tensors[name] for name in layout.arguments(packed))
    return layout.split_op(x, *tensors, bias, sizes, activation)


PARTS = ((3, 130, 67), (1,) * 200, (0, 199, 0, 1), (96, 104))


@pytest.mark.parametrize("sizes", PARTS, ids=lambda sizes: f"{len(sizes)}parts")
@pytest.mark.parametrize("tokens", [0, 1, 7, 31, 64, 65, 128])
def test_parts_equal_separate_linears(sizes: tuple[int, ...], tokens: int) -> None:
    # At 200 rows a row block has 104 of them, so that most of these parts begin or end inside one.
    x, bias, before = torch.randn(2, tokens, 90), torch.randn(200), torch.get_num_threads()
    for sparsity, tuned in ((0.3, 1), (0.9, 128)):
        w = weight(200, 90, sparsity)
        packed = layout.pack(site(w, (tuned,)))
        for b, activation in ((None, ""), (bias, ""), (bias, "gelu"), (None, "relu")):
            try:
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    parts = split(x, packed, sizes, b, activation)
                    whole = layout.call(x, packed, b, activation)
                    assert [p.shape for p in parts] == [(2, tokens, size) for size in sizes]
                    assert all(torch.equal(p, q) for p, q in zip(parts, whole.split(sizes, -1), strict=True))
            finally:
                torch.set_num_threads(before)
            pieces = [None] * len(sizes) if b is None else b.split(sizes)
            for part, rows, piece in zip(parts, w.split(sizes), pieces, strict=True):
                if len(rows):
                    assert_close(part, x, rows, piece, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parts_with_every_activation(activation: str) -> None:
    w, x, bias = weight(90, 70, 0.8), 3 * torch.randn(33, 70), torch.randn(90)
    parts = split(x, layout.pack(site(w)), (41, 49), bias, activation)
    for part, rows, piece in zip(parts, w.split((41, 49)), bias.split((41, 49)), strict=True):
        assert_close(part, x, rows, piece, activation)


def test_parts_of_many_rows() -> None:
    # More row blocks than keep their sums in the cache at once, so that a part is written in several goes.
    w, x = weight(3001, 40, 0.9), torch.randn(65, 40)
    sizes = (1500, 1, 1500)
    for part, rows in zip(split(x, layout.pack(site(w)), sizes), w.split(sizes), strict=True):
        assert_close(part, x, rows)


def test_parts_are_fresh_tensors() -> None:
    w, x = weight(30, 20, 0.5), torch.randn(9, 20)
    packed = layout.pack(site(w))
    once, again = split(x, packed, (10, 20)), split(x, packed, (10, 20))
    storages = {part.untyped_storage().data_ptr() for part in (*once, *again)}
    assert len(storages) == 4
    once[0].fill_(torch.nan)
    assert_close(once[1], x, w[10:])
    assert_close(again[0], x, w[:10])


def test_parts_under_compile_with_dynamic_sizes() -> None:
    w, bias = weight(48, 32, 0.7), torch.randn(48)
    packed = layout.pack(site(w))

    def function(x: Tensor) -> Tensor:
        q, k, v = split(x * 2, packed, (16, 16, 16), bias, "silu")
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v + 1

    compiled = torch.compile(function, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in (5, 1, 64, 9):
            x = torch.randn(2, tokens, 32)
            torch.testing.assert_close(compiled(x), function(x))


def changed(packed: Packed, **tensors: Tensor) -> Packed:
    return Packed(packed.layout, packed.shape, {**packed.tensors, **tensors})


def test_wrong_arguments_are_refused() -> None:
    w = weight(20, 30, 0.5)
    packed, x = layout.pack(site(w)), torch.randn(4, 30)
    t = packed.tensors
    calls = [
        lambda: layout.call(torch.randn(4, 31), packed),
        lambda: layout.call(torch.randn(()), packed),
        lambda: layout.call(x.double(), packed),
        lambda: layout.call(x.bfloat16(), packed),
        lambda: layout.call(x, packed, torch.randn(21)),
        lambda: layout.call(x, packed, torch.randn(20).double()),
        lambda: layout.op(x, *t.values(), None, 20, torch.randn(80)),
        lambda: layout.call(x, packed, None, "tanh"),
        lambda: layout.call(x, Packed("nonzeros", (21, 30), t)),
        lambda: layout.call(x, changed(packed, blocks=t["blocks"][:3])),
        lambda: layout.call(x, changed(packed, blocks=t["blocks"] + torch.tensor([1, 0, 0, 0, 0, 0]))),
        lambda: split(x, packed, (10, 9)),
        lambda: split(x, packed, (10, 11)),
        lambda: split(x, packed, (-1, 21)),
        lambda: split(x, packed, (21, -1)),
        lambda: split(x, packed, ()),
        lambda: split(torch.randn(4, 31), packed, (10, 10)),
        lambda: split(x, packed, (10, 10), torch.randn(10)),
    ]
    if native.status().available:
        calls += [
            lambda: layout.call(x, changed(packed, values=t["values"][:-1])),
            lambda: layout.call(x, changed(packed, columns=t["columns"].int())),
            lambda: layout.call(x, changed(packed, order=t["order"][1:])),
            lambda: layout.call(x, changed(packed, counts=t["counts"].repeat(2))),
            lambda: layout.call(x, changed(packed, blocks=t["blocks"][:-1])),
            lambda: layout.call(x, changed(packed, blocks=t["blocks"][:4])),
            lambda: layout.call(x, changed(packed, blocks=t["blocks"].int())),
            lambda: layout.call(x, changed(packed, blocks=-t["blocks"])),
            lambda: layout.call(x, changed(packed, blocks=torch.tensor([20, 30, 0, 32, *t["blocks"][4:].tolist()]))),
            lambda: layout.call(x, changed(packed, blocks=torch.tensor([20, 30, 20, 32, 0, -1]))),
        ]
    for call in calls:
        with pytest.raises((RuntimeError, ValueError)):
            call()


def test_fits_says_why_not() -> None:
    assert layout.fits(site(weight(4, 4, 0.5))).ok
    for w, word in (
        (torch.ones(4, 4, dtype=torch.float64), "float64"),
        (torch.ones(4, 4, 1), "3 dimensions"),
        (torch.ones(4, 4, device="meta"), "meta"),
        (torch.ones(0, 4), "empty"),
    ):
        fit = layout.fits(site(w))
        assert not fit.ok and word in fit.why
    assert not layout.fits(site(weight(4, 4, 0.5), (1,), "tanh")).ok


def test_prediction_grows_with_the_work() -> None:
    dense, sparse = site(weight(256, 256, 0.5)), site(weight(256, 256, 0.9))
    for tokens in (1, 8, 128):
        assert 0 < layout.predict(sparse, tokens) < layout.predict(dense, tokens)
    assert layout.predict(dense, 8) < layout.predict(dense, 128)
