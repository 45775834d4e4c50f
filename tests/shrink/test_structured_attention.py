"""Structured pruning of attention, however it is written: whole heads, whole key heads with their queries, head widths.

Every test names the sizes that come out and holds the result against the zeroed eager model, at two batch sizes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import Channels, Plan, Rule
from tests.structured_oracle import assert_shrunk, channels, net, randomised, right, shrunk, sizes


def assert_whole_heads(result: Any, name: str, width: int, parts: int = 1) -> None:
    """What left dim 0 of a weight are runs of `width` indices, the same ones in each of its parts."""
    gone = dict(result.report.removed[name])[0].view(parts, -1, width)
    assert torch.equal(gone, gone[..., :1] + torch.arange(width)) and not (gone[..., 0] % width).any()
    size = sum(len(gone[0].flatten()) for _ in range(parts)) + sizes(result)[name][0]
    assert torch.equal(gone - gone[:1], torch.arange(parts)[:, None, None] * (size // parts) * torch.ones_like(gone))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_loses_whole_heads(need_weights: bool, batch_first: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.attention(x, x, x, need_weights=need_weights)[0]

    model = net(forward, attention=nn.MultiheadAttention(32, 4, batch_first=batch_first))
    result = right(model, torch.randn(3, 7, 32), other=torch.randn(5, 7, 32))
    got = sizes(result)
    assert got["attention.in_proj_weight"] == (48, 32) and got["attention.in_proj_bias"] == (48,)
    assert got["attention.out_proj.weight"] == (32, 16)
    assert_whole_heads(result, "attention.in_proj_weight", 8, parts=3)


def test_multihead_attention_that_returns_its_weights_keeps_its_heads() -> None:
    """The mean of the weights over heads is an output, and a head that left would have been uniform, not zero."""
    model = net(lambda m, x: m.attention(x, x, x), attention=nn.MultiheadAttention(32, 4, batch_first=True))
    result = right(model, torch.randn(3, 7, 32), other=torch.randn(5, 7, 32))
    assert sizes(result)["attention.in_proj_weight"] == (48, 32)
    gone = dict(result.report.removed["attention.in_proj_weight"])[0]
    assert torch.bincount(gone // 8).tolist() == [4] * 12


def test_multihead_attention_over_other_keys() -> None:
    def forward(m: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return m.attention(x, keys, values, need_weights=False)[0]

    def call(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(batch, 5, 32), torch.randn(batch, 9, 12), torch.randn(batch, 9, 20)

    model = net(forward, attention=nn.MultiheadAttention(32, 4, kdim=12, vdim=20, batch_first=True))
    result = right(model, *call(2), other=call(4))
    got = sizes(result)
    assert got["attention.q_proj_weight"] == (16, 32) and got["attention.k_proj_weight"] == (16, 12)
    assert got["attention.v_proj_weight"] == (16, 20) and got["attention.out_proj.weight"] == (32, 16)
    assert_whole_heads(result, "attention.k_proj_weight", 8)


def by_reshape(m: Any, x: Tensor) -> Tensor:
    b, t, width = x.shape
    q, k, v = m.qkv(x).reshape(b, t, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width))


def by_chunk(m: Any, x: Tensor) -> Tensor:
    b, t, width = x.shape
    q, k, v = (y.view(b, t, 4, 8).transpose(1, 2) for y in m.qkv(x).chunk(3, dim=-1))
    scores = (q @ k.transpose(-1, -2)) * 8**-0.5
    return m.out((scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(b, t, width))


def by_head(m: Any, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    q, k, v = m.qkv(x).view(b, t, 4, 3 * 8).transpose(1, 2).chunk(3, dim=-1)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("forward", [by_reshape, by_chunk, by_head])
def test_a_fused_qkv(forward: Any) -> None:
    model = net(forward, qkv=nn.Linear(32, 96), out=nn.Linear(32, 32))
    result = right(model, torch.randn(2, 7, 32), other=torch.randn(5, 7, 32))
    got = sizes(result)
    assert got["qkv.weight"] == (48, 32) and got["qkv.bias"] == (48,) and got["out.weight"] == (32, 16)
    assert_whole_heads(result, "qkv.weight", *((24,) if forward is by_head else (8, 3)))


@pytest.mark.parametrize("forward", [by_reshape, by_chunk, by_head])
def test_head_width_of_a_fused_qkv(forward: Any) -> None:
    """Inner units keep every head, and the scale stays that of the old width."""
    model = net(forward, qkv=nn.Linear(32, 96), out=nn.Linear(32, 32))
    plan = channels(0.25, unit="inner")
    result = right(model, torch.randn(2, 7, 32), other=torch.randn(5, 7, 32), plan=plan)
    got = sizes(result)
    assert got["qkv.weight"] == (72, 32) and got["out.weight"] == (32, 24)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Grouped(nn.Module):
    """Grouped-query attention: 8 query heads, 4 key heads of width 8, rotary positions, norms of q and k on request."""

    cos: Tensor
    sin: Tensor

    def __init__(self, repeat: str, norms: bool, rotary: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 64), nn.Linear(24, 32), nn.Linear(24, 32)
        self.o = nn.Linear(64, 24)
        self.q_norm, self.k_norm = (nn.RMSNorm(8) if norms else nn.Identity() for _ in range(2))
        angles = torch.arange(9)[:, None] / 100 ** (torch.arange(4) / 4)
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())
        self.repeat, self.rotary = repeat, rotary

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_norm(self.q(x).view(b, t, 8, 8)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(b, t, 4, 8)).transpose(1, 2)
        v = self.v(x).view(b, t, 4, 8).transpose(1, 2)
        if self.rotary:
            q, k = (rotated(y, self.cos[:t], self.sin[:t]) for y in (q, k))
        if self.repeat == "expand":
            k, v = (y[:, :, None].expand(b, 4, 2, t, 8).reshape(b, 8, t, 8) for y in (k, v))
        elif self.repeat == "repeat_interleave":
            k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.repeat == "enable_gqa")
        return self.o(y.transpose(1, 2).reshape(b, t, 64))


REPEATS = ["expand", "repeat_interleave", "enable_gqa"]


@pytest.mark.parametrize("repeat", REPEATS)
def test_key_value_heads_leave_with_their_queries(repeat: str) -> None:
    model = randomised(Grouped(repeat, norms=False))
    result = right(model, torch.randn(2, 9, 24), other=torch.randn(5, 9, 24))
    got = sizes(result)
    assert got["k.weight"] == got["v.weight"] == (16, 24)
    assert got["q.weight"] == (32, 24) and got["o.weight"] == (24, 32)
    gone = {name: dict(result.report.removed[name])[0] // 8 for name in ("q.weight", "k.weight", "v.weight")}
    assert torch.equal(gone["k.weight"], gone["v.weight"])
    assert set((gone["q.weight"] // 2).tolist()) == set(gone["k.weight"].tolist())


@pytest.mark.parametrize("repeat", REPEATS)
def test_grouped_queries_under_global_ranking(repeat: str) -> None:
    """The global pool has the two attentions' key heads; the fainter attention loses nearly all, and it does shrink."""
    model = randomised(nn.Sequential(Grouped(repeat, norms=False), Grouped(repeat, norms=False)))
    with torch.no_grad():
        for name, parameter in model[0].named_parameters():
            heads = parameter if name == "k.weight" or name == "v.weight" else None
            if heads is not None:
                heads.view(4, 8, 24)[1:] *= 0.01
    x = torch.randn(2, 9, 24)
    result = right(model, x, other=torch.randn(5, 9, 24), plan=channels(0.5, "*.k.weight", scope="global"))
    got = sizes(result)
    lost = [32 - got[f"{i}.k.weight"][0] for i in (0, 1)]
    assert sum(lost) == 32 and lost[0] > 0
    assert [got[f"{i}.q.weight"][0] for i in (0, 1)] == [2 * got[f"{i}.v.weight"][0] for i in (0, 1)]


