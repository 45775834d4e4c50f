"""Structured pruning of the patterns on which other tools crash, do nothing or are silently wrong: one test each.

Every test names the sizes that come out and holds the result against the zeroed eager model, at two batch sizes.
Attention and recurrent layers have files of their own.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Channels, Drop, Plan, Rule
from tests.oracle import assert_close, snapshot
from tests.structured_oracle import EAGER, HALF, channels, kept, net, randomised, right, shrunk, sizes, zeroed


def images(batch: int = 2, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, channels, size, size)


# --- cuts and views ----------------------------------------------------------------------------------------------


def test_chunks_that_are_used_differently() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.proj(x).chunk(2, -1)
        return m.narrow(a.relu()) + m.wide(b.tanh()) * m.gate(b)

    parts = dict(proj=nn.Linear(10, 32), narrow=nn.Linear(16, 6), wide=nn.Linear(16, 6), gate=nn.Linear(16, 6))
    model = net(forward, **parts)
    result = right(model, torch.randn(3, 10), other=torch.randn(7, 10))
    assert kept(result) == {"narrow.weight[1]": 8, "wide.weight[1]": 8}
    got = sizes(result)
    assert got["proj.weight"] == (16, 10) and got["narrow.weight"] == got["gate.weight"] == (6, 8)
    # Only the half that one of them reads, a quarter of it: the halves are of unequal sizes afterwards.
    result = right(model, torch.randn(3, 10), plan=channels(0.25, "narrow.weight", dim=1), other=torch.randn(7, 10))
    got = sizes(result)
    assert got["proj.weight"] == (28, 10) and got["narrow.weight"] == (6, 12) and got["wide.weight"] == (6, 16)


def test_a_split_into_unequal_pieces() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b, c = m.proj(x).split([4, 16, 12], dim=-1)
        return m.a(a.relu()) + m.b(b.relu()) + m.c(c.relu())

    parts = dict(proj=nn.Linear(10, 32), a=nn.Linear(4, 5), b=nn.Linear(16, 5), c=nn.Linear(12, 5))
    got = sizes(right(net(forward, **parts), torch.randn(3, 10), other=torch.randn(4, 10)))
    assert got["proj.weight"] == (16, 10) and got["proj.bias"] == (16,)
    assert [got[f"{name}.weight"] for name in "abc"] == [(5, 2), (5, 8), (5, 6)]


def test_slices_and_splits_with_literal_sizes() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        first, rest = y[:, :8], y[:, 8:]
        a, b = rest.split(12, dim=1)
        return m.head(torch.cat([m.conv(first), a.relu(), b.narrow(1, 0, 12)], 1))

    parts = dict(stem=nn.Conv2d(3, 32, 3), conv=nn.Conv2d(8, 8, 1), head=nn.Conv2d(32, 4, 1))
    got = sizes(right(net(forward, **parts), images(), other=images(5)))
    assert got["stem.weight"] == (16, 3, 3, 3) and got["conv.weight"] == (4, 4, 1, 1)
    assert got["head.weight"] == (4, 16, 1, 1)


def test_a_view_with_a_literal_channel_number() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x).relu()
        tokens = y.view(-1, 16, 36).transpose(1, 2)
        return m.flat(y.view(-1, 16 * 36)) + m.token(tokens).reshape(-1, 36 * 4).mean(1, keepdim=True)

    parts = dict(conv=nn.Conv2d(3, 16, 3), flat=nn.Linear(16 * 36, 5), token=nn.Linear(16, 4))
    got = sizes(right(net(forward, **parts), images(), other=images(5)))
    assert got["conv.weight"] == (8, 3, 3, 3) and got["flat.weight"] == (5, 8 * 36)
    # The mean over what the tokens' layer makes still divides by the old count.
    assert got["token.weight"] == (2, 8)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@pytest.mark.parametrize("shuffle", [channel_shuffle, F.channel_shuffle], ids=["by hand", "as an op"])
def test_a_channel_shuffle_between_grouped_convolutions(shuffle: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.second(shuffle(m.first(m.stem(x)).relu(), 4)).relu())

    parts = dict(
        stem=nn.Conv2d(3, 16, 1),
        first=nn.Conv2d(16, 16, 3, groups=4),
        second=nn.Conv2d(16, 16, 1, groups=4),
        head=nn.Conv2d(16, 3, 1),
    )
    result = right(net(forward, **parts), images(), other=images(5))
    got = sizes(result)
    assert got["head.weight"][1] < 16 and got["first.weight"][0] < 16
    assert result.report.parameters[1] < 0.7 * result.report.parameters[0]


def test_a_shufflenet_block() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.stem(x).relu().chunk(2, dim=1)
        b = m.expand(m.depth(m.reduce(b).relu())).relu()
        return m.head(channel_shuffle(torch.cat([a, b], 1), 2))

    parts = dict(
        stem=nn.Conv2d(3, 16, 3),
        reduce=nn.Conv2d(8, 12, 1),
        depth=nn.Conv2d(12, 12, 3, padding=1, groups=12),
        expand=nn.Conv2d(12, 8, 1),
        head=nn.Conv2d(16, 4, 1),
    )
    got = sizes(right(net(forward, **parts), images(), other=images(3)))
    assert got["depth.weight"] == (6, 1, 3, 3) and got["reduce.weight"][0] == 6
    # The shuffle interleaves the branches, so that they keep the same indices.
    assert got["expand.weight"] == (4, 6, 1, 1) and got["head.weight"] == (4, 8, 1, 1)
    assert got["stem.weight"] == (8, 3, 3, 3)


def test_a_pixel_shuffle() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.pixel_shuffle(m.up(m.stem(x).relu()), 2))

    model = net(forward, stem=nn.Conv2d(3, 8, 3), up=nn.Conv2d(8, 32, 1), head=nn.Conv2d(8, 3, 1))
    result = right(model, images(), other=images(3))
    got = sizes(result)
    assert got["stem.weight"] == (4, 3, 3, 3) and got["up.weight"] == (16, 4, 1, 1) and got["head.weight"][1] == 4
    # Each channel leaves with all four of its pixels.
    gone = dict(result.report.removed["up.weight"])[0]
    assert torch.equal(gone % 4, torch.arange(4).repeat(4)) and len(set((gone // 4).tolist())) == 4


# --- convolutions ------------------------------------------------------------------------------------------------


def test_a_depthwise_multiplier() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.norm(m.depth(m.stem(x).relu())).relu())

    parts = dict(
        stem=nn.Conv2d(3, 8, 1), depth=nn.Conv2d(8, 24, 3, groups=8), norm=nn.BatchNorm2d(24), head=nn.Conv2d(24, 5, 1)
    )
    result = right(net(forward, **parts), images(), other=images(3), plan=channels(pattern="stem.weight"))
    got = sizes(result)
    assert got["stem.weight"] == (4, 3, 1, 1) and got["depth.weight"] == (12, 1, 3, 3)
    assert got["head.weight"] == (5, 12, 1, 1)
    gone = dict(result.report.removed["depth.weight"])[0]
    assert torch.equal(gone % 3, torch.arange(3).repeat(4))


def test_a_grouped_transposed_convolution() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.up(m.stem(x).relu()).relu())

    parts = dict(stem=nn.Conv2d(3, 16, 3), up=nn.ConvTranspose2d(16, 24, 2, 2, groups=4), head=nn.Conv2d(24, 5, 1))
    model = net(forward, **parts)
    got = sizes(right(model, images(), other=images(3), plan=channels(pattern="up.weight")))
    assert got["up.weight"] == (8, 6, 2, 2) and got["stem.weight"][0] == 8 and got["head.weight"][1] == 12
    got = sizes(right(model, images(), other=images(3), plan=channels(pattern="up.weight", unit="inner")))
    assert got["up.weight"] == (16, 3, 2, 2) and got["stem.weight"][0] == 16 and got["head.weight"][1] == 12


def test_bare_parameters_in_matmul_and_linear() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.linear((x @ m.first + m.shift).relu(), m.second) * m.scale
        return torch.einsum("bi,oi->bo", y, m.third)

    parts = dict(
        first=nn.Parameter(torch.empty(10, 32)),
        shift=nn.Parameter(torch.empty(32)),
        second=nn.Parameter(torch.empty(20, 32)),
        scale=nn.Parameter(torch.empty(20)),
        third=nn.Parameter(torch.empty(5, 20)),
    )
    got = sizes(right(net(forward, **parts), torch.randn(3, 10), other=torch.randn(1, 10)))
    assert got["first"] == (10, 16) and got["shift"] == (16,)
    assert got["second"] == (10, 16) and got["scale"] == (10,) and got["third"] == (5, 10)


# --- inputs, outputs, ties ---------------------------------------------------------------------------------------


def test_the_output_keeps_its_size() -> None:
    model = randomised(nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 12)))
    result = right(model, torch.randn(3, 10), other=torch.randn(1, 10))
    assert sizes(result)["2.weight"] == (12, 12) and result(torch.randn(3, 10)).shape == (3, 12)
    assert any("2.weight" in note and "graph output" in note for note in result.report.notes)


class Tied(nn.Module):
    """A language model whose head is its embedding, with residual branches and no norm on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.down(self.up(x).relu()))


