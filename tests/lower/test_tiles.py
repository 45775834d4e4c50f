"""The tiles layout and its op: exact storage, right products at every size with and without AMX, and refusals."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.kernels import native
from fxprune.kernels.native import tiles
from fxprune.lower.layouts.dense import best_dense
from fxprune.lower.layouts.site import Packed, Site
from fxprune.lower.layouts.tiles import TilesLayout
from tests.oracle import HALF

ROOT = Path(__file__).resolve().parents[2]
layout = TilesLayout()
ACTIVATIONS = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
# Around what a tile, two of them and a group of tiles hold, and what few tokens are.
TOKENS = (0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 48, 63, 65, 97, 128, 130, 259)
needs_kernel = pytest.mark.skipif(not tiles.isa(), reason="this CPU has neither AMX nor AVX-512 VBMI2")


def weight(o: int, i: int, sparsity: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(o, i, generator=generator).bfloat16()
    return torch.where(torch.rand(o, i, generator=generator) < sparsity, torch.zeros((), dtype=torch.bfloat16), dense)


def halves(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def site(w: Tensor, tokens: tuple[int, ...] = (128,), activation: str = "") -> Site:
    return Site("fc.weight", "linear", w, None, tokens, activation)


def pack(w: Tensor) -> Packed:
    return layout.pack(site(w))


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int16)


def assert_close(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None, activation: str = "") -> None:
    """|y - exact| within what fp32 sums of this length may lose, in the worst order, and one rounding to bf16."""
    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    size = F.linear(x.double().abs(), w.double().abs(), None if bias is None else bias.double().abs())
    exact = ACTIVATIONS[activation](exact)
    terms = int((w != 0).sum(1).max()) + 4
    # No activation here has a slope above 1.13; they add 1e-6 of their own.
    lost = 1.13 * torch.finfo(torch.float32).eps * terms * size + (1e-6 if activation else 1e-30)
    bound = lost + 2**-8 * (exact.abs() + lost)
    assert y.shape == exact.shape and y.is_contiguous() and y.dtype == torch.bfloat16
    assert bool(((y - exact).abs() <= bound).all()), float(((y - exact).abs() - bound).max())


@settings(max_examples=60, deadline=None)
@given(
    o=st.integers(1, 100),
    i=st.integers(1, 200),
    sparsity=st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
    seed=st.integers(0, 1000),
)
def test_unpack_gives_back_every_bit(o: int, i: int, sparsity: float, seed: int) -> None:
    w = weight(o, i, sparsity, seed)
    w.view(-1)[::7] *= -0.0  # kept elements that are -0.0 and 0.0
    w.view(-1)[::11] = torch.nan
    packed = pack(w)
    assert packed.layout == "tiles" and packed.shape == (o, i)
    assert packed.tensors["values"].numel() == int((bits(w) != 0).sum()) + tiles.SPARE
    assert torch.equal(bits(layout.unpack(packed)), bits(w))


def test_what_is_stored_is_what_was_foretold() -> None:
    w = weight(384, 512, 0.7)
    packed = pack(w)
    assert packed.bytes() == pytest.approx(layout.bytes_of(w), rel=0.01) and packed.bytes() < 0.4 * w.nbytes
    w[:, 64:] = 0
    assert pack(w).tensors["columns"].tolist() == [0, 1] * 12  # Blocks without a nonzero are left out.


@pytest.mark.parametrize("tokens", TOKENS)
def test_product_at_every_number_of_tokens(tokens: int) -> None:
    for (o, i), sparsity in itertools.product(((67, 131), (300, 512), (33, 31)), (0.5, 0.9)):
        w = weight(o, i, sparsity)
        packed, x, bias = pack(w), halves(tokens, i), halves(o)
        assert_close(layout.call(x, packed), x, w)
        assert_close(layout.call(x, packed, bias, "relu"), x, w, bias, "relu")


@pytest.mark.parametrize("tokens", [1, 3, 40, 130])
def test_more_columns_than_are_expanded_at_once(tokens: int) -> None:
    for i in (385, 1000, 2048):
        w, x, bias = weight(70, i, 0.8), halves(tokens, i), halves(70)
        w[32:64, : i - 7] = 0  # A panel whose blocks are few.
        assert_close(layout.call(x, pack(w), bias, "silu"), x, w, bias, "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_activation_itself_is_accurate(activation: str, tokens: int) -> None:
    values = torch.cat([torch.linspace(-20, 20, 4001), torch.linspace(-200, 200, 400), torch.zeros(1)]).bfloat16()
    w = torch.zeros(len(values), 3, dtype=torch.bfloat16)
    x = halves(tokens, 3)
    assert_close(layout.call(x, pack(w), values, activation), x, w, values, activation)

    special = torch.tensor([torch.inf, -torch.inf, torch.nan]).bfloat16()
    y = layout.call(x, pack(w[:3]), special, activation)
    # torch's vectorised gelu(inf) is nan on some CPUs; the formula says inf.
    expected = {"relu": [torch.inf, 0.0], "": [torch.inf, -torch.inf]}.get(activation, [torch.inf, torch.nan])
    expected = torch.tensor([*expected, torch.nan]).bfloat16().expand(tokens, -1)
    torch.testing.assert_close(y, expected, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("column", [3, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_in_x_are_multiplied_as_in_a_dense_product_unless_their_block_is_empty(
    tokens: int, column: int, value: float
) -> None:
    w = weight(40, 50, 0.9)
    w[:32, 32:] = 0  # The first panel has no second block.
    # What follows the last token is nan as well, and a token's last columns are fewer than a block's.
    x = torch.full(((tokens + 1) * 50,), torch.nan).bfloat16()[: tokens * 50].view(tokens, 50)
    x.copy_(halves(tokens, 50))
    x[-1, column] = value
    y = layout.call(x, pack(w))
    dense = F.linear(x.float(), w.float())
    if column >= 32:
        dense[-1, :32] = F.linear(x[-1, :32].float(), w[:32, :32].float())
    assert torch.equal(y.isnan(), dense.isnan()) and torch.equal(y.isinf(), dense.isinf())


@pytest.mark.parametrize(
    "w",
    [
        pytest.param(weight(33, 20, 1.0), id="zero"),
        pytest.param(weight(1, 1, 1.0), id="zero-1x1"),
        pytest.param(weight(1, 1, 0.0), id="1x1"),
        pytest.param(weight(5, 1, 0.0), id="i=1"),
        pytest.param(weight(1, 300, 0.5), id="o=1"),
        pytest.param(weight(64, 64, 0.0), id="dense"),
        pytest.param(weight(129, 65, 0.999), id="many empty blocks"),
    ],
)
def test_odd_weights(w: Tensor) -> None:
    bias = halves(len(w))
    for tokens in (1, 2, 8, 65):
        x = halves(tokens, w.shape[1])
        assert_close(layout.call(x, pack(w), bias), x, w, bias)


def test_leading_dimensions_and_strides() -> None:
    w, bias = weight(50, 40, 0.8), halves(50)
    packed = pack(w)
    for x in (
        halves(3, 40, 7).transpose(1, 2), halves(40), halves(2, 3, 4, 40), halves(9, 80)[:, ::2],
        halves(0, 5, 40), halves(40).expand(6, 40), halves(361)[1:].view(9, 40),
    ):  # fmt: skip
        assert_close(layout.call(x, packed, bias, "gelu"), x, w, bias, "gelu")


@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_threads_do_not_change_a_bit(tokens: int) -> None:
    w, x = weight(1100, 384, 0.8), halves(tokens, 384)
    packed, before = pack(w), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(layout.call(x, packed, None, "silu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_calls_from_two_threads_at_once() -> None:
    weights = [weight(200, 384, 0.8), weight(96, 100, 0.5)]
    packed = [pack(w) for w in weights]

    def run(which: int) -> None:
        for tokens in (1, 40, 7, 128, 64):
            x = halves(tokens, weights[which].shape[1])
            assert_close(layout.call(x, packed[which]), x, weights[which])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [0, 1] * 6))


def test_dense_bf16_products_between_calls_stay_right() -> None:
    # oneDNN sets shapes of tiles of its own.
    w, x = weight(96, 128, 0.8), halves(48, 128)
    packed = pack(w)
    for _ in range(3):
        assert_close(layout.call(x, packed), x, w)
        assert_close(F.linear(x, w), x, w)


def test_nothing_left_from_an_earlier_call_is_read() -> None:
    big = pack(weight(600, 200, 0.5))
    for tokens in (1, 3, 8, 20, 64, 70):
        layout.call(torch.full((70, 200), torch.nan).bfloat16(), big)
        w, x = weight(45, 61, 0.9), halves(tokens, 61)
        w[7] = 0
        assert_close(layout.call(x, pack(w)), x, w)


PARTS = ((3, 130, 67), (1,) * 200, (0, 199, 0, 1), (96, 104), (64, 64, 72))


@pytest.mark.parametrize("sizes", PARTS, ids=lambda sizes: f"{len(sizes)}parts")
@pytest.mark.parametrize("tokens", [0, 1, 7, 32, 70])
def test_parts_equal_the_whole(sizes: tuple[int, ...], tokens: int) -> None:
    x, bias, w = halves(2, tokens, 90), halves(200), weight(200, 90, 0.7)
    packed = pack(w)
    for b, activation in ((None, ""), (bias, "gelu")):
        parts = layout.split_op(x, *packed.tensors.values(), b, sizes, activation)
        whole = layout.call(x, packed, b, activation)
        assert_close(whole, x, w, b, activation)
        assert [p.shape for p in parts] == [(2, tokens, size) for size in sizes]
        assert all(torch.equal(p, q) for p, q in zip(parts, whole.split(sizes, -1), strict=True))
        assert all(p.is_contiguous() for p in parts)


def test_op_under_fake_tensors_and_opcheck() -> None:
    w, bias = weight(24, 16, 0.7), halves(24)
    tensors = list(pack(w).tensors.values())
    torch.library.opcheck(layout.op, (halves(3, 16), *tensors, bias, 24, "relu"))
    torch.library.opcheck(layout.split_op, (halves(3, 16), *tensors, None, (5, 19), "relu"))


def test_plain_torch_gives_the_same() -> None:
    w, x, bias = weight(70, 90, 0.8), halves(2, 9, 90), halves(70)
    tensors = list(pack(w).tensors.values())
    assert_close(tiles.tiles_linear_reference(x, *tensors, bias, 70, "gelu"), x, w, bias, "gelu")
    first, second = tiles.tiles_linear_split_reference(x, *tensors, bias, [30, 40], "")
    assert_close(first, x, w[:30], bias[:30])
    assert_close(second, x, w[30:], bias[30:])


def changed(packed: Packed, **tensors: Tensor) -> Packed:
    return Packed(packed.layout, packed.shape, {**packed.tensors, **tensors})


def test_wrong_arguments_are_refused() -> None:
    packed, x = pack(weight(20, 30, 0.5)), halves(4, 30)
    t = packed.tensors
    split = lambda sizes: layout.split_op(x, *t.values(), None, sizes, "")  # noqa: E731
    calls = [
        lambda: layout.call(halves(4, 31), packed),
        lambda: layout.call(halves(), packed),
        lambda: layout.call(x.float(), packed),
        lambda: layout.call(x, packed, halves(21)),
        lambda: layout.call(x, packed, None, "tanh"),
        lambda: layout.call(x, Packed("tiles", (21, 30), t)),
        lambda: split((10, 9)),
        lambda: split((10, 11)),
        lambda: split((-1, 21)),
        lambda: split((21, -1)),
        lambda: split(()),
    ]
    if tiles.isa():
        calls += [
            lambda: layout.call(x, packed, torch.randn(20)),
            lambda: layout.call(x, changed(packed, values=t["values"][:-1])),
            lambda: layout.call(x, changed(packed, values=t["values"].float())),
            lambda: layout.call(x, changed(packed, bits=t["bits"][1:])),
            lambda: layout.call(x, changed(packed, bits=t["bits"].long())),
            lambda: layout.call(x, changed(packed, columns=t["columns"] + 1)),
            lambda: layout.call(x, changed(packed, columns=t["columns"].repeat(2))),
            lambda: layout.call(x, changed(packed, starts=t["starts"][:-1])),
            lambda: layout.call(x, changed(packed, starts=t["starts"].int())),
            lambda: layout.call(x, changed(packed, starts=-t["starts"])),
        ]
    for call in calls:
        with pytest.raises((RuntimeError, ValueError)):
            call()


def test_fits_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(4, 4, 0.5)
    for other, word in (
        (w.float(), "float32"),
        (w.view(4, 4, 1), "3 dimensions"),
        (w[:0], "empty"),
        (w.to("meta"), "meta"),
    ):
        fit = layout.fits(site(other))
        assert not fit.ok and word in fit.why
    assert "tanh" in layout.fits(site(w, (1,), "tanh")).why
    monkeypatch.setattr(native, "status", lambda: native.Status(True, "made up"))
    for isa, tokens, why in (
        ("AMX", (128,), ""),
        ("AVX-512", (4,), ""),
        ("AVX-512", (128,), "no AMX"),
        ("", (1,), "no AMX, and no AVX-512 VBMI2"),
    ):
        monkeypatch.setattr(tiles, "isa", lambda isa=isa: isa)
        fit = layout.fits(site(w, tokens))
        assert fit.ok is (not why) and why in fit.why
    monkeypatch.setattr(native, "status", lambda: native.Status(False, "no compiler"))
    assert "no compiler" in layout.fits(site(w)).why


def test_prediction_grows_with_the_work() -> None:
    large, small = site(weight(256, 256, 0.5)), site(weight(256, 128, 0.5))
    for tokens in (1, 8, 128):
        assert 0 < layout.predict(small, tokens) < layout.predict(large, tokens)
    assert layout.predict(large, 8) < layout.predict(large, 512)


@pytest.mark.parametrize("bias", [True, False])
def test_dense_forms_of_a_bf16_site_are_right(bias: bool) -> None:
    w, x, b = weight(40, 50, 0.5), halves(9, 50), halves(40) if bias else None
    for way in best_dense(Site("w", "n", w.t().contiguous().t(), b, (9,), ""), x):
        assert_close(way(), x, w, b)


class Attention(nn.Module):
    """q, k and v, and a layer with gelu."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(48, 20), nn.Linear(48, 20), nn.Linear(48, 37), nn.Linear(37, 48)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        return F.gelu(self.out(scores.softmax(-1) @ self.v(x)))


