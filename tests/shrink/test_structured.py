"""What Channels can be asked: norms, dimensions, units, alignment, amounts, scopes and rules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import Channels, Plan, Rule
from tests.oracle import TOLERANCE, assert_close
from tests.structured_oracle import (
    assert_shrunk,
    channels,
    kept,
    mlp,
    randomised,
    relative,
    removed,
    right,
    shrunk,
    sizes,
    zeroed,
)

X = torch.randn(5, 10, generator=torch.Generator().manual_seed(7))
OTHER = torch.randn(2, 10, generator=torch.Generator().manual_seed(8))


# --- scores ------------------------------------------------------------------------------------------------------


def slice_norms(model: Any, norm: float) -> Tensor:
    """The Lp norm of each hidden unit in each member of the group of mlp(10, 48, 6): [members, 48]."""
    members = [model[0].weight, model[0].bias[:, None], model[2].weight.T]
    return torch.stack([m.detach().double().abs().norm(norm, dim=1) for m in members])


@pytest.mark.parametrize("norm", [1, 2, 3.5, math.inf])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_the_lowest_norms_leave(norm: float, reduce: str) -> None:
    model = mlp(10, 48, 6)
    norms = slice_norms(model, norm)
    scores = norms.amax(0) if reduce == "max" else norms.sum(0)
    result = right(model, X, plan=channels(0.5, "0.weight", norm=norm, reduce=reduce), other=OTHER)
    assert removed(result, "0.weight") == sorted(scores.argsort()[:24].tolist())


def test_norms_and_reductions_choose_differently() -> None:
    """So that the test above can tell them apart."""
    norms = [slice_norms(mlp(10, 48, 6), p) for p in (1, 2, math.inf)]
    one, two, most = ([set(scores.argsort()[:24].tolist()) for scores in (n.sum(0), n.amax(0))] for n in norms)
    assert one[0] != two[0] != most[0] != one[0]
    assert one[0] != one[1] and two[0] != two[1] and most[0] != most[1]


def test_ties_go_to_the_lowest_index() -> None:
    model = mlp(10, 24, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    assert removed(shrunk(model, X, plan=channels(0.25)), "0.weight") == list(range(6))
    with torch.no_grad():
        model[0].weight[[3, 9]] *= 0.5
        model[0].weight[[20, 1]] *= 2
    assert removed(shrunk(model, X, plan=channels(0.25)), "0.weight") == [0, 2, 3, 4, 5, 9]


# --- dimensions and units ----------------------------------------------------------------------------------------


def test_dimensions_by_number() -> None:
    model = mlp(10, 24, 16, 6)
    by_default = right(model, X, plan=channels(0.5, "0.weight"), other=OTHER)
    for pattern, dim in (("0.weight", 0), ("0.weight", -2), ("2.weight", 1), ("2.weight", -1)):
        result = right(model, X, plan=channels(0.5, pattern, dim=dim), other=OTHER)
        assert removed(result, "0.weight") == removed(by_default, "0.weight") == removed(result, "2.weight", 1)
        assert kept(result) == {"0.weight[0]": 12}
    assert kept(shrunk(model, X, plan=channels(0.5, "*", dim=1))) == {"0.weight[0]": 12, "2.weight[0]": 8}


def test_the_output_dimension_is_that_of_the_op() -> None:
    """A transposed convolution makes dim 1 of its weight, an embedding and x @ weight the last."""
    model = randomised(nn.Sequential(nn.ConvTranspose2d(3, 16, 2), nn.ReLU(), nn.Conv2d(16, 4, 1)))
    result = right(model, torch.randn(2, 3, 5, 5), plan=channels(0.5, "0.weight"), other=torch.randn(4, 3, 5, 5))
    assert sizes(result)["0.weight"] == (3, 8, 2, 2)
    model = randomised(nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 4)))
    result = right(model, torch.randint(30, (3, 5)), plan=channels(0.5, "0.weight"), other=torch.randint(30, (2, 5)))
    assert sizes(result)["0.weight"] == (30, 8)


class Heads(nn.Module):
    """Attention of 4 heads of 6, between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(10, 24) for _ in range(3))
        self.o = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 6)).transpose(-2, -3) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