def test_a_tied_head_stays_tied() -> None:
    model = randomised(Tied())
    tokens = torch.randint(40, (3, 7))
    result = right(model, tokens, other=torch.randint(40, (5, 7)))
    got = sizes(result)
    assert got["embedding.weight"] == (40, 16) and got["up.weight"] == (24, 16) and got["down.weight"] == (16, 24)
    assert result.head.weight is result.embedding.weight
    assert result.report.parameters == (40 * 32 + 2 * 32 * 48 + 80, 40 * 16 + 2 * 16 * 24 + 40)


def test_frozen_parameters_without_gradients() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return m.last(m.first(x).relu())

    model = net(forward, first=nn.Linear(10, 32), last=nn.Linear(32, 6)).requires_grad_(False)
    with torch.no_grad():
        result = right(model, torch.randn(3, 10), other=torch.randn(7, 10))
    assert sizes(result)["first.weight"] == (16, 10) and sizes(result)["last.weight"] == (6, 16)
    with torch.inference_mode():
        assert sizes(shrunk(model, torch.randn(3, 10)))["first.weight"] == (16, 10)


def test_a_dead_channel_with_a_bias() -> None:
    """Zeros in the weight do not make a channel nothing: its bias reaches what reads it."""
    model = randomised(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 6, 3)))
    with torch.no_grad():
        model[0].weight[[2, 3, 5, 7]] = 0
        model[0].bias[[2, 3, 5, 7]] = 2.0
        model[2].weight[:, [2, 3, 5, 7]] *= 3
    x, other = images(), images(5)
    for plan in (None, Plan([Rule("0.weight", fxprune.Existing())])):
        assert_close(shrunk(model, x, plan=plan)(other), model(other).detach())
    # By the norm over all members the loud readers keep these channels; where they go, they go with their biases.
    result = right(model, x, other=other, plan=channels(0.5, "0.weight"))
    assert not set(dict(result.report.removed["0.weight"])[0].tolist()) & {2, 3, 5, 7}
    with torch.no_grad():
        model[2].weight[:, [2, 3, 5, 7]] *= 0.1
        model[0].bias[[2, 3, 5, 7]] = 0.5
    result = right(model, x, other=other, plan=channels(0.25, "0.weight"))
    assert dict(result.report.removed["0.bias"])[0].tolist() == [2, 3, 5, 7]


