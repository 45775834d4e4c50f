"""Exact removal: what masks made zero, constant or unread leaves, and the function stays what it was."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fxprune
from fxprune import Channels, Plan, Rule
from fxprune.emit import trial
from fxprune.measure.model_timing import ModelTiming
from fxprune.measure.timing import Samples
from fxprune.shrink.dead import dead as dead_pass
from tests.shrink.dead_oracle import QUIET, image, removed, routes, sequence, shapes, shuffled, vectors, zero


def test_the_constant_of_a_dead_neuron_goes_into_the_next_bias():
    model = shuffled(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 5)))
    prune.ln_structured(model[0], "weight", amount=6, n=2, dim=0)
    result = removed(model, vectors())
    assert shapes(result)["0.weight"] == (14, 12)
    assert shapes(result)["2.weight"] == (5, 14)
    assert routes(result) == {"constant into a bias": 6}
    assert "6 into" not in str(result.report)
    assert "6 channels left without a trace: 6 constant into a bias" in str(result.report)


def test_a_layer_without_a_bias_gets_one():
    model = shuffled(nn.Sequential(nn.Linear(12, 20), nn.Sigmoid(), nn.Linear(20, 5, bias=False)))
    zero(model[0].weight, out=range(10))
    result = removed(model, vectors())
    assert shapes(result) == {"0.weight": (10, 12), "0.bias": (10,), "2.weight": (5, 10), "2.bias": (5,)}


def test_zeros_need_nothing_in_their_place():
    model = shuffled(nn.Sequential(nn.Linear(12, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False)))
    zero(model[0].weight, out=range(10))
    result = removed(model, vectors())
    assert shapes(result) == {"0.weight": (10, 12), "2.weight": (5, 10)}
    assert routes(result) == {"zero": 10}


def test_what_nobody_reads_goes_and_so_does_what_only_it_read():
    model = shuffled(
        nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 4))
    )
    zero(model[5].weight, into=range(8))
    # Only the last layer's dead inputs read these.
    zero(model[4].weight[8:], into=range(4))
    zero(model[2].weight[4:], into=range(2, 16))
    result = removed(model, vectors())
    assert shapes(result)["4.weight"] == (8, 12)
    assert shapes(result)["2.weight"] == (12, 2)
    assert shapes(result)["0.weight"] == (2, 12)
    assert routes(result) == {"read by nothing": 26}


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("inplace", [False, True])
def test_convolutions_with_batch_norm(padding: int, dim: int, inplace: bool):
    model = shuffled(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=padding), nn.BatchNorm2d(8), nn.ReLU(inplace),
            nn.Conv2d(8, 12, 3, padding=padding, bias=False), nn.BatchNorm2d(12), nn.SiLU(inplace), nn.MaxPool2d(2),
            nn.Conv2d(12, 8, 1), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )
    )  # fmt: skip
    for at in (3, 7) if dim else (0, 3, 7):
        prune.ln_structured(model[at], "weight", amount=0.5, n=2, dim=dim)
    result = removed(model, image())
    sizes = shapes(result)
    if dim == 0:
        assert [sizes[f"{at}.weight"][:2] for at in (0, 3, 7)] == [(4, 3), (6, 4), (4, 6)]
        assert ("constant into a map" in routes(result)) == bool(padding)
    else:
        assert [sizes[f"{at}.weight"][:2] for at in (0, 3, 7)] == [(4, 3), (6, 4), (8, 6)]
        assert routes(result) == {"read by nothing": 10}
    # Batch-norms are folded all the same.
    ops = [str(node.target) for node in result.graph.nodes if node.op == "call_function"]
    assert not any("batch_norm" in op for op in ops)


def test_the_width_under_a_layer_norm_stays():
    model = shuffled(nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 4)))
    zero(model[0].weight, out=range(8))
    result = removed(model, vectors())
    assert shapes(result)["0.weight"] == (16, 12)
    assert "a statistic runs over it" in result.report.dead.slices[0].why


def test_what_the_model_returns_stays():
    model = shuffled(nn.Sequential(nn.Linear(12, 16), nn.ReLU()))
    zero(model[0].weight, out=range(8))
    result = removed(model, vectors())
    assert shapes(result)["0.weight"] == (16, 12)
    assert "graph output" in result.report.dead.slices[0].why


def test_a_scale_of_zero_makes_a_channel_constant():
    model = shuffled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    with torch.no_grad():
        model[1].weight[:5] = 0
    zero(model[0].weight, out=[7])
    result = removed(model, image())
    assert shapes(result)["0.weight"][0] == 2


def test_one_index_stays_of_a_layer_that_is_dead_throughout():
    model = shuffled(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)))
    zero(model[0].weight, out=range(8))
    result = removed(model, vectors())
    assert shapes(result)["0.weight"] == (1, 12)


class Twice(nn.Module):
    """One layer called for two inputs that have other constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(self.a(x))) * self.shared(torch.relu(self.b(x)))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_called_twice_has_a_constant_for_each_call(bias: bool):
    model = shuffled(Twice())
    if not bias:
        model.shared.bias = None
    zero(model.a.weight, out=range(4))
    zero(model.b.weight, out=range(2, 6))
    result = removed(model, vectors())
    assert shapes(result)["shared.weight"] == (4, 6)