def test_outer_and_inner_units() -> None:
    model, x, other = randomised(Heads()), torch.randn(2, 7, 10), torch.randn(5, 7, 10)
    whole = right(model, x, plan=channels(0.5, "q.weight"), other=other)
    assert all(sizes(whole)[f"{name}.weight"] == (12, 10) for name in "qkv")
    assert len({i // 6 for i in removed(whole, "q.weight")}) == 2
    width = right(model, x, plan=channels(0.5, "q.weight", unit="inner"), other=other)
    assert sizes(width)["q.weight"] == sizes(width)["k.weight"] == (12, 10) and sizes(width)["v.weight"] == (24, 10)
    assert torch.bincount(torch.tensor(removed(width, "q.weight")) // 6).tolist() == [3, 3, 3, 3]
    values = right(model, x, plan=channels(0.5, "v.weight", unit="inner"), other=other)
    assert sizes(values)["v.weight"] == (12, 10) and sizes(values)["o.weight"] == (5, 12)


class Residual(nn.Module):
    """A residual stream of `width` under norms, between a stem and a head: the same class at every width."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(10, width), nn.Linear(width, 5)
        self.norm, self.last = norm(width), norm(width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.down(self.up(self.norm(y)).relu())
        return self.head(self.last(y))


def by_hand(model: nn.Module, small: nn.Module, result: Any) -> nn.Module:
    """`small`, the same network written at the pruned sizes, with what is kept of the model's tensors."""
    state = {}
    for name, tensor in model.state_dict().items():
        for dim, gone in result.report.removed.get(name, []):
            stays = [i for i in range(tensor.shape[dim]) if i not in set(gone.tolist())]
            tensor = tensor.index_select(dim, torch.tensor(stays))
        state[name] = tensor
    small.load_state_dict(state)
    return small.eval()


def bare_norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, elementwise_affine=False)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, bare_norm])
def test_a_residual_width_on_request(norm: Any) -> None:
    model = randomised(Residual(32, norm))
    assert kept(right(model, X, other=OTHER)) == {"up.weight[0]": 12}
    result = shrunk(model, X, plan=channels(0.5, "stem.weight", unit="mixed"))
    assert kept(result) == {"stem.weight[0]": 16}
    small = by_hand(model, Residual(16, norm), result)
    assert_shrunk(result, model, X, OTHER, oracle=small)
    # The statistic runs over what is kept: with zeros in the stream it would not be the same network.
    assert relative(zeroed(model, result)(X), small(X)) > 100 * TOLERANCE
    assert sum(p.numel() for p in result.parameters()) == sum(p.numel() for p in small.parameters())


def test_width_and_inner_layer_together() -> None:
    model = randomised(Residual(32, nn.LayerNorm))
    both = Plan([Rule("up.weight", Channels(0.5, align=1)), Rule("stem.weight", Channels(0.25, align=1, unit="mixed"))])
    result = shrunk(model, X, plan=both)
    assert kept(result) == {"stem.weight[0]": 24, "up.weight[0]": 12}

    small = Residual(24, nn.LayerNorm)
    small.up, small.down = nn.Linear(24, 12), nn.Linear(12, 24)
    assert_shrunk(result, model, X, OTHER, oracle=by_hand(model, small, result))


class Grouped(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3), nn.GroupNorm(groups, width)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)).relu())


