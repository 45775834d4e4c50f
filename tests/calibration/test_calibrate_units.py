"""Calibration where whole units leave: what stays is fitted, and what is taken out computes what zeros compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import Channels, Plan, Rule, SemiStructured, Unstructured
from fxprune.calibration.calibrate import calibrate
from fxprune.calibration.solvers import METHODS
from fxprune.capture.capture import capture
from fxprune.couple.couple import couple
from fxprune.select.selection import Selection
from tests.calibration.calibrate_case import applied, differ, model, off, shrunk_and_zeroed, tensors_of
from tests.oracle import assert_close
from tests.structured_oracle import channels, net


def quietly(model: nn.Module, plan: Plan | None, data: Any, method: str = "refit", **more: Any) -> Selection:
    return calibrate(model, plan, data, method, progress=False, **more)


def held(dense: Any, found: Selection, x: Tensor) -> float:
    """What the model without its units is off by; also that it computes what zeros in their place compute."""
    small, zeroed = shrunk_and_zeroed(dense, found, x)
    assert_close(small, zeroed)
    with torch.no_grad():
        wanted = dense(x)
    return float((small[0] - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


CASES = {
    "ffn": ("tokens", channels(0.5, "a.weight", dim=0)),
    "transposed": ("transposed", channels(0.5, "a.weight", dim=1)),
    "heads": ("attention", channels(0.5, "v.weight", dim=0)),
    "both": ("attention", Plan([Rule("v.weight", Channels(0.5, align=1)), Rule("a.weight", Channels(0.25, align=1))])),
    "conv": ("conv and norm", channels(0.5, "c1.weight", dim=0)),
    "depthwise": ("depthwise", channels(0.5, "up.weight", dim=0)),
    "everywhere": ("linear", channels(0.5)),
    "1d": ("1d", channels(0.5)),
}


@pytest.mark.parametrize("case", CASES)
def test_units_leave_and_the_rest_is_fitted(case: str) -> None:
    kind, plan = CASES[case]
    dense, x = model(kind)
    before = tensors_of(dense)
    errors, counts = {}, set()
    for method in ("magnitude", "sparsegpt", "refit"):
        found = quietly(dense, plan, [x], method)
        assert found.keep and not found.mask
        counts.add(tuple(sorted((name, len(kept)) for name, kept in found.keep.items())))
        for kept in found.keep.values():
            assert kept.dtype is torch.int64 and torch.equal(kept, kept.unique())
        errors[method] = held(dense, found, x)
        if method == "refit":
            assert differ(found, quietly(dense, plan, x.split(5), method)) == 0
    assert tensors_of(dense) == before
    assert len(counts) == 1  # which leave is the method's, how many is the plan's
    by_size = Selection(keep=quietly(dense, plan, [x], "magnitude").keep)
    plain = held(dense, by_size, x)
    assert errors["refit"] < 0.8 * plain and errors["sparsegpt"] < plain


def test_the_width_of_the_residual_stream() -> None:
    """Statistics of the norms run over what stays, in what the weights are fitted on as well."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.table(x)
        x = x + m.b(m.a(m.norm(x)).relu())
        return m.head(m.last(x))

    parts: dict[str, Any] = dict(table=nn.Linear(12, 16), a=nn.Linear(16, 24), b=nn.Linear(24, 16))
    dense = net(forward, **parts, norm=nn.LayerNorm(16), last=nn.LayerNorm(16), head=nn.Linear(16, 4))
    x = torch.randn(60, 12)
    plan = channels(0.25, "b.weight", dim=0, unit="mixed")
    coupling = couple(capture(dense, (x,), {}).program)
    errors = {}
    for method in ("magnitude", "wanda", "refit"):
        found = quietly(dense, plan, [x], method)
        assert [len(kept) for kept in found.keep.values()] == [12] and coupling[next(iter(found.keep))].mixed
        small, _ = shrunk_and_zeroed(dense, found, x)
        with torch.no_grad():
            wanted = dense(x)
        errors[method] = float((small[0] - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
    # Neither the norms nor the rows that left are in the error of the last layer, which was fitted on what they give.
    assert errors["refit"] < errors["magnitude"]
    assert found.fits["head.weight"].error == pytest.approx(errors["refit"], rel=0.05)


def test_units_by_a_score_that_was_asked_for_stay_as_asked() -> None:
    dense, x = model("tokens")
    kept = {}
    for method in METHODS:
        found = quietly(dense, channels(0.5, "a.weight", dim=0, score="fpgm"), [x], method)
        kept[method] = next(iter(found.keep.values()))
    assert all(torch.equal(kept["magnitude"], other) for other in kept.values())


def test_units_are_chosen_by_what_reads_them() -> None:
    """Units of large weights that nobody listens to leave first, whatever their size."""
    dense = net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(8, 12), b=nn.Linear(12, 4))
    with torch.no_grad():
        dense.a.weight[:6] *= 10
        dense.b.weight[:, :6] = 0
    x = torch.randn(80, 8)
    for method in METHODS[1:]:
        found = quietly(dense, channels(0.5, "a.weight", dim=0), [x], method)
        assert found.keep[next(iter(found.keep))].tolist() == [6, 7, 8, 9, 10, 11]
        assert held(dense, found, x) < 1e-6


def test_a_twin_makes_up_for_what_leaves() -> None:
    """Of two units that say the same one can leave at no cost, which only a solver that fits sees."""
    dense = net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(8, 8), b=nn.Linear(8, 4))
    with torch.no_grad():
        dense.a.weight[4:], dense.a.bias[4:] = dense.a.weight[:4], dense.a.bias[:4]
    x = torch.randn(200, 8)
    found = quietly(dense, channels(0.5, "a.weight", dim=0), [x])
    assert sorted(i % 4 for i in next(iter(found.keep.values())).tolist()) == [0, 1, 2, 3]
    assert held(dense, found, x) < 1e-3