def test_a_bias_shared_by_two_layers_is_not_changed_for_the_other():
    model = shuffled(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    model[4].bias = model[2].bias
    zero(model[0].weight, out=range(4))
    removed(model, vectors())


class Positions(nn.Module):
    """A constant that differs by position: it is added as a map."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.places, self.outer = nn.Linear(10, 8), nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.sigmoid(self.inner(x) + self.places))


def test_constants_that_differ_by_position_become_a_map():
    model = shuffled(Positions())
    zero(model.inner.weight, out=[1, 2])
    result = removed(model, sequence())
    assert shapes(result)["inner.weight"] == (6, 10)
    assert routes(result) == {"constant into a map": 2}
    assert result.report.dead.map_elements == 5 * 4


def test_positions_of_a_dynamic_length_stay():
    class Sliced(Positions):
        def forward(self, x: Tensor) -> Tensor:
            return self.outer(torch.sigmoid(self.inner(x) + self.places[: x.shape[1]]))

    model = shuffled(Sliced())
    zero(model.inner.weight, out=[1, 2])
    x = torch.randn(2, 4, 10)
    shapes_ = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim("length", min=1, max=5)},)
    result = removed(model, x, dynamic_shapes=shapes_)
    assert shapes(result)["inner.weight"] == (8, 10)
    with torch.no_grad():
        for length in (1, 3, 5):
            x = torch.randn(2, length, 10)
            assert torch.allclose(result(x), model(x), rtol=0, atol=1e-5 * float(model(x).abs().max()))


class Written(nn.Module):
    """A value read before and after it is overwritten in place through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        first = self.outer(y)
        y[:, :4].mul_(x[:, :4])
        return first + self.outer(y)


def test_a_constant_that_is_overwritten_is_none():
    model = shuffled(Written())
    zero(model.inner.weight, out=[0, 1, 6])
    result = removed(model, vectors())
    with torch.no_grad():
        x = vectors() * 2
        assert torch.allclose(result(x), model(x), atol=1e-4)


def test_half_types():
    for dtype in (torch.float16, torch.bfloat16):
        model = shuffled(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 5))).to(dtype)
        zero(model[0].weight, out=range(10))
        result = removed(model, vectors().to(dtype), tolerance=16 * torch.finfo(dtype).eps)
        assert shapes(result)["0.weight"] == (10, 12)
        assert result.get_parameter("2.bias").dtype == dtype