def test_a_module_that_is_called_twice() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).relu()
        y = m.norm(m.shared(y)).relu()
        return m.head(m.norm(m.shared(y)) + m.shared(y))

    model = net(
        forward,
        stem=nn.Conv2d(3, 16, 1),
        shared=nn.Conv2d(16, 16, 3, padding=1),
        norm=nn.BatchNorm2d(16),
        head=nn.Conv2d(16, 4, 1),
    )
    result = right(model, images(), other=images(3))
    got = sizes(result)
    assert got["shared.weight"] == (8, 8, 3, 3) and got["stem.weight"][0] == got["head.weight"][1] == 8
    # One tensor along both its dimensions: the same indices.
    (_, rows), (_, columns) = result.report.removed["shared.weight"]
    assert torch.equal(rows, columns)


def test_one_module_under_two_names() -> None:
    shared = nn.Linear(24, 24)
    model = randomised(nn.Sequential(nn.Linear(10, 24), shared, nn.ReLU(), shared, nn.Linear(24, 3)))
    result = right(model, torch.randn(3, 10), other=torch.randn(4, 10))
    assert sizes(result)["1.weight"] == (12, 12)
    assert get(result, "1").weight is get(result, "3").weight


def get(result: Any, path: str) -> Any:
    return result.get_submodule(path)


