"""Exact removal through the patterns of real networks: residuals, concatenations, groups, attention, pools."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.shrink.dead_oracle import image, removed, routes, sequence, shapes, shuffled, zero
from tests.structured_oracle import randomised, shrunk


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a(torch.relu(x))
        x = x + self.b(torch.relu(x))
        return self.head(x)


def test_a_channel_of_a_residual_leaves_where_all_that_write_to_it_are_constant():
    model = shuffled(Residual())
    zero(model.stem.weight, out=[0, 1, 2])
    zero(model.a.weight, out=[0, 1, 3])
    zero(model.b.weight, out=[0, 1, 4])
    result = removed(model, image())
    assert shapes(result)["stem.weight"][0] == shapes(result)["head.weight"][1] == 6
    rows = {row.name: row for row in result.report.dead.slices}
    assert rows["stem.weight"].left == 2
    assert rows["stem.weight"].why == "b.weight reads it, and it is not known to be the same for every input"


class Dense(nn.Module):
    """Two layers whose outputs are joined to what they read, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(9, 6, 1)
        self.norm, self.head = nn.BatchNorm2d(15), nn.Conv2d(15, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.first(x)], 1)
        x = torch.cat([x, torch.sigmoid(self.second(F.relu(x)))], 1)
        return self.head(F.relu(self.norm(x)))


def test_concatenations():
    model = shuffled(Dense())
    zero(model.first.weight, out=[0, 2, 4])
    zero(model.second.weight, out=[1, 3])
    result = removed(model, image())
    sizes = shapes(result)
    assert sizes["first.weight"][0] == 3
    assert sizes["second.weight"][:2] == (4, 6)
    assert sizes["head.weight"][1] == 10


def test_depthwise_kernels_and_inverted_residuals():
    model = shuffled(
        nn.Sequential(
            nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU6(), nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.BatchNorm2d(12), nn.ReLU6(), nn.Conv2d(12, 4, 1),
        )
    )  # fmt: skip
    zero(model[0].weight, out=[0, 1])
    zero(model[3].weight, out=[1, 2, 3])
    result = removed(model, image())
    assert shapes(result)["0.weight"][0] == 8
    assert shapes(result)["3.weight"][0] == 8
    # Where the depthwise kernel pads a constant, one differs at the border.
    assert sum(routes(result).values()) == 4
    assert routes(result)["constant into a map"] > 0


def test_grouped_convolutions_lose_what_every_group_can_spare():
    model = shuffled(nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1, groups=4), nn.Conv2d(8, 2, 1)))
    zero(model[0].weight, out=[0, 3, 6, 9, 1])
    zero(model[3].weight, into=[6, 7])
    result = removed(model, image())
    # Index 0 of each group of three, and the last group as a whole.
    assert shapes(result)["0.weight"][0] == 6
    assert shapes(result)["2.weight"] == (6, 2, 1, 1)


def test_transposed_convolutions():
    model = shuffled(
        nn.Sequential(nn.ConvTranspose2d(3, 8, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2))
    )
    with torch.no_grad():
        model[0].weight[:, [1, 5]] = 0
        model[2].weight[[0, 2]] = 0
    result = removed(model, image(side=5))
    assert shapes(result)["0.weight"][1] == 4
    assert shapes(result)["2.weight"][0] == 4


class Attention(nn.Module):
    def __init__(self, heads: int = 4, each: int = 6) -> None:
        super().__init__()
        self.heads, self.each = heads, each
        width = heads * each
        self.q, self.k, self.v = nn.Linear(10, width), nn.Linear(10, width), nn.Linear(10, width)
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, self.each).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, self.heads * self.each))


def test_a_head_whose_values_are_constant_leaves_with_its_queries_and_keys():
    model = shuffled(Attention())
    zero(model.v.weight, out=range(6, 12))
    result = removed(model, sequence())
    assert shapes(result)["q.weight"] == shapes(result)["v.weight"] == (18, 10)
    assert shapes(result)["out.weight"] == (10, 18)