def test_elements_that_are_masked_beside_dead_channels_stay_masked():
    model = shuffled(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)))
    prune.ln_structured(model[0], "weight", amount=5, n=2, dim=0)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    result = removed(model, vectors())
    assert shapes(result)["0.weight"] == (15, 12)
    assert int((result.get_parameter("0.weight") == 0).sum()) == 90
    assert result.report["0.weight"].reached == 0.5


def test_channels_that_were_asked_for_and_dead_ones_leave_together():
    model = shuffled(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 5)))
    zero(model[0].weight, out=range(10))
    plan = Plan([Rule("2.weight", Channels(0.5, align=1))])
    result = fxprune.transform(model, plan, (vectors(),), options={**QUIET, "align": 1}, progress=False)
    assert shapes(result) == {
        "0.weight": (10, 12), "0.bias": (10,), "2.weight": (12, 10), "2.bias": (12,),
        "4.weight": (5, 12), "4.bias": (5,)
    }  # fmt: skip
    oracle = copy.deepcopy(model)
    gone = sorted(set(range(24)) - set(result.selection.keep["2.weight[0]"].tolist()))
    zero(oracle[2].weight, out=gone)
    with torch.no_grad():
        oracle[2].bias[gone] = 0
        assert torch.allclose(result(vectors()), oracle(vectors()), atol=1e-5)


def test_a_selection_is_replayed_and_what_is_dead_is_found_anew():
    model = shuffled(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 5)))
    prune.ln_structured(model[0], "weight", amount=6, n=2, dim=0)
    first = removed(model, vectors())
    assert {name: len(kept) for name, kept in first.selection.dead.items()} == {"0.bias[0]": 14}
    again = removed(model, vectors(), selection=first.selection)
    assert shapes(again) == shapes(first)


def test_a_result_that_trains_keeps_dead_channels_and_says_so():
    model = shuffled(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 5)))
    prune.ln_structured(model[0], "weight", amount=6, n=2, dim=0)
    result = fxprune.transform(model, example_inputs=(vectors(),), trainable=True, progress=False)
    assert dict(result.named_parameters())["0.weight"].shape == (20, 12)
    assert any("dead channels stay" in note for note in result.report.notes)


def test_a_group_that_does_not_come_out_equal_stays_and_is_named(monkeypatch: pytest.MonkeyPatch):
    model = shuffled(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)))
    zero(model[0].weight, out=range(4))
    zero(model[2].weight, out=range(4))
    honest = dead_pass._Search.dead

    def wrong(self: dead_pass._Search) -> dead_pass.Dead:
        found = honest(self)
        if "0.weight[0]" in found.keep:
            found.keep["0.weight[0]"] = found.keep["0.weight[0]"][:-1]
        return found

    monkeypatch.setattr(dead_pass._Search, "dead", wrong)
    result = removed(model, vectors())
    assert shapes(result)["0.weight"][0] == 8
    assert shapes(result)["2.weight"][0] == 4
    assert any("0.weight[0] keeps all its indices" in note for note in result.report.notes)


def test_a_model_without_zero_slices_is_not_searched(monkeypatch: pytest.MonkeyPatch):
    model = shuffled(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 5)))
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    monkeypatch.setattr(dead_pass, "_Search", None)
    assert removed(model, vectors()).report.dead is None


LAYERS = st.lists(
    st.tuples(
        st.sampled_from(["conv", "padded", "grouped", "depthwise", "residual"]),
        st.sampled_from(["relu", "sigmoid", "gelu", "none"]),
        st.booleans(),
        st.integers(0, 2**16),
    ),
    min_size=1,
    max_size=4,
)


class Drawn(nn.Module):
    """A network of the drawn layers, each 8 channels wide."""

    def __init__(self, layers: list[tuple[str, str, bool, int]]) -> None:
        super().__init__()
        self.layers, self.stem, self.head = layers, nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        groups = {"grouped": 2, "depthwise": 8}
        self.convs = nn.ModuleList(
            nn.Conv2d(8, 8, 3, padding=int(kind != "conv"), groups=groups.get(kind, 1), bias=seed % 3 > 0)
            for kind, _, _, seed in layers
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) if norm else nn.Identity() for _, _, norm, _ in layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for (kind, act, _, _), conv, norm in zip(self.layers, self.convs, self.norms):
            y = norm(conv(x))
            y = y if act == "none" else getattr(F, act)(y) if act != "sigmoid" else y.sigmoid()
            x = x + y if kind == "residual" else y
        return self.head(x.mean((2, 3)))