@needs_kernel
@pytest.mark.skipif(tiles.isa() != "AMX", reason="forced where tokens are many, which asks for AMX")
def test_a_bf16_model_is_packed_and_q_k_and_v_are_one_call() -> None:
    model = Attention().bfloat16().eval()
    options = {"layout": "tiles", "compile": False}
    result = fxprune.transform(model, HALF, (halves(2, 7, 48),), options=options, progress=False)
    targets = [node.target for node in result.graph.nodes]
    assert targets.count(layout.split_op) == 1 and targets.count(layout.op) == 1
    assert all(w.lowered.choice.layout == "tiles" for w in result.report.weights)
    masked = Attention().bfloat16().eval()
    masked.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, mask in result.selection.mask.items():
            masked.get_parameter(name).masked_fill_(~mask.unpack(), 0)
        for batch in (1, 5):
            x = halves(batch, 7, 48)
            torch.testing.assert_close(result(x), masked(x), rtol=0.03, atol=0.03)


# What a build for other CPUs answers. The kernels of other layouts are left out, for they take long to compile.
PROGRAM = """
import pathlib, sys, torch
from fxprune.kernels.native import build
other = pathlib.Path(sys.argv[1])
other.write_text('extern "C" const char* fxprune_isa() { return "of a test"; }')
build.SOURCES = (build.HERE / "tiles.cpp", other)
from fxprune.kernels.native import tiles
from tests.lower.test_tiles import assert_close, halves, layout, pack, weight
print(tiles.isa() or "-")
for (o, i), tokens in ((70, 90), 1), ((70, 90), 5), ((33, 384), 40), ((96, 64), 0):
    w, x, bias = weight(o, i, 0.7), halves(tokens, i), halves(o)
    assert_close(layout.call(x, pack(w), bias, "gelu"), x, w, bias, "gelu")
special = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1.0]).bfloat16()
y = layout.call(halves(3, 8), pack(weight(5, 8, 1.0)), special)
assert torch.equal(y.isnan(), special.isnan().expand(3, 5)) and torch.equal(y[:, :2], special[:2].expand(3, 2))
"""


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        pytest.param("-mno-amx-tile -mno-avx512bf16", "AVX-512", id="no AMX"),
        pytest.param("-mno-avx512vbmi2", "-", id="no VBMI2"),
    ],
)
def test_builds_for_other_cpus_give_the_same(flags: str, isa: str, tmp_path: Path) -> None:
    env = {**os.environ, "FXPRUNE_CACHE_DIR": str(tmp_path), "FXPRUNE_NATIVE_FLAGS": f"{flags} -O1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "isa.cpp")], env=env, cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@needs_kernel
def test_a_child_that_was_forked_after_use_computes_too() -> None:
    program = """
import os, torch
torch.set_num_threads(1)
from tests.lower.test_tiles import assert_close, halves, layout, pack, weight
w, x = weight(70, 90, 0.7), halves(40, 90)
packed = pack(w)
assert_close(layout.call(x, packed), x, w)
child = os.fork()
assert_close(layout.call(x, packed), x, w)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
