"""transform against the oracle: forms of input, from plain models to exported programs and selections."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import fxprune
from fxprune import FxPruneError, Plan, Rule, Unstructured
from fxprune.errors import InputError
from tests.oracle import HALF, QUICK, Apply, assert_close, assert_right, quick, snapshot, zeroed
from tests.transform.transform_models import compiled_code_does_not_pile_up as compiled_code_does_not_pile_up
from tests.transform.transform_models import net

# --- forms of input ----------------------------------------------------------------------------------------------


def test_a_plain_model_with_a_plan() -> None:
    model, x = net(), torch.randn(2, 7, 24)
    before = snapshot(model)
    result = quick(model, x)
    assert torch.fx.GraphModule in type(result).__mro__
    assert {w.layout for w in result.report.weights} == {"nonzeros"}
    assert len(result.report.weights) == 4
    assert all(w.reached == 0.5 == w.asked for w in result.report.weights)
    assert_right(result, model, x)
    assert_right(result, model, torch.randn(5, 7, 24))
    assert snapshot(model) == before


def test_the_oracle_differs_from_the_dense_model() -> None:
    model, x = net(), torch.randn(2, 7, 24)
    result = quick(model, x)
    assert (zeroed(model, result)(x) - model(x)).abs().max() > 0.01 * model(x).abs().max()


def hooked(*, iterated: bool, everywhere: bool) -> Any:
    model = net()
    if everywhere:
        linears = [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear)]
        torch_prune.global_unstructured(linears, torch_prune.L1Unstructured, amount=0.6)
    else:
        torch_prune.l1_unstructured(model.query, "weight", 0.5)
        torch_prune.random_unstructured(model.out[0], "weight", 0.3)
    if iterated:
        torch_prune.l1_unstructured(model.query, "weight", 0.5)
        torch_prune.ln_structured(model.query, "weight", 0.2, n=2, dim=0)
        torch_prune.l1_unstructured(model.query, "bias", 0.5)
    model(torch.randn(1, 3, 24))
    return model


@pytest.mark.parametrize("iterated", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_still_on(iterated: bool, everywhere: bool) -> None:
    model, x = hooked(iterated=iterated, everywhere=everywhere), torch.randn(2, 9, 24)
    before = snapshot(model)
    result = quick(model, x, plan=None)
    assert snapshot(model) == before
    assert_close(result(x), model(x).detach())
    assert result.report["query.weight"].asked is None
    expected = float((model.query.weight_mask == 0).float().mean())
    assert result.report["query.weight"].reached == pytest.approx(expected)
    assert result.report["query.weight"].layout == "nonzeros"


def test_a_plan_on_top_of_hooks_keeps_their_zeros() -> None:
    model, x = hooked(iterated=True, everywhere=False), torch.randn(2, 9, 24)
    before = snapshot(model)
    result = quick(model, x, plan=Plan([Rule("query.weight", Unstructured(0.9))]))
    assert snapshot(model) == before
    assert result.report["query.weight"].reached == pytest.approx(0.9, abs=1e-3)
    keep = result.selection.mask["query.weight"].unpack()
    assert not bool((keep & (model.query.weight_mask == 0)).any())
    assert result.report["out.0.weight"].reached == pytest.approx(0.3, abs=1e-3)


def test_zeros_after_prune_remove() -> None:
    model, x = hooked(iterated=False, everywhere=True), torch.randn(2, 9, 24)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            torch_prune.remove(module, "weight")
    before = snapshot(model)
    result = quick(model, x, plan=None)
    assert_right(result, model, x)
    assert_close(result(x), model(x).detach())
    assert {w.layout for w in result.report.weights} == {"nonzeros"}
    assert snapshot(model) == before


class Masked(nn.Module):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def test_a_parametrization_mask() -> None:
    model, x = net(), torch.randn(2, 9, 24)
    other = net()
    for module in (model.query, model.out[0]):
        parametrize.register_parametrization(module, "weight", Masked((torch.rand_like(module.weight) > 0.7).float()))
    before, kind = snapshot(model), type(model.query)
    result = quick(model, x, plan=None)
    assert_close(result(x), model(x).detach())
    assert snapshot(model) == before
    assert type(model.query) is kind and type(other.query) is nn.Linear
    assert sorted(w.name for w in result.report.weights) == ["out.0.weight", "query.weight"]
    assert result.report["query.weight"].layout == "nonzeros"


def test_a_state_dict_with_orig_and_mask() -> None:
    saved, x = hooked(iterated=True, everywhere=False), torch.randn(2, 9, 24)
    model = net()
    fxprune.prune.load_state_dict(model, saved.state_dict())
    result = quick(model, x, plan=None)
    assert_close(result(x), saved(x).detach())


def test_graph_modules() -> None:
    model, x = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), torch.randn(4, 24)
    for graph in (torch.fx.symbolic_trace(model), torch.export.export(model, (x,)).module()):
        result = quick(graph, x)
        assert [w.name for w in result.report.weights] == ["0.weight", "2.weight"]
        assert_right(result, model, x)


def test_an_exported_program() -> None:
    model, x = net(), torch.randn(2, 7, 24)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    state = {k: v.clone() for k, v in exported.state_dict.items()}
    for examples in (None, (x,)):
        result: Any = fxprune.transform(exported, HALF, examples, options=QUICK, progress=False)
        assert_right(result, model, x)
        assert_right(result, model, torch.randn(3, 7, 24))
    assert all(torch.equal(state[k], v) for k, v in exported.state_dict.items())


def test_an_exported_program_of_fixed_sizes_refuses_others() -> None:
    model, x = net(), torch.randn(2, 7, 24)
    result: Any = fxprune.transform(torch.export.export(model, (x,)), HALF, (x,), options=QUICK, progress=False)
    with pytest.raises(InputError, match=r"\[2, 7, 24\]"):
        result(torch.randn(3, 7, 24))


def test_without_example_inputs_the_first_call_transforms() -> None:
    model, x = net(), torch.randn(2, 7, 24)
    before = snapshot(model)
    result: Any = fxprune.transform(model, HALF, options=QUICK, progress=False)
    assert torch.fx.GraphModule in type(result).__mro__
    assert result.report.pending and "pending" in str(result.report)
    for act in (copy.deepcopy, pickle.dumps):
        with pytest.raises(FxPruneError, match="has not been called"):
            act(result)
    first = result(x)
    assert not result.report.pending and len(result.report.weights) == 4
    assert_close(first, zeroed(model, result)(x).detach())
    assert_right(result, model, torch.randn(5, 7, 24))
    assert snapshot(model) == before


def test_pending_takes_keyword_arguments_and_survives_a_failed_first_call() -> None:
    model = Apply(lambda linear, a, *, b: linear(a) - b).eval()
    result: Any = fxprune.transform(model, HALF, options=QUICK, progress=False)
    with pytest.raises(InputError, match="cannot run the model"):
        result(torch.randn(2, 3), b=torch.randn(2, 16))
    assert result.report.pending
    a, b = torch.randn(2, 16), torch.randn(2, 16)
    result(a, b=b)
    assert_right(result, model, a, b=b)


def test_a_selection_replays() -> None:
    model, x = net(), torch.randn(2, 7, 24)
    first = quick(model, x, plan=Plan([Rule("*", Unstructured(0.7), scope="global")]))
    again = quick(model, x, plan=None, selection=first.selection)
    assert torch.equal(again(x), first(x))
    assert [w.reached for w in again.report.weights] == [w.reached for w in first.report.weights]


def test_without_a_plan_an_unpruned_model_stays_dense() -> None:
    model, x = net(), torch.randn(2, 7, 24)
    result = quick(model, x, plan=None)
    assert result.report.weights == []
    assert_close(result(x), model(x).detach())