@pytest.mark.parametrize("repeat", REPEATS)
def test_rotary_positions_with_norms_of_queries_and_keys(repeat: str) -> None:
    model = randomised(Grouped(repeat, norms=True))
    x, other = torch.randn(2, 9, 24), torch.randn(5, 9, 24)
    got = sizes(right(model, x, other=other))
    assert got["k.weight"] == (16, 24) and got["q.weight"] == (32, 24) and got["o.weight"] == (24, 32)
    assert got["q_norm.weight"] == (8,)
    # Without a norm over them, values have a width of their own.
    got = sizes(right(model, x, other=other, plan=channels(0.5, "v.weight", unit="inner")))
    assert got["v.weight"] == (16, 24) and got["o.weight"] == (24, 32) and got["q.weight"] == (64, 24)


def test_rotary_pairs_leave_together_with_their_angles() -> None:
    model = randomised(Grouped("expand", norms=False))
    plan = channels(0.5, "q.weight", unit="inner")
    result = right(model, torch.randn(2, 9, 24), other=torch.randn(5, 9, 24), plan=plan)
    got = sizes(result)
    assert got["q.weight"] == (32, 24) and got["k.weight"] == (16, 24) and got["v.weight"] == (32, 24)
    assert got["cos"] == got["sin"] == (9, 4)
    gone = dict(result.report.removed["cos"])[1]
    assert torch.equal(gone[:2] + 4, gone[2:])


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_graph_input_in_the_residual_stream(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first)
    model = randomised(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    randomised(model, seed=1)
    result = right(model, torch.randn(2, 6, 32), other=torch.randn(4, 6, 32))
    got = sizes(result)
    for i in range(2):
        assert_whole_heads(result, f"layers.{i}.self_attn.in_proj_weight", 8, parts=3)
        assert got[f"layers.{i}.self_attn.in_proj_weight"] == (48, 32)
        assert got[f"layers.{i}.self_attn.out_proj.weight"] == (32, 16)
        assert got[f"layers.{i}.linear1.weight"] == (24, 32) and got[f"layers.{i}.linear2.weight"] == (32, 24)
        assert got[f"layers.{i}.norm1.weight"] == (32,)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("name", "shapes"), [("v", (32, 16, 16)), ("q", (16, 32, 32)), ("k", (16, 32, 32))])
def test_heads_may_be_narrower_where_they_are_joined_by_a_view(
    name: str, shapes: tuple[int, ...], trainable: bool
) -> None:
    """Kernels of other widths leave other strides, and the model's `contiguous` is not in the graph."""

    def attend(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, 4, 8).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(b, n, 32))

    model = net(attend, **{part: nn.Linear(32, 32) for part in "qkvo"})
    plan = Plan([Rule(f"{name}.weight", Channels(0.5, unit="inner", align=1))])
    result = shrunk(model, torch.randn(2, 5, 32), plan=plan, trainable=trainable)
    assert (sizes(result)["q.weight"][0], sizes(result)["v.weight"][0], sizes(result)["o.weight"][1]) == shapes
    for batch in (1, 2, 3):
        assert_shrunk(result, model, (torch.randn(batch, 5, 32),))
