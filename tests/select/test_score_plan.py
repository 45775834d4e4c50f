"""Scores in plans, through transform: which elements and units leave, and what the report says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import fxprune
from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.errors import FxPruneError, InputError, PlanError
from fxprune.gradient_score import fisher, snip, taylor
from fxprune.plan.scores import Scores
from fxprune.select.score import lamp
from tests.oracle import snapshot
from tests.structured_oracle import EAGER, assert_shrunk, randomised, removed

X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2])


def cnn(norms: bool = True) -> Any:
    """Two convs (c1, c2) of 12 and 16 channels, each under a batch-norm or none, and a head."""
    parts: dict[str, nn.Module] = {"c1": nn.Conv2d(4, 12, 3, padding=1)}
    if norms:
        parts["n1"] = nn.BatchNorm2d(12)
    parts |= {"r1": nn.ReLU(), "c2": nn.Conv2d(12, 16, 3)}
    if norms:
        parts["n2"] = nn.BatchNorm2d(16)
    parts |= {"r2": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "head": nn.Linear(16, 5)}
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    return randomised(model)


def pruned(model: nn.Module, sparsity: Any, scope: str = "local", pattern: str = "*") -> Any:
    before = snapshot(model)
    plan = Plan([Rule(pattern, sparsity, scope)])
    result = fxprune.transform(model, plan, (X,), options=EAGER, progress=False)
    assert snapshot(model) == before
    return result


def lowest(score: Tensor, count: int) -> list[int]:
    return sorted(score.argsort(stable=True)[:count].tolist())


def of_units(model: nn.Module, element: dict[str, Tensor], conv: str, norm: str, reader: str) -> Tensor:
    """Element scores added up over all that leaves with each output channel of `conv`."""
    sums = [element[f"{conv}.weight"].double().flatten(1).sum(1), element[f"{conv}.bias"].double()]
    sums += [element[f"{norm}.weight"].double(), element[f"{norm}.bias"].double()]
    return torch.stack([*sums, element[f"{reader}.weight"].double().movedim(1, 0).flatten(1).sum(1)]).sum(0)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("method", [taylor, snip, fisher])
def test_elements_by_gradient(method: Any, scope: str) -> None:
    model = cnn()
    scores = method(model, [(X, Y)], F.cross_entropy, progress=False)
    result = pruned(model, Unstructured(0.6, scores), scope)
    names = ["c1.weight", "c2.weight", "head.weight"]
    pools = [names] if scope == "global" else [[name] for name in names]
    for pool in pools:
        flat = torch.cat([scores[name].abs().flatten() for name in pool])
        keep = torch.ones(len(flat), dtype=torch.bool)
        keep[flat.argsort(stable=True)[: round(0.6 * len(flat))]] = False
        found = torch.cat([result.selection.mask[name].unpack().flatten() for name in pool])
        assert torch.equal(found, keep)
    assert method.__name__ in Unstructured(0.6, scores).describe()


@pytest.mark.parametrize("method", [taylor, snip, fisher])
def test_units_by_gradient(method: Any) -> None:
    model = cnn()
    scores = method(model, [(X, Y)], F.cross_entropy, progress=False)
    first, second = of_units(model, dict(scores), "c1", "n1", "c2"), of_units(model, dict(scores), "c2", "n2", "head")
    if method is taylor:
        assert bool((first < 0).any())
        first, second = first.abs(), second.abs()
    result = pruned(model, Channels(0.5, align=1, score=scores))
    assert removed(result, "c1.weight") == lowest(first, 6) and removed(result, "c2.weight") == lowest(second, 8)
    assert_shrunk(result, model, (X,))
    result = pruned(model, Channels(0.5, align=1, score=scores), "global")
    both = lowest(torch.cat([first, second]), 14)
    assert removed(result, "c1.weight") == [i for i in both if i < 12]
    assert removed(result, "c2.weight") == [i - 12 for i in both if i >= 12]


@pytest.mark.parametrize("scope", ["local", "global"])
def test_network_slimming(scope: str) -> None:
    model = cnn()
    with torch.no_grad():
        model.n2.weight.mul_(-0.4)
    first, second = model.n1.weight.abs(), model.n2.weight.abs()
    result = pruned(model, Channels(0.5, align=1, score="bn_scale"), scope)
    wanted = (lowest(first, 6), lowest(second, 8))
    if scope == "global":
        both = lowest(torch.cat([first, second]), 14)
        wanted = ([i for i in both if i < 12], [i - 12 for i in both if i >= 12])
        assert len(wanted[0]) < 6
    assert (removed(result, "c1.weight"), removed(result, "c2.weight")) == wanted
    assert not [note for note in result.report.notes if "batch-norm" in note]
    assert_shrunk(result, model, (X,))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_groups_without_a_batch_norm_are_said(scope: str) -> None:
    model = cnn(norms=False)
    result = pruned(model, Channels(0.5, align=1, norm=1, score="bn_scale"), scope)
    plain = pruned(model, Channels(0.5, align=1, norm=1), scope)
    for name in ("c1.weight", "c2.weight"):
        assert removed(result, name) == removed(plain, name) != []
    assert "rule 0 scores 2 (c1.weight[0], c2.weight[0]) by L1 norm: no batch-norm scales their channels" in (
        result.report.notes
    )


def test_a_pool_that_mixes_gammas_with_norms_compares_each_with_its_group() -> None:
    torch.manual_seed(0)
    layers = {
        "c1": nn.Conv2d(4, 12, 3),
        "n1": nn.BatchNorm2d(12),
        "c2": nn.Conv2d(12, 16, 3),
        "c3": nn.Conv2d(16, 4, 1),
    }
    model = nn.Sequential()
    for name, part in layers.items():
        model.add_module(name, part)
    model = randomised(model)
    result = pruned(model, Channels(0.5, align=1, score="bn_scale"), "global")
    gammas = model.n1.weight.detach().double().abs()
    norms = sum(
        rows.detach().double().flatten(1).norm(dim=1)
        for rows in (model.c2.weight, model.c2.bias.unsqueeze(1), model.c3.weight.movedim(1, 0))
    )
    both = lowest(torch.cat([gammas / gammas.mean(), norms / norms.mean()]), 14)
    assert removed(result, "c1.weight") == [i for i in both if i < 12] != []
    assert removed(result, "c2.weight") == [i - 12 for i in both if i >= 12] != []
    assert [note for note in result.report.notes if "1 (c2.weight[0]) by L2 norm" in note]


def standardised_gain() -> nn.Module:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 12, 3)
            self.gain = nn.Parameter(torch.rand(12) + 0.5)
            self.head = nn.Conv2d(12, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            flat = self.conv.weight.reshape(1, 12, -1)
            weight = F.batch_norm(flat, None, None, weight=self.gain, training=True).reshape_as(self.conv.weight)
            return self.head(F.relu(F.conv2d(x, weight, self.conv.bias)))

    return randomised(Standardised())


def test_the_gain_of_a_standardised_weight_is_no_batch_norm() -> None:
    result = pruned(standardised_gain(), Channels(0.5, align=1, score="bn_scale"), pattern="conv.weight")
    assert [note for note in result.report.notes if "no batch-norm scales" in note]


@pytest.mark.parametrize("scope", ["local", "global"])
def test_fpgm(scope: str) -> None:
    model = cnn()
    with torch.no_grad():
        model.c1.weight[3] = model.c1.weight.mean(0)
    result = pruned(model, Channels(0.5, align=1, score="fpgm"), scope)
    tensors = dict(model.named_parameters())
    scored = []
    for conv, norm, reader in (("c1", "n1", "c2"), ("c2", "n2", "head")):
        rows = [tensors[n] for n in (f"{conv}.weight", f"{conv}.bias", f"{norm}.weight", f"{norm}.bias")]
        rows.append(tensors[f"{reader}.weight"].movedim(1, 0))
        flat = [r.detach().double().reshape(len(r), -1) for r in rows]
        scored.append(sum((r.unsqueeze(0) - r.unsqueeze(1)).norm(dim=2).sum(1) for r in flat))
    wanted = (lowest(scored[0], 6), lowest(scored[1], 8))
    if scope == "global":
        both = lowest(torch.cat([score / score.mean() for score in scored]), 14)
        wanted = ([i for i in both if i < 12], [i - 12 for i in both if i >= 12])
    assert (removed(result, "c1.weight"), removed(result, "c2.weight")) == wanted
    assert_shrunk(result, model, (X,))


def test_lamp_over_groups_is_not_undone_by_their_means() -> None:
    model = cnn(norms=False)
    result = pruned(model, Channels(0.5, align=1, score="lamp"), "global")
    tensors = dict(model.named_parameters())
    scored = []
    for conv, reader in (("c1", "c2"), ("c2", "head")):
        rows = [tensors[f"{conv}.weight"], tensors[f"{conv}.bias"], tensors[f"{reader}.weight"].movedim(1, 0)]
        squares = sum(r.detach().double().reshape(len(r), -1).square().sum(1) for r in rows)
        scored.append(squares / torch.stack([squares[squares >= s].sum() for s in squares]))
    both = lowest(torch.cat(scored), 14)
    wanted = ([i for i in both if i < 12], [i - 12 for i in both if i >= 12])
    assert (removed(result, "c1.weight"), removed(result, "c2.weight")) == wanted
    by_mean = lowest(torch.cat([score / score.mean() for score in scored]), 14)
    assert by_mean != both


def test_lamp_over_weights() -> None:
    model = cnn()
    result = pruned(model, Unstructured(0.7, "lamp"), "global")
    names = ["c1.weight", "c2.weight", "head.weight"]
    flat = torch.cat([lamp(model.get_parameter(name)).flatten() for name in names])
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[flat.argsort(stable=True)[: round(0.7 * len(flat))]] = False
    assert torch.equal(torch.cat([result.selection.mask[name].unpack().flatten() for name in names]), keep)


@pytest.mark.parametrize("sparsity", [Unstructured(0.5, "random"), Channels(0.5, align=1, score="random")])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_seed_decides_what_is_random(sparsity: Any, scope: str) -> None:
    model = cnn()
    found = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        result = pruned(model, sparsity, scope)
        masks = {name: mask.unpack().tolist() for name, mask in result.selection.mask.items()}
        found.append((masks, {name: kept.tolist() for name, kept in result.selection.keep.items()}))
    assert found[0] == found[1] != found[2]
    assert found[0][0] or found[0][1]


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_function_scores_units_by_its_sums(scope: str) -> None:
    model = cnn()

    def cube(weight: Tensor) -> Tensor:
        return weight.double().abs() ** 3

    element = {name: cube(p.detach()) for name, p in model.named_parameters()}
    first, second = of_units(model, element, "c1", "n1", "c2"), of_units(model, element, "c2", "n2", "head")
    result = pruned(model, Channels(0.5, align=1, score=cube), scope)
    wanted = (lowest(first, 6), lowest(second, 8))
    if scope == "global":
        both = lowest(torch.cat([first, second]), 14)
        wanted = ([i for i in both if i < 12], [i - 12 for i in both if i >= 12])
    assert (removed(result, "c1.weight"), removed(result, "c2.weight")) == wanted


def test_scores_fit_a_model_with_hooks() -> None:
    model = cnn()
    torch_prune.l1_unstructured(model.c2, "weight", 0.3)
    scores = taylor(model, [(X, Y)], F.cross_entropy, progress=False)
    already = model.c2.weight_mask == 0
    result = pruned(model, Unstructured(0.5, scores))
    mask = result.selection.mask["c2.weight"].unpack()
    assert not bool(mask[already].any()) and mask.numel() - int(mask.sum()) == round(0.5 * mask.numel())


@pytest.mark.parametrize("sparsity", [Unstructured(0.5, "l1"), Channels(0.5)])
def test_scores_of_another_model_are_refused(sparsity: Any) -> None:
    model = cnn()
    good = taylor(model, [(X, Y)], F.cross_entropy, progress=False)
    kind = type(sparsity)
    fewer = Scores({name: value for name, value in good.items() if name != "head.weight"}, method="taylor")
    other = Scores({**good, "head.weight": torch.ones(16, 5)}, method="taylor")
    for scores, word in ((fewer, "none of this name"), (other, r"shape \[16, 5\], the weight \[5, 16\]")):
        with pytest.raises(InputError, match=rf'taylor at "head.weight" \[5, 16\].*{word}'):
            pruned(model, kind(0.5, score=scores))
    broken = Scores({**good, "c2.weight": good["c2.weight"] / 0}, signed=True)
    with pytest.raises(InputError, match=r'"c2.weight".*NaN or infinite'):
        pruned(model, kind(0.5, score=broken))


def test_members_that_scores_lack_are_said() -> None:
    model = cnn()
    scores = Scores({n: p.detach().abs() for n, p in model.named_parameters() if p.dim() > 1}, method="mine")
    result = pruned(model, Channels(0.5, align=1, score=scores))
    rows = model.c1.weight.detach().double().abs().flatten(1).sum(1)
    columns = model.c2.weight.detach().double().abs().movedim(1, 0).flatten(1).sum(1)
    assert removed(result, "c1.weight") == lowest(rows + columns, 6)
    told = [
        note for note in result.report.notes if "scores of mine have nothing on 6 (c1.bias, c2.bias, n1.bias" in note
    ]
    assert len(told) == 1 and "which do not count" in told[0]


def test_rules_on_one_group_must_score_alike() -> None:
    def plan(one: Any, other: Any) -> Plan:
        rules = [("c1.weight", None, one), ("c2.weight", 1, other)]
        return Plan([Rule(name, Channels(0.5, dim=dim, align=1, score=score)) for name, dim, score in rules])

    model = cnn()
    scores = taylor(model, [(X, Y)], F.cross_entropy, progress=False)
    with pytest.raises(PlanError, match="unequal amounts"):
        fxprune.transform(model, plan(scores, "fpgm"), (X,), options=EAGER, progress=False)
    result = pruned(model, Channels(0.5, align=1, score=scores), pattern="c1.weight")
    same = Plan(
        [Rule("c1.weight", Channels(0.5, align=1, score=scores)), Rule("c1.*", Channels(0.5, align=1, score=scores))]
    )
    again = fxprune.transform(model, same, (X,), options=EAGER, progress=False)
    assert removed(again, "c1.weight") == removed(result, "c1.weight")


def test_tied_weights_are_found_by_any_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    model = randomised(model)
    x = torch.randn(4, 8)
    scores = taylor(model, [x], F.mse_loss, progress=False)
    assert torch.equal(scores["0.weight"], scores["2.weight"])
    for name in ("0.weight", "2.weight"):
        plan = Plan([Rule(name, Unstructured(0.5, scores))])
        result = fxprune.transform(model, plan, (x,), options=EAGER, progress=False)
        assert (
            lowest(scores[name].abs().flatten(), 32)
            == (~result.selection.mask["0.weight"].unpack()).flatten().nonzero().flatten().tolist()
        )


def test_a_score_that_no_pattern_knows() -> None:
    for make in (lambda: Unstructured(0.5, "bn_scale"), lambda: Channels(0.5, score="l1")):
        with pytest.raises(FxPruneError, match="no score is named"):
            make()