# --- whole blocks ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def test_whole_blocks_leave() -> None:
    model = randomised(nn.Sequential(nn.Linear(10, 16), *(Block(16) for _ in range(4)), nn.Linear(16, 5)))
    plan = Plan([Drop("[13]"), Rule("*.up.weight", Channels(0.5, align=1))])
    x = torch.randn(3, 10)
    before = snapshot(model)
    result = shrunk(model, x, plan=plan)
    assert snapshot(model) == before
    oracle = zeroed(model, result)
    oracle[1], oracle[3] = nn.Identity(), nn.Identity()
    for call in (x, torch.randn(8, 10)):
        assert_close(result(call), oracle(call).detach())
    got = sizes(result)
    assert not [name for name in got if name.startswith(("1.", "3."))]
    assert got["2.up.weight"] == got["4.up.weight"] == (16, 16)
    each = sum(p.numel() for p in model[1].parameters())
    assert result.report.dropped == {"1": each, "3": each}
    left = sum(p.numel() for p in model.parameters()) - 2 * each - 2 * (16 * 16 + 16 + 16 * 16)
    assert result.report.parameters[1] == left


def test_whole_layers_of_an_encoder_leave() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True)
    model = randomised(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
    x = torch.randn(2, 6, 32)
    result = shrunk(model, x, plan=Plan([Drop("layers.1"), *HALF.rules]))
    oracle = zeroed(model, result)
    del oracle.layers[1]
    for call in (x, torch.randn(5, 6, 32)):
        assert_close(result(call), oracle(call).detach())
    got = sizes(result)
    assert got["layers.2.linear1.weight"] == (24, 32)
    assert not [name for name in got if name.startswith("layers.1.")]


# --- failure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["shrink_proved", "fold", "lower", "deliver"])
def test_the_model_is_untouched_when_a_stage_fails(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more memory")

    # The package's `transform` is the function; the module of this name stands behind it.
    monkeypatch.setattr(importlib.import_module("fxprune.transform"), stage, fail)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no more memory"):
        fxprune.transform(model, HALF, (images(),), options=EAGER, progress=False)
    assert snapshot(model) == before
    monkeypatch.undo()
    right(model, images(), other=images(5))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_without_a_batch(transposed: bool, groups: int) -> None:
    """One image [3, 9, 9], as a model that is fed by a camera takes it."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.second(m.first(x).relu()).relu().mean((1, 2)))

    parts = {"first": kind(3, 8, 3), "second": kind(8, 16, 3, groups=groups), "head": nn.Linear(16, 4)}
    result = right(net(forward, **parts), torch.randn(3, 9, 9))
    assert sizes(result)["first.bias"] == (4,) and sizes(result)["head.weight"] == (4, 8)