def test_groups_of_a_group_norm_and_channels_in_them() -> None:
    model, x, other = randomised(Grouped(24, 4)), torch.randn(2, 3, 6, 6), torch.randn(5, 3, 6, 6)
    whole = right(model, x, plan=channels(0.5, "stem.weight"), other=other)
    assert sizes(whole)["stem.weight"] == (12, 3, 3, 3) and len({i // 6 for i in removed(whole, "stem.weight")}) == 2
    assert_close(whole(other), by_hand(model, Grouped(12, 2), whole)(other).detach())
    inside = shrunk(model, x, plan=channels(0.5, "stem.weight", unit="mixed"))
    assert torch.bincount(torch.tensor(removed(inside, "stem.weight")) // 6).tolist() == [3, 3, 3, 3]
    assert_shrunk(inside, model, x, other, oracle=by_hand(model, Grouped(12, 4), inside))


# --- how many ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "how", "stays"),
    [
        (48, {"amount": 0.3}, 32),  # 34 at the nearest multiple of 8
        (48, {"amount": 0.3, "align": 1}, 34),
        (48, {"amount": 0.3, "align": 4}, 36),  # half-way goes up
        (48, {"amount": 5}, 40),
        (48, {"amount": 5, "align": 1}, 43),
        (48, {"amount": 0.9}, 8),  # one multiple at the least
        (48, {"amount": 0.99, "align": 1}, 1),
        (48, {"amount": 0.99, "align": 1, "min_keep": 5}, 5),
        (48, {"amount": 0.99, "min_keep": 9}, 16),
        (6, {"amount": 0.5}, 3),  # smaller than a multiple: not aligned
        (48, {"amount": 0.5, "align": 64}, 24),
        (25, {"amount": 0.5, "align": 1}, 13),  # 12.5 rounds to even
    ],
)
def test_how_many_stay(size: int, how: dict[str, Any], stays: int) -> None:
    model = mlp(10, size, 6)
    result = right(model, X, plan=Plan([Rule("0.weight", Channels(**how))]), other=OTHER)
    assert kept(result) == {"0.weight[0]": stays} and sizes(result)["2.weight"] == (6, stays)
    (row,) = [g for g in result.report.groups if g.asked is not None]
    amount = how["amount"]
    exact = amount / size if isinstance(amount, int) else round(amount * size) / size
    assert (row.size, row.kept, row.members) == (size, stays, 3) and row.asked == pytest.approx(exact)


def test_one_is_one_unit() -> None:
    assert kept(shrunk(mlp(10, 48, 6), X, plan=channels(1))) == {"0.weight[0]": 47}


def test_alignment_counts_the_width_of_a_unit() -> None:
    """Heads of 6: four of them make a multiple of 8."""
    model, x = randomised(Heads()), torch.randn(2, 7, 10)
    result = shrunk(model, x, plan=channels(0.5, "q.weight", align=8))
    assert "q.weight" not in result.report.removed
    assert sizes(right(model, x, plan=channels(0.5, "q.weight", align=4)))["q.weight"] == (12, 10)


# --- scopes ------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Branches that share no tensor: up and down of each are one group."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(10, width) for width in widths)
        self.down = nn.ModuleList(nn.Linear(width, 6, bias=False) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        return sum(down(up(x).relu()) for up, down in zip(self.up, self.down))  # pyright: ignore


def branches(*widths: int) -> Any:
    return randomised(Branches(*widths))


@torch.no_grad()
def scale(model: Any, branch: int, factor: float, units: int | None = None) -> Any:
    """Every member of a branch's group, or of its first units, times a power of two, which is exact."""
    model.up[branch].weight[:units] *= factor
    model.up[branch].bias[:units] *= factor
    model.down[branch].weight[:, :units] *= factor
    return model


def left(result: Any) -> list[int]:
    return [shape[0] for name, shape in sizes(result).items() if name.startswith("up") and name.endswith("weight")]


def test_a_local_scope_takes_the_amount_from_each_group() -> None:
    model = scale(branches(32, 16), 0, 1 / 64)
    assert left(right(model, X, plan=channels(0.5, "up.*"), other=OTHER)) == [16, 8]


def test_a_global_scope_takes_it_from_the_groups_with_the_faintest_units() -> None:
    model = scale(branches(32, 32), 0, 1 / 64, units=24)
    result = right(model, X, plan=channels(0.5, "up.*", scope="global"), other=OTHER)
    assert sum(left(result)) == 32 and left(result)[0] < 12
    assert set(range(24)) <= set(removed(result, "up.0.weight"))


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_the_scale_of_a_group_says_nothing_about_its_units(scope: str) -> None:
    model = scale(branches(32, 32, 32), 1, 1 / 4, units=10)
    louder = scale(copy.deepcopy(model), 0, 128.0)
    one, other = (shrunk(m, X, plan=channels(0.5, "up.*", scope=scope)) for m in (model, louder))
    assert sum(left(one)) == 48 and len(set(left(one))) > 1
    assert {n: removed(one, n) for n in one.report.removed} == {n: removed(other, n) for n in other.report.removed}
    assert_shrunk(other, louder, X, OTHER)


def test_an_isomorphic_scope_pools_groups_of_one_shape() -> None:
    model = scale(branches(32, 48, 32), 0, 1 / 64, units=20)
    result = right(model, X, plan=channels(0.5, "up.*", scope="isomorphic"), other=OTHER)
    first, second, third = left(result)
    assert second == 24 and first + third == 32 and first < third
    everywhere = left(right(model, X, plan=channels(0.5, "up.*", scope="global"), other=OTHER))
    assert sum(everywhere) == 56 and everywhere[1] > 24


def test_uniform_groups_of_one_shape_keep_the_same_number_that_the_pool_left_them() -> None:
    model = scale(branches(32, 48, 32), 0, 1 / 64, units=20)
    uneven = left(right(model, X, plan=channels(0.5, "up.*", scope="global"), other=OTHER))
    first, second, third = left(right(model, X, plan=channels(0.5, "up.*", scope="global", uniform=True), other=OTHER))
    assert uneven[0] != uneven[2] and first == third == round((uneven[0] + uneven[2]) / 2) and second == uneven[1]
    aligned = left(right(model, X, plan=channels(0.5, "up.*", scope="global", uniform=True, align=8), other=OTHER))
    assert aligned[0] == aligned[2] and not any(width % 8 for width in aligned)


@pytest.mark.parametrize("scope", ["local", "isomorphic"])
def test_uniform_is_nothing_new_where_each_shape_has_its_amount(scope: str) -> None:
    model = branches(32, 48, 32)
    assert left(shrunk(model, X, plan=channels(0.5, "up.*", scope=scope, uniform=True))) == [16, 24, 16]


def test_a_pool_counts_in_units_and_keeps_some_of_each_group() -> None:
    model = scale(branches(32, 32), 0, 1 / 64, units=31)
    assert sum(left(shrunk(model, X, plan=channels(11, "up.*", scope="global")))) == 53
    result = right(model, X, plan=channels(0.9, "up.*", scope="global", min_keep=5), other=OTHER)
    assert left(result) == [5, 5]


# --- rules -------------------------------------------------------------------------------------------------------


def test_a_later_rule_wins() -> None:
    model = mlp(10, 32, 24, 16, 6)
    rules = [Rule("*", Channels(0.5, align=1)), Rule("2.*", Channels(0.25, align=1))]
    result = right(model, X, plan=Plan(rules), other=OTHER)
    assert kept(result) == {"0.weight[0]": 16, "2.weight[0]": 18, "4.weight[0]": 8}
    assert any("2.weight: rule 1 replaces rule 0" in note for note in result.report.notes)
    result = right(model, X, plan=Plan(rules[::-1]), other=OTHER)
    assert kept(result) == {"0.weight[0]": 16, "2.weight[0]": 12, "4.weight[0]": 8}


def test_what_is_excluded_stays() -> None:
    model = mlp(10, 32, 24, 6)
    result = right(model, X, plan=Plan([Rule("*", Channels(0.5, align=1))], exclude=["2.*"]), other=OTHER)
    assert kept(result) == {"0.weight[0]": 16}
    assert any("2.weight: excluded from rule 0" in note for note in result.report.notes)


def test_a_plan_from_json_does_the_same() -> None:
    model = branches(32, 32)
    rules = Plan([Rule("up.*", Channels(0.4, norm=math.inf, reduce="max", align=4, min_keep=2), scope="global")])
    one, other = (shrunk(model, X, plan=p) for p in (rules, Plan.from_json(rules.to_json())))
    assert kept(one) == kept(other) and torch.equal(one(X), other(X))


def test_nothing_asked_is_nothing_done() -> None:
    model = mlp(10, 32, 6)
    for amount in (0, 0.0):
        result = shrunk(model, X, plan=channels(amount, align=8))
        assert kept(result) == {} and result.report.removed == {}
        assert result.report.parameters[0] == result.report.parameters[1]
        assert_close(result(OTHER), model(OTHER).detach())
