"""Structured pruning through views, slices and sums whose sizes do not make it easy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxprune
from fxprune import Channels, Plan, Rule
from fxprune.errors import InputError
from tests.structured_oracle import HALF, channels, kept, net, randomised, right, shrunk, sizes


def folded(m: Any, x: Tensor, cut: Any) -> Tensor:
    """Attention-like code with heads folded into the batch, and something done to the folded tensor."""
    b, s, _ = x.shape
    h = m.q(x).view(b, s, 8, 8).transpose(1, 2).reshape(b * 8, s, 8)
    return m.o(cut(h).reshape(b, 8, s, 8).transpose(1, 2).reshape(b, s, 64))


@pytest.mark.parametrize("cut", [lambda h: h[:, :], lambda h: h[:], lambda h: h[:, None][:, 0]])
def test_a_whole_slice_of_folded_heads(cut: Any) -> None:
    """What is written as a slice to the end of a symbolic size must not become a slice to a number."""
    model = net(lambda m, x: folded(m, x, cut), q=nn.Linear(10, 64), o=nn.Linear(64, 4))
    got = sizes(right(model, torch.randn(2, 5, 10), other=torch.randn(7, 5, 10)))
    assert got["q.weight"] == (32, 10) and got["o.weight"] == (4, 32)


def test_positions_that_do_not_line_up_leave_heads_free() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.q(x).view(x.shape[0], 15, 8, 8)
        pairs = h[:, :10].reshape(x.shape[0], 2, 5, 8, 8).sum((1, 2))
        threes = h.view(x.shape[0], 3, 5, 8, 8).sum((1, 2))
        sixes = h[:, :12].reshape(x.shape[0], 6, 2, 8, 8).sum((1, 2))
        return m.o((pairs + threes + sixes + h.view(x.shape[0], 5, 3, 8, 8).sum((1, 2))).flatten(1))

    model = net(forward, q=nn.Linear(10, 64), o=nn.Linear(64, 4))
    result = right(model, torch.randn(2, 15, 10), other=torch.randn(7, 15, 10))
    assert sizes(result)["q.weight"] == (32, 10) and list(kept(result)) == ["q.weight[0].0"]


def test_a_squeeze_of_an_axis_that_one_index_is_left_of() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(m.a(x).mean((2, 3), keepdim=True).squeeze())

    model = net(forward, a=nn.Conv2d(3, 2, 3), o=nn.Linear(2, 4))
    x, other = torch.randn(3, 3, 6, 6), torch.randn(5, 3, 6, 6)
    # A batch of one is squeezed as well, which the shrunk squeeze does not do: there the group must stay whole.
    several = {"args": ({0: Dim("batch", min=3)},)}
    assert sizes(right(model, x, other=other, dynamic_shapes=several))["a.weight"] == (1, 3, 3, 3)
    result = shrunk(model, x)
    assert sizes(result)["a.weight"] == (2, 3, 3, 3) and result(x[:1]).shape == (4,)


def test_a_run_counted_from_the_end() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        return m.o(torch.narrow(h, 1, -8, 8)) + m.p(torch.narrow(h, 1, 0, 16))

    model = net(forward, a=nn.Linear(10, 24), o=nn.Linear(8, 4), p=nn.Linear(16, 4))
    got = sizes(right(model, torch.randn(3, 10), other=torch.randn(5, 10)))
    assert got["o.weight"] == (4, 4) and got["p.weight"] == (4, 8) and got["a.weight"] == (12, 10)


def test_a_letter_that_stands_twice_freezes_what_it_is_about() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        diagonal = torch.einsum("bii->b", m.a(x).view(-1, 4, 4))
        return m.o(m.h(x).relu()) + diagonal[:, None]

    model = net(forward, a=nn.Linear(10, 16), h=nn.Linear(10, 24), o=nn.Linear(24, 4))
    assert kept(right(model, torch.randn(3, 10), other=torch.randn(5, 10))) == {"h.weight[0]": 12}
    assert "stands twice" in fxprune.analyze(model, (torch.randn(3, 10),)).why("a.weight", 0)


@pytest.mark.slow
def test_concatenations_of_hundreds_of_layers() -> None:
    """Each layer reads all before it. Its parts stand in a row, not in a nest."""

    def forward(m: Any, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = torch.cat([x, layer(x[:, -8:]).relu()], 1)
        return m.o(x)

    count = 300
    model = net(forward, layers=nn.ModuleList(nn.Linear(8, 8) for _ in range(count)), o=nn.Linear(8 * count + 8, 2))
    coupling = fxprune.analyze(model, (torch.randn(3, 8),))
    assert len(coupling.axis("o.weight", 1).root().parts) == count + 1


# --- norms over a batch ------------------------------------------------------------------------------------------


def test_a_batch_norm_without_running_statistics() -> None:
    """In evaluation too it takes the statistics of its batch."""
    model = randomised(
        nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16, track_running_stats=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 4),
        )
    )
    got = sizes(right(model, torch.randn(4, 3, 6, 6), other=torch.randn(7, 3, 6, 6)))
    assert got["0.weight"] == (8, 3, 3, 3) and got["1.weight"] == (8,) and got["4.weight"] == (4, 128)


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised by a batch-norm of its own, as BiT and NFNets write it."""

    def __init__(self, i: int, o: int, groups: int = 1, gain: bool = False, how: str = "reshape_as") -> None:
        super().__init__(i, o, 3, padding=1, groups=groups)
        self.gain, self.how = nn.Parameter(torch.ones(o, 1, 1, 1)) if gain else None, how

    @property
    def effective(self) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = None if self.gain is None else self.gain.mul(0.5).view(-1)
        weight = nn.functional.batch_norm(rows, None, None, weight=gain, training=True)
        return weight.reshape_as(self.weight) if self.how == "reshape_as" else weight.view(self.weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(input, self.effective, self.bias, padding=1, groups=self.groups)


def standardised(gain: bool, how: str) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.b(m.a(x).relu()).relu()
        return m.o((x + m.c(x).relu()).mean((2, 3)))

    more: dict[str, Any] = {"gain": gain, "how": how}
    parts = {"a": Standardised(3, 16, **more), "b": Standardised(16, 24, **more), "c": Standardised(24, 24, 2, **more)}
    return net(forward, **parts, o=nn.Linear(24, 4))


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("how", ["reshape_as", "view"])
def test_standardised_weights_lose_rows_and_keep_their_statistics(gain: bool, how: str) -> None:
    """A statistic over a whole weight stays one as it trains: what leaves is taken off behind it."""
    model = standardised(gain, how)
    result = right(model, torch.randn(2, 3, 6, 6), other=torch.randn(5, 3, 6, 6), trainable=True)
    # Of two groups of channels one leaves.
    assert kept(result) == {"a.weight[0]": 8, "b.weight[0].0": 1}
    assert dict(result.report.removed["b.weight"]).keys() == {0}
    assert dict(result.report.removed["o.weight"]).keys() == {1}


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("how", ["reshape_as", "view"])
def test_standardised_weights_shrink_as_what_they_come_to(gain: bool, how: str) -> None:
    model, twin = standardised(gain, how), standardised(gain, how)
    twin.load_state_dict(model.state_dict())
    for layer in (twin.a, twin.b, twin.c):
        layer.weight, layer.forward = nn.Parameter(layer.effective.detach()), super(Standardised, layer).forward
    result, expected = (shrunk(m, torch.randn(2, 3, 6, 6), plan=HALF) for m in (model, twin))
    assert kept(result) == kept(expected) and sizes(result) == sizes(expected)
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(result(x), expected(x), rtol=1e-4, atol=1e-4)
    assert kept(result).keys() == {"a.weight[0]", "b.weight[0].0"}
    assert dict(result.report.removed["b.weight"]).keys() == {0, 1}


def test_a_dropout_that_is_always_on_is_refused_in_words_that_help() -> None:
    model = net(lambda m, x: m.a(nn.functional.dropout(x)), a=nn.Linear(10, 4))
    with pytest.raises(InputError, match=r"F\.dropout itself"):
        shrunk(model, torch.randn(3, 10))


# --- head width --------------------------------------------------------------------------------------------------


def normed(m: Any, x: Tensor) -> Tensor:
    b, s, _ = x.shape
    q, k, v = (y.view(b, s, 4, 8).transpose(1, 2) for y in (m.q(x), m.k(x), m.v(x)))
    y = nn.functional.scaled_dot_product_attention(m.norm(q), m.norm(k), v)
    return m.o(y.transpose(1, 2).reshape(b, s, 32))


def test_who_asks_for_head_width_does_not_get_heads() -> None:
    """The width of q and k stands under a norm, so only that of v may leave without a request."""
    parts = {name: nn.Linear(10, 32) for name in "qkv"}
    model = net(normed, **parts, o=nn.Linear(32, 4), norm=nn.LayerNorm(8))
    x = torch.randn(2, 5, 10)
    result = right(model, x, plan=channels(0.5, unit="inner"), other=torch.randn(3, 5, 10))
    assert list(kept(result)) == ["v.weight[0].1"] and sizes(result)["q.weight"] == (32, 10)
    assert any("q.weight" in note and 'unit="mixed" asks for it' in note for note in result.report.notes)
    whole = right(model, x, plan=Plan([Rule("*", Channels(0.5, align=1))]), other=torch.randn(3, 5, 10))
    assert sizes(whole)["q.weight"] == sizes(whole)["v.weight"] == (16, 10)


# --- tensors that the model does not own -------------------------------------------------------------------------


def test_a_tensor_written_out_in_the_code_is_cut_and_not_reported() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])[:, None]
        return m.o((m.q(x).view(-1, 8, 8) * scale).flatten(1))

    model = net(forward, q=nn.Linear(10, 64), o=nn.Linear(64, 4))
    result = right(model, torch.randn(3, 10), other=torch.randn(5, 10))
    assert sizes(result)["q.weight"] == (32, 10)
    assert set(result.report.removed) == {"q.weight", "q.bias", "o.weight"}