def test_units_and_elements_together() -> None:
    dense, x = model("tokens")
    plan = Plan([Rule("*", Unstructured(0.5)), Rule("a.weight", Channels(0.5, align=1))])
    for method in ("magnitude", "wanda", "admm"):
        found = quietly(dense, plan, [x], method)
        assert [len(kept) for kept in found.keep.values()] == [16] and found.mask.keys() >= {"b.weight", "c.weight"}
        coupling = couple(capture(dense, (x,), {}).program)
        oracle = applied(dense, found, coupling.kept(found.keep))
        assert off(dense, oracle, x) < 1.5
        assert found.mask["b.weight"].kept() == found.mask["b.weight"].numel() // 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("how", [Unstructured(0.5), Unstructured(0.5, per_row=True), SemiStructured(2, 4)])
def test_what_stays_of_a_weight_that_loses_inputs_is_as_sparse_as_asked(method: str, scope: str, how: Any) -> None:
    """Whether the units that leave are known before the weight is fitted, or are chosen with it."""
    torch.manual_seed(0)
    layers = dict(a=nn.Linear(16, 64), b=nn.Linear(64, 32), c=nn.Linear(32, 8))
    dense = net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), **layers)
    plan = Plan([Rule("a.weight", Channels(0.5), scope=scope), Rule("b.weight", how)])
    found = quietly(dense, plan, [torch.randn(300, 16)], method)
    ((_, kept),) = found.keep.items()
    mask = found.mask["b.weight"].unpack()
    zeros = float((~mask[:, kept]).float().mean())
    assert len(kept) == 32 and zeros == pytest.approx(0.5, abs=0.1 if method == "magnitude" else 0.001)
    if not isinstance(how, SemiStructured):
        assert found.mask["b.weight"].kept() == mask.numel() // 2
    elif method != "magnitude":
        assert (mask[:, kept].reshape(32, 8, 4).sum(-1) == 2).all()
    assert not found.values["b.weight"][~mask].any()
    gone = torch.tensor([i for i in range(64) if i not in kept.tolist()])
    expected = layers["b"].weight[:, gone] * mask[:, gone]
    assert torch.equal(found.values["b.weight"][:, gone], expected)


def test_a_pattern_that_what_stays_does_not_divide() -> None:
    torch.manual_seed(0)
    dense = net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(8, 16), b=nn.Linear(16, 8))
    plan = Plan([Rule("a.weight", Channels(6, align=1)), Rule("b.weight", SemiStructured(2, 4))])
    found = quietly(dense, plan, [torch.randn(100, 8)])
    assert (found.mask["b.weight"].unpack().reshape(8, 4, 4).sum(-1) <= 2).all()
    assert "does not divide the inputs that stay" in found.fits["b.weight"].note


