"""Calibration of whole small models of every kind: exact counts, a smaller error, and results that hang on nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fxprune import Blocks, Plan, Rule, SemiStructured, Unstructured
from fxprune.calibration import rebatch as cutting
from fxprune.calibration.calibrate import calibrate
from fxprune.calibration.recover.recover import recover
from fxprune.calibration.solvers import METHODS
from fxprune.select.selection import Selection
from tests.calibration.calibrate_case import HALF, KINDS, applied, differ, model, off, tensors_of
from tests.structured_oracle import net


def quietly(model: nn.Module, plan: Plan | None, data: Any, method: str = "refit", **more: Any) -> Selection:
    return calibrate(model, plan, data, method, progress=False, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind: str) -> None:
    dense, x = model(kind)
    before, data = tensors_of(dense), x.clone()
    magnitude = quietly(dense, HALF, [x], "magnitude")
    plain = applied(dense, Selection(mask=magnitude.mask))
    errors = {"": off(dense, plain, x)}
    for method in METHODS:
        found = quietly(dense, HALF, [x], method)
        if method in ("magnitude", "admm"):
            assert differ(found, quietly(dense, HALF, [x], method)) == 0
        assert tensors_of(dense) == before and torch.equal(x, data)
        weights = [name for name, p in dense.named_parameters() if p.dim() > 1]
        assert found.mask.keys() == found.fits.keys() == set(weights)
        for name in weights:
            parameter = dense.get_parameter(name)
            assert found.mask[name].shape == found.values[name].shape == parameter.shape
            gone = found.mask[name].numel() - found.mask[name].kept()
            assert gone == round(parameter.numel() / 2) and found.asked[name] == 0.5
            assert not bool(found.values[name][~found.mask[name].unpack()].any())
            fit = found.fits[name]
            assert fit.method == method and fit.rows > 0
            assert not fit.note or (method != "magnitude" and fit.note.startswith(f"only {fit.rows} rows for"))
        assert all(bool(value.isfinite().all()) for value in found.values.values())
        errors[method] = off(dense, applied(dense, found), x)
    assert errors["magnitude"] < errors[""] or kind in ("no bias", "one bias")
    assert errors["admm"] < errors["magnitude"] and errors["refit"] < errors["magnitude"]


@pytest.mark.parametrize("kind", KINDS)
def test_how_the_data_are_cut_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, x = model(kind)
    whole = quietly(dense, HALF, [x])
    assert differ(whole, quietly(dense, HALF, x.split(1))) == 0
    assert differ(whole, quietly(dense, HALF, (part for part in x.split([3, 20, 1])))) == 0
    # Where batches cannot be cut anew they are summed up as they come, and the last digits of activations differ, which
    # weights that the data hardly tell apart make the most of.
    monkeypatch.setattr(cutting, "_cuttable", lambda *_: False)
    for cut in (1, 7):
        other = quietly(dense, HALF, x.split(cut))
        assert differ(whole, other) < 1e-3
        with torch.no_grad():
            got, expected = applied(dense, other)(x), applied(dense, whole)(x)
        assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_one_layer_loses_less_from_method_to_method() -> None:
    dense, x = net(lambda m, x: m.a(x), a=nn.Linear(48, 32)), torch.randn(300, 48) @ torch.randn(48, 48)
    for amount in (0.5, 0.8):
        plan = Plan([Rule("*", Unstructured(amount))])
        errors = {}
        for method in METHODS:
            found = quietly(dense, plan, [x], method)
            errors[method] = off(dense, applied(dense, found), x)
            assert found.fits["a.weight"].error == pytest.approx(errors[method], rel=1e-3)
            assert found.fits["a.weight"].rows == 300
        assert errors["admm"] <= errors["refit"] <= errors["sparsegpt"]
        assert errors["refit"] <= min(errors["magnitude"], errors["wanda"])


def test_a_bias_is_solved_for() -> None:
    dense, x = net(lambda m, x: m.a(x), a=nn.Linear(16, 8)), torch.randn(100, 16) + 10
    for method in METHODS:
        found = applied(dense, quietly(dense, HALF, [x], method))
        with torch.no_grad():
            torch.testing.assert_close(found(x).mean(0), dense(x).mean(0), rtol=0, atol=1e-4)


def test_a_batch_norm_takes_the_shift_and_its_variance() -> None:
    parts = dict(c=nn.Conv2d(4, 8, 3, bias=False), n=nn.BatchNorm2d(8))
    dense, x = net(lambda m, x: m.n(m.c(x)), **parts), torch.randn(50, 4, 6, 6) + 2
    with torch.no_grad():
        y = dense.c(x).transpose(0, 1).flatten(1)
        dense.n.running_mean.copy_(y.mean(1))
        dense.n.running_var.copy_(y.var(1))
    for method in METHODS:
        found = quietly(dense, HALF, [x], method)
        assert ("n.running_var" in found.values) == (method == "magnitude") and "n.running_mean" in found.values
        with torch.no_grad():
            got, wanted = (m(x).transpose(0, 1).flatten(1) for m in (applied(dense, found), dense))
        torch.testing.assert_close(got.mean(1), wanted.mean(1), rtol=0, atol=1e-4)
        if method == "magnitude":
            torch.testing.assert_close(got.var(1), wanted.var(1), rtol=1e-3, atol=0)


def test_a_bias_that_layers_share_stays() -> None:
    dense, x = model("one bias")
    found = quietly(dense, HALF, [x])
    assert found.values.keys() == {"a.weight", "b.weight"}


@pytest.mark.parametrize("how", [SemiStructured(2, 4), Blocks(0.5, (4, 4)), Unstructured(0.5, per_row=True)])
@pytest.mark.parametrize("kind", ["transposed", "conv and norm", "grouped"])
def test_other_patterns(how: Any, kind: str) -> None:
    dense, x = model(kind)
    names = {"transposed": "[abc].weight", "conv and norm": "c[12].weight", "grouped": "[ac].weight"}
    plan = Plan([Rule(names[kind], how)])
    by_magnitude = quietly(dense, plan, [x], "magnitude")
    crossing = "from one group into the next" if kind == "grouped" and isinstance(how, Blocks) else ""
    assert by_magnitude.mask
    for method in ("wanda", "sparsegpt", "admm"):
        found = quietly(dense, plan, [x], method)
        assert found.mask.keys() == by_magnitude.mask.keys()
        for name, mask in found.mask.items():
            assert mask.kept() == by_magnitude.mask[name].kept()
            assert mask.kept() == mask.numel() // 2 or isinstance(how, Blocks)
            note = found.fits[name].note
            assert (crossing in note) if name == "a.weight" else not note or note.startswith("only")
            weight = mask.unpack().movedim(0 if kind == "transposed" else 1, -1)
            if isinstance(how, SemiStructured):
                assert bool((weight.reshape(-1, 4).sum(1) == 2).all())


@pytest.mark.parametrize("twice", [False, True])
def test_few_rows_are_told(twice: bool) -> None:
    dense = net(lambda m, x: m.a(x).relu() + m.a(-x) if twice else m.a(x).relu(), a=nn.Linear(16, 16))
    places = 2 if twice else 1
    for rows, word in ((8 * 16 // places - 1, "rows for 16 inputs"), (8 * 16 // places, "")):
        note = quietly(dense, HALF, [torch.randn(rows, 16)]).fits["a.weight"].note
        assert word in note and ("only" in note) == bool(word), note
    assert "only" not in quietly(dense, HALF, [torch.randn(4, 16)], "magnitude").fits["a.weight"].note


# --- weights that cannot be fitted as others ---------------------------------------------------------------------


def test_a_weight_that_is_read_twice() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(m.a(m.a(x).tanh()) + F.linear(x, m.b.weight))

    dense = net(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 4))
    dense.b.weight = dense.a.weight
    x = torch.randn(60, 16) @ torch.randn(16, 16) / 4
    errors = {}
    for method in METHODS:
        found = quietly(dense, HALF, [x], method)
        assert found.mask.keys() == {"a.weight", "c.weight"} and found.mask["a.weight"].kept() == 128
        note = found.fits["a.weight"].note
        assert ("several places" in note) == (method != "magnitude") and ("3 places" in note) == (method == "magnitude")
        assert found.fits["a.weight"].rows == (0 if method == "magnitude" else 180)
        errors[method] = off(dense, applied(dense, found), x)
    assert errors["refit"] < errors["magnitude"] and errors["admm"] < errors["magnitude"]


def test_experts_without_input_and_experts_with_some() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.pre(x)
        best, y = m.router(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate((m.a, m.b, m.c)):
            mine = torch.where(best == index)[0]
            y = y.index_add(0, mine, expert(x[mine]))
        return y

    parts = {name: nn.Linear(8, 8) for name in ("pre", "a", "b", "c")}
    dense = net(forward, **parts, router=nn.Linear(8, 3))
    with torch.no_grad():
        dense.router.bias[1] = -100
    x = torch.randn(60, 8)
    for method in METHODS:
        found = quietly(dense, HALF, x.split(20), method)
        fit = found.fits["b.weight"]
        assert (fit.method, fit.rows) == ("magnitude", 0) and "received no input" in fit.note
        kept = dense.b.weight.detach().abs()
        assert float(kept[found.mask["b.weight"].unpack()].min()) >= float(kept[~found.mask["b.weight"].unpack()].max())
        assert torch.equal(found.values["b.weight"], dense.b.weight.detach() * found.mask["b.weight"].unpack())
        assert "b.bias" not in found.values
        assert found.fits["a.weight"].rows + found.fits["c.weight"].rows == 60
        assert "dense model's inputs" in found.fits["a.weight"].note
        assert "dense model's inputs" not in found.fits["pre.weight"].note


def test_weights_of_other_ops_are_pruned_by_magnitude_with_the_reason() -> None:
    def forward(m: Any, ids: Tensor) -> Tensor:
        x = m.table(ids)
        x, _ = m.lstm(x)
        return m.head(torch.einsum("bsi,io->bso", x, m.mix)) + m.up(x.transpose(1, 2)).mean()

    parts: dict[str, Any] = dict(table=nn.Embedding(30, 16), lstm=nn.LSTM(16, 16, batch_first=True))
    parts |= dict(mix=nn.Parameter(torch.randn(16, 16)), head=nn.Linear(16, 4), up=nn.ConvTranspose1d(16, 2, 3))
    dense, ids = net(forward, **parts), torch.randint(0, 30, (20, 6))
    before = tensors_of(dense)
    found = quietly(dense, Plan([Rule("*", Unstructured(0.5)), Rule("table.weight", Unstructured(0.5))]), [ids])
    assert tensors_of(dense) == before
    assert found.fits["head.weight"].method == "refit"
    for name, word in {"mix": "einsum", "up.weight": "transposed", "table.weight": "embedding"}.items():
        assert found.fits[name].method == "magnitude" and word in found.fits[name].note, found.fits[name]
        assert name not in found.values and found.mask[name].kept() == found.mask[name].numel() // 2
    assert all(name in found.fits for name in found.mask)


def test_attention_weights_of_torchs_own_module() -> None:
    dense = net(
        lambda m, x: m.b(m.att(x, x, x, need_weights=False)[0]), att=nn.MultiheadAttention(16, 4), b=nn.Linear(16, 4)
    )
    found = quietly(dense, HALF, [torch.randn(7, 20, 16)])
    assert found.fits["att.in_proj_weight"].method == found.fits["att.out_proj.weight"].method == "refit"


@pytest.mark.parametrize("method", METHODS)
def test_biases_that_are_masked_stay_zero(method: str) -> None:
    dense, x = model("linear")
    for name, amount in (("weight", 0.5), ("bias", 0.5)):
        prune.l1_unstructured(dense.b, name, amount)
    masked = dense.b.bias_mask == 0
    found = quietly(dense, Plan([Rule("[ab].weight", Unstructured(0.8))]), [x], method)
    assert "b.bias" not in found.values and "a.bias" in found.values
    recovered = recover(dense, found, [x[:12], x[12:]], steps=5, progress=False)
    assert not recovered.values["b.bias"][masked].any() and recovered.values["b.bias"][~masked].all()


def test_magnitude_leaves_what_stays_to_the_last_bit() -> None:
    dense, x = model("linear")
    found = quietly(dense.double(), HALF, [x.double()], "magnitude")
    for name, mask in found.mask.items():
        weight = dense.get_parameter(name).detach()
        assert weight.dtype is torch.float64 and torch.equal(found.values[name], weight * mask.unpack())


def test_images_without_a_batch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.conv2d(m.a(x).relu(), m.b.weight, m.a.bias, padding=1)

    image = F.interpolate(torch.randn(12, 3, 4, 4), (6, 6), mode="bilinear")
    dense = net(forward, a=nn.Conv2d(3, 6, 3, padding=1), b=nn.Conv2d(6, 6, 3, bias=False))
    together, apart = quietly(dense, HALF, [image]), quietly(dense, HALF, list(image))
    assert differ(together, apart) < 1e-4


def test_a_scale_that_is_made_of_a_parameter_closes_a_branch() -> None:
    def direct(m: Any, x: Tensor) -> Tensor:
        x = x + m.b(m.a(x).relu()) * m.gamma
        return m.c(x)

    def viewed(m: Any, x: Tensor) -> Tensor:
        x = x + m.b(m.a(x).relu()) * m.gamma.reshape(1, 1, -1)
        return m.c(x)

    parts, x = dict(a=nn.Linear(16, 32), b=nn.Linear(32, 16), c=nn.Linear(16, 8)), model("tokens")[1]
    gamma = nn.Parameter(torch.rand(16) + 0.5)
    one, other = net(direct, **parts, gamma=gamma), net(viewed, **parts, gamma=gamma)
    other.load_state_dict(one.state_dict())
    assert differ(quietly(one, HALF, [x]), quietly(other, HALF, [x])) < 1e-5


def test_values_that_a_dtype_cannot_hold_are_not_used() -> None:
    """What a scale of 1e-4 lets through makes up for the rest only in numbers that float16 does not have."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = (m.a(x) * 100).abs()
        return y + m.b(y / 100) * m.gamma

    dense = net(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16), gamma=nn.Parameter(torch.ones(16))).half()
    nn.init.constant_(dense.gamma, 1e-4)
    found = quietly(dense, HALF, [torch.randn(200, 16).half()])
    assert all(bool(value.isfinite().all()) for value in found.values.values())
    assert "too large for its dtype" in found.fits["b.weight"].note and found.fits["b.weight"].method == "magnitude"