def test_a_head_that_nobody_reads_leaves():
    model = shuffled(Attention())
    zero(model.out.weight, into=range(12))
    result = removed(model, sequence())
    assert shapes(result)["k.weight"] == (12, 10)


def test_widths_of_heads_leave_where_scores_do_not_need_them():
    model = shuffled(Attention())
    width = torch.arange(24).view(4, 6)
    zero(model.q.weight, out=width[:, 0].tolist())
    zero(model.k.weight, out=width[:, 1].tolist())
    with torch.no_grad():
        model.q.bias[width[:, 0]] = 0
    result = removed(model, sequence())
    # A query of zero adds nothing to any score; a constant key does.
    assert shapes(result)["q.weight"] == shapes(result)["k.weight"] == (20, 10)
    row = next(row for row in result.report.dead.slices if row.name == "k.weight")
    assert "the scores of attention, where it is not zero" in row.why


class Pooled(nn.Module):
    """Constants through what moves, pools, pads and resizes them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.conv(x).sigmoid(), 2, padding=1)
        x = F.interpolate(F.pad(x, (1, 0, 0, 1), value=0.25), scale_factor=2)
        x = F.hardtanh(F.max_pool2d(x * 0.5 + 1, 3, 2)).permute(0, 2, 3, 1)
        return self.last(F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 3).flatten(1))


def test_constants_go_through_pools_pads_and_views():
    model = shuffled(Pooled())
    zero(model.conv.weight, out=[0, 3, 7])
    result = removed(model, image())
    assert shapes(result)["conv.weight"][0] == 5
    assert shapes(result)["last.weight"] == (4, 45)


class Token(nn.Module):
    """A row that is the same for every input stands before rows that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.inner, self.outer = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(10, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat([self.token.expand(x.shape[0], -1, -1), self.inner(x)], 1)
        return self.outer(torch.sigmoid(rows))


def test_a_channel_that_is_known_in_one_row_alone_is_not_dead():
    model = shuffled(Token(), seed=1)
    zero(model.inner.weight, out=[1, 2])
    result = removed(model, sequence())
    assert shapes(result)["outer.weight"] == (4, 6) and routes(result) == {"constant into a map": 2}
    assert not any("keeps all its indices" in note for note in result.report.notes)


PASSING: dict[str, Callable[[], nn.Module]] = {
    "prelu": lambda: nn.PReLU(8),
    "prelu of one slope": nn.PReLU,
    "instance norm": lambda: nn.InstanceNorm2d(8),
    "instance norm, affine": lambda: nn.InstanceNorm2d(8, affine=True),
    "adaptive max pool": lambda: nn.AdaptiveMaxPool2d(4),
    "bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
}


@pytest.mark.parametrize("name", PASSING)
def test_constant_channels_pass(name: str) -> None:
    conv, last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
    with torch.no_grad():
        conv.weight[:6] = 0
    model = randomised(nn.Sequential(conv, PASSING[name](), last))
    with torch.no_grad():
        conv.weight[:6] = 0
    x = torch.randn(2, 3, 12, 12)
    result = shrunk(model, x, plan=None, options={"align": 1})
    assert result.get_parameter("2.weight").shape[1] == 2
    for batch in (1, 3):
        x = torch.randn(batch, 3, 12, 12)
        torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-4)


class Turned(nn.Module):
    """Channels seen as a square and turned: each belongs to two indices of one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.where(x > 0, x.unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-2), x))


def test_a_channel_that_belongs_to_two_indices_dies_with_neither_alone():
    model = shuffled(Turned())
    zero(model.first.weight, out=[0])
    result = removed(model, torch.randn(3, 12))
    assert not any("keeps all its indices" in note for note in result.report.notes)
    assert result.report.dead.slices[0].why == "a sum runs over two factors that are one axis"