def test_readers_at_several_places_are_refitted() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + m.b(m.a(x).relu())
        return x

    torch.manual_seed(0)
    dense, x = net(forward, a=nn.Linear(16, 32), b=nn.Linear(32, 16)), torch.randn(300, 16)
    found = quietly(dense, channels(0.5, "a.weight", dim=0), [x])
    assert "several places" in found.fits["b.weight"].note and found.fits["b.weight"].method == "refit"
    plain = quietly(dense, channels(0.5, "a.weight", dim=0), [x], "magnitude")
    coupling = couple(capture(dense, (x,), {}).program)
    errors = [off(dense, applied(dense, each, coupling.kept(each.keep)), x) for each in (found, plain)]
    assert errors[0] < 0.8 * errors[1]
    held(dense, found, x)


def test_readers_that_cannot_be_refitted_are_told() -> None:
    dense = net(lambda m, x: m.b(m.a(x).relu()), a=nn.Conv1d(8, 16, 3), b=nn.ConvTranspose1d(16, 8, 3))
    found = quietly(dense, channels(0.5, "a.weight", dim=0), [torch.randn(8, 8, 12)])
    assert "transposed convolution" in found.fits["b.weight"].note


def test_grouped_queries_lose_whole_key_heads() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q = m.q(x).view(x.shape[0], -1, 4, 4).transpose(1, 2)
        k, v = (layer(x).view(x.shape[0], -1, 2, 4).transpose(1, 2).repeat_interleave(2, 1) for layer in (m.k, m.v))
        return x + m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    parts = dict(q=nn.Linear(16, 16), k=nn.Linear(16, 8), v=nn.Linear(16, 8), o=nn.Linear(16, 16))
    dense, x = net(forward, **parts), torch.randn(12, 6, 16)
    for method in ("wanda", "refit"):
        found = quietly(dense, channels(0.5, "k.weight", dim=0), [x], method)
        held(dense, found, x)


def test_biases_and_inputs_of_convolutions_are_no_weights() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x).relu()) + F.conv2d(m.image, m.a.weight[:4, :, :, :1]).mean()

    parts: dict[str, Any] = dict(a=nn.Conv2d(4, 8, 3, padding=1), b=nn.Conv2d(8, 4, 1))
    dense = net(forward, **parts, image=nn.Parameter(torch.randn(1, 4, 6, 6)))
    x = torch.randn(20, 4, 6, 6)
    found = quietly(dense, Plan([Rule("image", Unstructured(0.5)), Rule("b.weight", Unstructured(0.5))]), [x])
    assert found.fits["image"].method == "magnitude" and "no weight of" in found.fits["image"].note
    assert found.fits["b.weight"].method == "refit" and "a.bias" not in found.fits


@pytest.mark.parametrize("pooled", ["global", "isomorphic"])
def test_a_pool_is_scored_by_one_measure(pooled: str) -> None:
    """The norms of one group say that it loses nothing; its activations say that it loses all that leave."""
    torch.manual_seed(0)
    layers = dict(a=nn.Linear(8, 16), b=nn.Linear(16, 8), c=nn.Linear(8, 16), d=nn.Linear(16, 8))
    dense = net(lambda m, x: m.d(m.c(m.b(m.a(x).relu())).relu()), **layers)
    with torch.no_grad():
        for part in (layers["a"].weight, layers["a"].bias):
            part[:8] = -part[:8].abs()  # never on, for the inputs are positive
        for part in (layers["c"].weight, layers["c"].bias, layers["d"].weight.T):
            part[:8] *= 0.01
    plan = Plan([Rule("[ac].weight", Channels(0.25, align=1), scope=pooled)])
    by_norm = calibrate(dense, plan, [torch.rand(40, 8)], "magnitude", progress=False)
    assert "a.weight[0]" not in by_norm.keep
    found = calibrate(dense, plan, [torch.rand(40, 8)], progress=False)
    assert found.keep["a.weight[0]"].tolist() == list(range(8, 16)) and "c.weight[0]" not in found.keep


def test_units_that_no_product_sums_over_keep_the_plans_score_and_say_so() -> None:
    torch.manual_seed(0)
    dense = net(lambda m, x: m.a(x) @ m.b(x).mT, a=nn.Linear(8, 16), b=nn.Linear(8, 16))
    plan = Plan([Rule("a.weight", Channels(0.5))])
    found = calibrate(dense, plan, [torch.randn(4, 10, 8)], progress=False)
    assert found.keep and any("chosen by their norm" in note for note in found.notes)
