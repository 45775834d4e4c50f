"""What the tests of calibration share: small models of every kind, and what a selection makes of a model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import Plan, Rule, Unstructured
from fxprune.capture.capture import capture
from fxprune.check.calls import Call
from fxprune.check.compare import outputs
from fxprune.couple.couple import couple
from fxprune.graph.program import put_values
from fxprune.select.selection import Selection
from fxprune.shrink.shrink import shrink
from tests.oracle import snapshot
from tests.structured_oracle import net

HALF = Plan([Rule("*", Unstructured(0.5))])


class Transposed(nn.Module):
    """A linear whose weight is stored as [i, o], as GPT-2 has it."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.randn(o))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def chain(m: Any, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x).relu()).relu())


def _residual(m: Any, x: Tensor) -> Tensor:
    x = x + m.b(m.a(F.layer_norm(x, x.shape[-1:])).relu())
    return m.c(x)


def _attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).view(x.shape[0], -1, 4, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
    x = x + m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return x + m.b(m.a(x).relu())


def _conv_net(m: Any, x: Tensor) -> Tensor:
    y = m.n1(m.c1(x)).relu()
    y = (y + m.n2(m.c2(y))).relu_()
    return m.head(y.mean((2, 3)))


def _mobile(m: Any, x: Tensor) -> Tensor:
    y = m.n1(m.up(x)).clamp(0, 6)
    y = m.n2(m.depth(y)).clamp(0, 6)
    return m.head((x + m.n3(m.down(y))).flatten(1))


def _unbiased(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).tanh())


def _one_bias(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.a.weight, m.a.bias).relu(), m.b.weight, m.a.bias)


def model(kind: str) -> tuple[Any, Tensor]:
    """A model and 24 samples of correlated data."""
    linears = dict(a=nn.Linear(16, 32), b=nn.Linear(32, 16), c=nn.Linear(16, 8))
    mixed = torch.randn(24, 10, 16) @ torch.randn(16, 16) / 4 + torch.randn(16)
    image = F.interpolate(torch.randn(24, 8, 4, 4), (7, 7), mode="bilinear")
    if kind == "linear":
        return net(chain, **linears), mixed[:, 0]
    if kind == "tokens":
        return net(_residual, **linears), mixed
    if kind == "attention":
        parts = {name: nn.Linear(16, 16) for name in "qkvo"}
        return net(_attention, **parts, a=linears["a"], b=linears["b"]), mixed
    if kind == "transposed":
        return net(_residual, a=Transposed(16, 32), b=Transposed(32, 16), c=Transposed(16, 8)), mixed
    if kind == "conv and norm":
        parts = dict(c1=nn.Conv2d(8, 16, 3, 2, 1, bias=False), c2=nn.Conv2d(16, 16, 3, padding="same", bias=False))
        return net(_conv_net, **parts, n1=nn.BatchNorm2d(16), n2=nn.BatchNorm2d(16), head=nn.Linear(16, 5)), image
    if kind == "depthwise":
        parts = dict(up=nn.Conv2d(8, 24, 1, bias=False), depth=nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False))
        norms = dict(n1=nn.BatchNorm2d(24), n2=nn.BatchNorm2d(24), n3=nn.BatchNorm2d(8))
        return net(_mobile, **parts, **norms, down=nn.Conv2d(24, 8, 1, bias=False), head=nn.Linear(8 * 49, 5)), image
    if kind == "grouped":
        parts = dict(a=nn.Conv2d(8, 12, 3, groups=2), b=nn.Conv2d(12, 12, 3, dilation=2, groups=3, padding=2))
        return net(chain, **parts, c=nn.Conv2d(12, 4, 1)), image
    if kind == "1d":
        parts = dict(a=nn.Conv1d(10, 12, 3, stride=2), b=nn.Conv1d(12, 8, 3, padding=1), c=nn.Conv1d(8, 4, 1))
        return net(chain, **parts), mixed
    if kind == "no bias":
        return net(_unbiased, a=nn.Linear(16, 24, bias=False), b=nn.Linear(24, 8, bias=False)), mixed
    if kind == "one bias":
        return net(_one_bias, a=nn.Linear(16, 16), b=nn.Linear(16, 16, bias=False)), mixed
    raise ValueError(kind)


KINDS = (
    "linear",
    "tokens",
    "attention",
    "transposed",
    "conv and norm",
    "depthwise",
    "grouped",
    "1d",
    "no bias",
    "one bias",
)


def tensors_of(model: nn.Module) -> dict[str, Any]:
    """The tensors of a model as calibration must leave them; compare with ==. Export makes other tuples of others."""
    return {name: seen for name, seen in snapshot(model).items() if not name.startswith("module ")}


@torch.no_grad()
def applied(model: nn.Module, selection: Selection, removed: dict[str, list[tuple[int, Tensor]]] | None = None) -> Any:
    """A copy of the eager model with a selection's values and zeros, and with zeros in removed slices."""
    result = copy.deepcopy(model)
    tensors = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    for name, value in selection.values.items():
        tensors[name].copy_(value)
    for name, mask in selection.mask.items():
        tensors[name].masked_fill_(~mask.unpack(), 0.0)
    for name, cuts in (removed or {}).items():
        for dim, kept in cuts:
            leaves = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
            leaves[kept] = False
            tensors[name].index_fill_(dim, leaves.nonzero().flatten(), 0.0)
    return result


def shrunk_and_zeroed(model: nn.Module, selection: Selection, x: Tensor) -> tuple[Any, Any]:
    """What the program with a selection's values answers when its units are taken out, and when they are zero."""
    program = put_values(capture(model, (x,), {}).program, selection.values)
    coupling = couple(program)
    small = shrink(program, coupling, selection.keep)
    oracle = applied(model, selection, coupling.kept(selection.keep))
    call = Call("", (x,), {})
    return outputs(small, call), outputs(oracle, call)


@torch.no_grad()
def off(model: nn.Module, other: nn.Module, *args: Any) -> float:
    """The squared difference of two models' outputs, over the variance of the first's."""
    dense, found = model(*args), other(*args)
    return float((dense - found).square().sum() / (dense - dense.mean(0)).square().sum())


def differ(one: Selection, other: Selection) -> float:
    """The largest difference of two selections' values, relative to the largest of its tensor; masks must be equal."""
    assert one.mask.keys() == other.mask.keys() and one.keep.keys() == other.keep.keys()
    assert all(torch.equal(one.mask[name].bits, other.mask[name].bits) for name in one.mask)
    assert all(torch.equal(one.keep[name], other.keep[name]) for name in one.keep)
    assert one.values.keys() == other.values.keys()
    return max(
        float((value.double() - other.values[name].double()).abs().max() / value.double().abs().max())
        for name, value in one.values.items()
    )
