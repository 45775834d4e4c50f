"""Linears over tokens that are computed in one call, with the attention and the norms between them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Plan, Rule, Unstructured
from fxprune.errors import InputError
from fxprune.kernels import native
from fxprune.kernels.native import net, tiles
from fxprune.lower.nets import build, lower

from .test_nets import left, nets

pytestmark = pytest.mark.skipif(not native.status().available, reason="needs a C++ compiler")


class Block(nn.Module):
    """A transformer's layer of 24 channels and 3 heads; `attend` has the attention."""

    def __init__(self, attend: Callable[[Block, Tensor, Tensor | None], Tensor], *, before: bool = False) -> None:
        super().__init__()
        self.attend, self.before = attend, before
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24, bias=bias) for bias in (True, False, True, True))
        self.qkv = nn.Linear(24, 72)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)
        self.a, self.b = nn.LayerNorm(24), nn.LayerNorm(24, elementwise_affine=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.before:
            x = x + self.drop(self.attend(self, self.a(x), mask))
            return x + self.down(F.gelu(self.up(self.b(x)), approximate="tanh"))
        x = self.a(x + self.drop(self.attend(self, x, mask)))
        return self.b(x + self.drop(self.down(F.gelu(self.up(x)))))


def apart(m: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    """As transformers has it."""
    q, k, v = (f(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for f in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v, mask)
    return m.out(y.transpose(1, 2).contiguous().reshape(*x.shape[:2], -1))


def together(m: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    """As timm has it."""
    q, k, v = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=0.2)
    return m.out(y.transpose(1, 2).flatten(2))


def split(m: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    """As GPT-2 has it, causal."""
    q, k, v = (part.unflatten(2, (3, 8)).transpose(1, 2) for part in m.qkv(x).split(24, 2))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return m.out(y.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[1], 24))


def crossed(m: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    """The keys and values are of fewer tokens than the queries."""
    less = x[:, :2].contiguous()
    q, k, v = (f(y).unflatten(2, (3, 8)).transpose(1, 2) for f, y in ((m.q, x), (m.k, less), (m.v, less)))
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def transposed(m: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return apart(m, F.linear(x, m.q.weight.t()), mask)


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every net is taken, however small."""
    monkeypatch.setattr(build, "gain_of", lambda *_: 9.0)
    monkeypatch.setattr(lower, "LEAST_WORK", 0)


def result_of(model: nn.Module, *inputs: Tensor, plan: Plan | None = None) -> nn.Module:
    torch._dynamo.reset()
    plan = Plan([Rule("*", Unstructured(0.6))]) if plan is None else plan
    options = {"compile": False, "measure": False}
    return fxprune.transform(model, plan, inputs, options=options, progress=False)


def pruned(model: nn.Module, amount: float = 0.6) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            torch.nn.utils.prune.l1_unstructured(module, "weight", amount)
            torch.nn.utils.prune.remove(module, "weight")
    return model


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("attend", [apart, together, split, crossed, transposed], ids=lambda f: f.__name__)
def test_layers_become_one_net(attend: Callable[..., Tensor], before: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(attend, before=before), Block(attend, before=before)).eval()
    result = result_of(model, torch.randn(2, 10, 24))
    missing = [
        name for name in left(result) if any(word in name for word in ("linear", "attention", "gelu", "dropout"))
    ]
    # What is sliced between two layers parts them.
    assert not missing and (len(nets(result)) == 1 or attend is crossed)
    wanted = pruned(model)
    for images in (1, 2, 5, 17):
        x = torch.randn(images, 10, 24)
        torch.testing.assert_close(result(x), wanted(x), rtol=1e-4, atol=1e-5)


def test_layers_in_bfloat16_are_one_net_and_no_further_from_the_truth_than_torch() -> None:
    torch.manual_seed(0)
    wanted = pruned(nn.Sequential(Block(apart), Block(together, before=True)).eval().bfloat16())
    result = result_of(wanted, torch.randn(2, 10, 24).bfloat16(), plan=Plan([]))
    (call,) = nets(result)
    kinds = {type(step) for step in net.decode(call.args[-1])}
    assert (net.Product if tiles.isa() == "AMX" else net.Conv) in kinds
    truth = copy.deepcopy(wanted).double()
    for images in (1, 2, 5):
        x = torch.randn(images, 10, 24).bfloat16()
        got, theirs, exact = result(x), wanted(x), truth(x.double())
        assert got.dtype == torch.bfloat16
        assert (got - exact).abs().max() <= 1.5 * (theirs - exact).abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_float32_model_may_be_multiplied_in_bfloat16(dtype: Any) -> None:
    torch.manual_seed(0)
    model, x = pruned(nn.Sequential(Block(apart), Block(together)).eval()), torch.randn(2, 10, 24)
    options = {"compile": False, "measure": False, "dtype": dtype}
    torch._dynamo.reset()
    result = fxprune.transform(model, None, (x,), options=options, progress=False)
    (call,) = nets(result)
    kinds = [type(step) for step in net.decode(call.args[-1])]
    assert (kinds.count(net.Product) == 10) == (tiles.isa() == "AMX")
    error = (result(x) - model(x)).abs().max() / model(x).abs().max()
    assert result(x).dtype == torch.float32
    assert (1e-4 if tiles.isa() == "AMX" else 0.0) < error < 5e-2
    # Elsewhere they are of float32 numbers, of weights that may have been rounded.
    assert tiles.isa() != "AMX" or any("bfloat16 were asked for" in row.verdict for row in result.report.checks)
    with pytest.raises(InputError, match="dtype"):
        fxprune.transform(model, None, (x,), options={"dtype": torch.float16})
    dense = fxprune.transform(model, None, (x,), options={**options, "layout": "dense"}, progress=False)
    assert "no weight is packed, so all are in float32" in str(dense.report)
    assert max(row.tolerance for row in dense.report.checks) <= 1e-4


def test_convolutions_in_bfloat16_are_one_net() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 8, 3)
    model = nn.Sequential(*layers).eval().bfloat16()
    with torch.no_grad():
        for conv in layers[::2]:
            conv.weight.masked_fill_(torch.rand_like(conv.weight) < 0.6, 0.0)  # pyright: ignore
    result = result_of(model, torch.randn(2, 3, 12, 13).bfloat16(), plan=Plan([]))
    assert len(nets(result)) == 1 and not any("conv" in name for name in left(result))
    x, truth = torch.randn(3, 3, 12, 13).bfloat16(), copy.deepcopy(model).double()
    assert (result(x) - truth(x.double())).abs().max() <= 1.5 * (model(x) - truth(x.double())).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_region_has_one_dtype(dtype: torch.dtype) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 24).to(dtype), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).float() + 1.0)

    model, x = Mixed().eval(), torch.randn(1, 20, 24, dtype=dtype)
    result = result_of(model, x)
    assert result(x).dtype == torch.float32
    torch.testing.assert_close(result(x), pruned(model)(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(2, 1, 10, 10), (1, 3, 10, 10), (2, 1, 1, 10), (10, 10)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Block(apart).eval(), torch.randn(2, 10, 24)
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    mask = mask if dtype == torch.bool else mask * torch.randn(shape)
    result, wanted = result_of(model, x, mask), pruned(model)
    (net,) = nets(result)
    assert len(net.args[0]) == 2
    for again in (mask, mask.flip(-1)):
        torch.testing.assert_close(result(x, again), wanted(x, again), rtol=1e-4, atol=1e-5)


def test_a_mask_of_constants_that_hides_nothing_is_none() -> None:
    class Masked(Block):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore
            return super().forward(
                x, (torch.arange(10) >= self.least)[None, None, :, None].expand(x.shape[0], -1, -1, 10)
            )

    for least, inputs in ((0, 1), (1, 2)):
        model = Masked(apart).eval()
        model.least = least
        result = result_of(model, torch.randn(2, 10, 24))
        (net,) = nets(result)
        assert len(net.args[0]) == inputs
        x = torch.randn(3, 10, 24)
        torch.testing.assert_close(result(x), pruned(model)(x), rtol=1e-4, atol=1e-5)


def test_what_others_read_as_well_is_handed_out() -> None:
    class Watched(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
            q, k, v = (f(x).view(*x.shape[:2], 3, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).flatten(2)), k.cumsum(2), y.amax(3), v

    model = Watched(apart).eval()
    result, x = result_of(model, torch.randn(2, 10, 24)), torch.randn(3, 10, 24)
    assert nets(result)
    for got, wanted in zip(result(x), pruned(model)(x)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "heads",
    [lambda q: q.transpose(1, 2).flip(1), lambda q: q.unflatten(3, (4, 2)).transpose(3, 4).flatten(3).transpose(1, 2)],
)
def test_heads_that_do_not_lie_side_by_side_stay_outside(heads: Callable[[Tensor], Tensor]) -> None:
    class Odd(Block):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore
            q, k, v = (f(x).unflatten(2, (3, 8)) for f in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(heads(q), k.transpose(1, 2), v.transpose(1, 2))
            return self.out(y.transpose(1, 2).flatten(2))

    model = Odd(apart).eval()
    result, x = result_of(model, torch.randn(2, 10, 24)), torch.randn(3, 10, 24)
    # Were it taken in, the check would find it wrong, and nothing would be packed.
    assert nets(result) and any("attention" in name for name in left(result))
    torch.testing.assert_close(result(x), pruned(model)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "back", [lambda y: y.permute(0, 2, 3, 1).flatten(2), lambda y: y.flip(1).transpose(1, 2).flatten(2)]
)
def test_heads_that_are_not_put_side_by_side_stay_outside(back: Callable[[Tensor], Tensor]) -> None:
    class Odd(Block):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore
            q, k, v = (f(x).unflatten(2, (3, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.out(back(F.scaled_dot_product_attention(q, k, v)))

    model = Odd(apart).eval()
    result, x = result_of(model, torch.randn(2, 10, 24)), torch.randn(3, 10, 24)
    # Were it taken in, the check would find it wrong, and nothing would be packed.
    assert nets(result) and any("attention" in name for name in left(result))
    torch.testing.assert_close(result(x), pruned(model)(x), rtol=1e-4, atol=1e-5)


def test_dense_linears_stay_outside() -> None:
    model = Block(apart).eval()
    plan = Plan([Rule("up.weight", Unstructured(0.6)), Rule("down.weight", Unstructured(0.6))])
    result = result_of(model, torch.randn(2, 10, 24), plan=plan)
    assert len(nets(result)) == 1 and sum("linear" in name for name in left(result)) == 4
    assert {row.name for row in result.report.weights if row.layout == "nonzeros"} == {"up.weight", "down.weight"}
    assert "linears in one call" in str(result.report)


def test_a_length_that_varies() -> None:
    model = nn.Sequential(Block(together), Block(together)).eval()
    calls = [(torch.randn(2, 10, 24),), (torch.randn(3, 17, 24),)]
    options = {"compile": False, "measure": False}
    plan = Plan([Rule("*", Unstructured(0.6))])
    result = fxprune.transform(model, plan, calls, options=options, progress=False)
    assert len(nets(result)) == 1
    for size in ((1, 5), (2, 64), (4, 33)):
        x = torch.randn(*size, 24)
        torch.testing.assert_close(result(x), pruned(model)(x), rtol=1e-4, atol=1e-5)


def test_few_tokens_are_left_to_other_kernels() -> None:
    assert not nets(result_of(Block(apart).eval(), torch.randn(1, 2, 24)))


def test_a_net_that_is_slower_leaves_its_linears_to_the_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "gain_of", lambda *_: 0.7)
    result = result_of(Block(apart).eval(), torch.randn(2, 10, 24))
    assert not nets(result)
    linears = [row for row in result.report.weights if row.name.endswith(("q.weight", "up.weight"))]
    assert linears and all("0.70x its ops" in row.refused["net"] for row in linears)