@settings(max_examples=25, deadline=None)
@given(LAYERS)
def test_any_network_with_any_zero_slices_computes_what_it_did(layers: list[tuple[str, str, bool, int]]):
    torch.manual_seed(layers[0][3])
    model = shuffled(Drawn(layers), layers[0][3])
    for conv, (_, _, _, seed) in zip([model.stem, *model.convs], [(0, 0, 0, 7), *layers]):
        generator = torch.Generator().manual_seed(seed)
        out, into = (
            torch.rand(size, generator=generator) < share for size, share in zip(conv.weight.shape, (0.5, 0.3))
        )
        with torch.no_grad():
            conv.weight[out] = 0
            if conv.weight.shape[1] > 1 and conv is not model.stem:
                conv.weight[:, into] = 0
    removed(model, image(side=11), tolerance=2e-5)


def test_widths_are_left_at_multiples_of_eight():
    model = shuffled(nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 20), nn.GELU(), nn.Linear(20, 5)))
    zero(model[0].weight, out=range(17))
    # Row 19 alone reads inputs 30 and up: it is dead, stays to fill the width up, and is no more what it was.
    zero(model[2].weight[:19], into=range(30, 40))
    zero(model[4].weight, into=[0, 18, 19])
    result = removed(model, vectors(), align=8)
    assert shapes(result)["0.weight"] == (16, 12)
    assert shapes(result)["2.weight"] == (20, 16)
    rows = {(row.name, row.dim): row for row in result.report.dead.slices}
    assert rows["4.weight", 1].why == "widths are multiples of 8"


@pytest.mark.parametrize("ratio", [0.9, 1.1])
def test_dead_channels_stay_where_taking_them_out_does_not_pay(ratio: float, monkeypatch: pytest.MonkeyPatch):
    model = shuffled(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 5, 3)))
    zero(model[0].weight, out=range(8))
    monkeypatch.setattr(trial, "time_against", lambda *_: ModelTiming("eager", ratio, 1.0, (1.0, 1.0), 1, "cpu"))
    monkeypatch.setattr(trial, "duel", lambda *_: (Samples([2.0], [2.0]), Samples([1.0], [1.0])))
    options = {"compile": False, "measure": True}
    result = fxprune.transform(model, example_inputs=(image(),), options=options, progress=False)
    with torch.no_grad():
        assert torch.allclose(result(image()), model(image()), atol=1e-5)
    assert shapes(result)["0.weight"][0] == (16 if ratio < 1 else 8)
    assert bool(result.selection.dead) == (ratio > 1)
    assert ("so its dead channels stay" in str(result.report)) == (ratio < 1)


@pytest.mark.parametrize("read", [1, 3, 5])
def test_what_only_a_width_keeps_may_read_what_leaves(read: int) -> None:
    """Outputs that nobody reads fill a width up, and an input that they alone read leaves: nothing is known of it."""
    model = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in itertools.pairwise((15, 3, 8, 1)))).eval()
    with torch.no_grad():
        for layer, places in ((model[1], [(1, 2), (3, 0)]), (model[2], [(0, read)])):
            layer.weight.zero_()
            layer.weight[tuple(zip(*places, strict=True))] = 1.0
    x = torch.randn(4, 15)
    result = fxprune.transform(model, None, (x,), options={"compile": False, "measure": False}, progress=False)
    assert result.report.dead is not None and result.report.dead.keep
    assert not [note for note in result.report.notes if "not looked for" in note]
    torch.testing.assert_close(result(x), model(x))
