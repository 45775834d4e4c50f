"""transform against the oracle: forms of input, sizes, kinds of weights, calls, copies, and the untouched model."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import fxprune
from fxprune import FxPruneError, Plan, Rule, Unstructured
from fxprune.errors import InputError
from tests.oracle import COMPILED, HALF, QUICK, Apply, assert_close, assert_right, quick, snapshot, zeroed


class Net(nn.Module):
    """Attention-like: linears of different sizes, one without a bias, an activation and a softmax."""

    mask: Tensor

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.query = nn.Linear(width, 32)
        self.key = nn.Linear(width, 32, bias=False)
        self.out = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))
        self.register_buffer("mask", torch.full((600, 600), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2]
        scores = self.query(x) @ self.key(x).transpose(-1, -2) + self.mask[:size, :size]
        return self.out(scores.softmax(-1) @ x)


def net(width: int = 24) -> Any:
    return Net(width).eval()


@pytest.fixture(autouse=True)
def compiled_code_does_not_pile_up() -> Iterator[None]:
    yield
    torch._dynamo.reset()


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


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [QUICK, COMPILED], ids=["eager", "compiled"])
def test_every_number_of_tokens(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(48, 72), nn.GELU(), nn.Linear(72, 40, bias=False), nn.SiLU()).eval()
    result: Any = fxprune.transform(model, HALF, (torch.randn(8, 48),), options=options, progress=False)
    for tokens in (1, 7, 8, 31, 64, 65, 512):
        assert_right(result, model, torch.randn(tokens, 48))


@pytest.mark.parametrize("tokens", [1, 7, 8, 31, 64, 65, 512])
def test_captured_at_every_number_of_tokens(tokens: int) -> None:
    model = net()
    result = quick(model, torch.randn(1, tokens, 24))
    for batch in (1, 3):
        assert_right(result, model, torch.randn(batch, tokens, 24))


def test_compiled_with_another_batch() -> None:
    model = net()
    result: Any = fxprune.transform(model, HALF, (torch.randn(1, 7, 24),), options=COMPILED, progress=False)
    assert "torch.compile" in result.report.compiled
    for batch in (1, 2, 9):
        assert_right(result, model, torch.randn(batch, 7, 24))


def test_a_dynamic_sequence() -> None:
    model = net()
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    result = quick(model, torch.randn(2, 16, 24), dynamic_shapes=shapes)
    for batch, length in ((2, 16), (1, 3), (3, 65), (1, 512)):
        assert_right(result, model, torch.randn(batch, length, 24))


def test_a_fixed_size_is_refused() -> None:
    model = Apply(lambda linear, x: linear(x).sum(1) / x.shape[1]).eval()
    result = quick(model, torch.randn(2, 128, 16))
    with pytest.raises(InputError, match=r"shape \[2, 64, 16\].*128") as error:
        result(torch.randn(2, 64, 16))
    assert error.value.do
    assert_right(result, model, torch.randn(3, 128, 16))


def test_a_division_by_a_dynamic_size_follows_it() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).sum(1) / x.shape[1]

    model = Mean().eval()
    result = quick(model, torch.randn(2, 128, 16), dynamic_shapes={"x": {0: Dim.AUTO, 1: Dim.AUTO}})
    for size in (128, 64, 1):
        assert_right(result, model, torch.randn(2, size, 16))


def test_tune_for_several_sizes() -> None:
    model = nn.Sequential(nn.Linear(48, 72)).eval()
    options = {**QUICK, "tune_for": [1, 8, 64]}
    result: Any = fxprune.transform(model, HALF, (torch.randn(8, 48),), options=options, progress=False)
    assert_right(result, model, torch.randn(64, 48))


# --- weights -----------------------------------------------------------------------------------------------------


def test_zero_rows_a_zero_weight_and_no_bias() -> None:
    layers = nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24, bias=False), nn.Linear(24, 8)
    model: Any = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[0].weight[3:9] = 0
        model[0].weight[:, 2] = 0
        model[2].weight.zero_()
    for plan in (None, HALF, Plan([Rule("*", Unstructured(1.0))])):
        result = quick(model, torch.randn(5, 16), plan=plan)
        assert_right(result, model, torch.randn(7, 16))


def test_non_contiguous_inputs() -> None:
    model = net()
    result = quick(model, torch.randn(2, 7, 24))
    assert_right(result, model, torch.randn(7, 2, 24).transpose(0, 1))
    assert_right(result, model, torch.randn(2, 24, 7).transpose(1, 2))
    assert_right(result, model, torch.randn(2, 14, 48)[:, ::2, ::2])
    assert_right(result, model, torch.randn(1, 7, 24).expand(4, 7, 24))
    assert_right(quick(model, torch.randn(2, 24, 7).transpose(1, 2)), model, torch.randn(2, 7, 24))
    assert_right(quick(model, torch.randn(1, 7, 24).expand(4, 7, 24)), model, torch.randn(2, 7, 24))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(self.embedding(ids)))))


def test_tied_weights() -> None:
    model, ids = Tied().eval(), torch.randint(0, 50, (2, 9))
    before = snapshot(model)
    result = quick(model, ids)
    assert snapshot(model) == before
    assert sorted(w.name for w in result.report.weights) == ["embedding.weight", "first.weight"]
    assert result.report["first.weight"].layout == "nonzeros"
    assert result.report["embedding.weight"].layout == "dense"
    assert "embedding" in str(result.report)
    assert_right(result, model, ids)
    by_alias = quick(model, ids, plan=Plan([Rule("second.weight", Unstructured(0.9))]))
    assert by_alias.report["first.weight"].reached == pytest.approx(0.9, abs=0.01)
    assert_right(by_alias, model, ids)


def test_a_module_used_twice() -> None:
    model = Apply(lambda linear, x: linear(torch.relu(linear(x))) + F.silu(linear(x[:, :1]))).eval()
    result = quick(model, torch.randn(3, 5, 16))
    assert result.report["linear.weight"].layout == "nonzeros"
    assert len(result.report["linear.weight"].lowered.nodes) == 3
    assert_right(result, model, torch.randn(4, 5, 16))


def test_float64_and_bfloat16_stay_dense() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval().to(dtype)
        x = torch.randn(5, 16, dtype=dtype)
        result = quick(model, x)
        assert {w.layout for w in result.report.weights} == {"dense"}
        assert all(str(dtype) in w.refused["nonzeros"] for w in result.report.weights)
        assert str(dtype) in str(result.report)
        assert_right(result, model, x)
        assert_right(result, model, torch.randn(9, 16, dtype=dtype))


class Products(nn.Module):
    """Weights as [i, o] or [o, i] under the ops that multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Parameter(torch.randn(16, 24)) for _ in range(4))
        self.e = nn.Parameter(torch.randn(24, 16))
        self.bias = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        return (
            torch.addmm(self.bias, flat, self.a),
            torch.mm(flat, self.b),
            x @ self.c + self.bias,
            torch.einsum("...i,io->...o", x, self.d),
            x @ self.e.t(),
        )


def test_every_op_that_multiplies_by_a_constant() -> None:
    model = Products().eval()
    result = quick(model, torch.randn(2, 3, 16))
    layouts = {w.name: w.layout for w in result.report.weights}
    assert {layouts[name] for name in "abce"} == {"nonzeros"}
    assert_right(result, model, torch.randn(4, 3, 16))


def test_a_weight_that_multiplies_from_the_left_and_the_right() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w + (self.w @ x.t()).t() + x @ (self.w.t() @ self.w)

    model = Both().eval()
    result = quick(model, torch.randn(3, 16))
    assert result.report["w"].layout == "dense"
    assert_right(result, model, torch.randn(5, 16))


class OddBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.one = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(1))
        self.both = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scaled = torch.addmm(self.one.expand(8), x, self.weight.t(), beta=0.5, alpha=2)
        return (
            F.linear(x, self.weight, self.one),
            F.linear(x, self.weight, self.one.expand(8)),
            scaled,
            torch.addmm(self.both, x[:3], self.weight.t()),
        )


def test_a_bias_that_broadcasts_keeps_the_weight_dense() -> None:
    model = OddBias().eval()
    result = quick(model, torch.randn(4, 16))
    assert result.report["weight"].layout == "dense"
    assert_right(result, model, torch.randn(6, 16))


def test_a_bias_computed_from_the_input() -> None:
    model = Apply(lambda linear, x: F.linear(x, linear.weight, x.mean(0))).eval()
    assert_right(quick(model, torch.randn(3, 16)), model, torch.randn(5, 16))


def test_one_dimensional_inputs() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    result = quick(model, torch.randn(16))
    assert_right(result, model, torch.randn(16))
    with pytest.raises(InputError):
        result(torch.randn(2, 16))


def test_a_weight_that_leaves_the_graph_as_an_output() -> None:
    model = Apply(lambda linear, x: (linear(x), linear.weight.sum())).eval()
    assert_right(quick(model, torch.randn(3, 16)), model, torch.randn(3, 16))


def test_a_size_that_only_a_run_tells() -> None:
    model = Apply(lambda linear, x: linear(x[x.sum(1) > 0])).eval()
    result = quick(model, torch.randn(30, 16))
    assert_right(result, model, torch.randn(50, 16))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_stacks(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 70), min_size=2, max_size=5), label="widths")
    torch.manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers.append(nn.Linear(i, o, bias=data.draw(st.booleans(), label="bias")))
        activation = data.draw(st.sampled_from(["none", "relu", "gelu", "tanh", "silu", "norm"]), label="activation")
        layers += {
            "none": [], "relu": [nn.ReLU()], "gelu": [nn.GELU()], "tanh": [nn.GELU(approximate="tanh")],
            "silu": [nn.SiLU()], "norm": [nn.LayerNorm(o)],
        }[activation]  # fmt: skip
    model = nn.Sequential(*layers).eval()
    amount = data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), label="amount")
    scope = data.draw(st.sampled_from(["local", "global"]), label="scope")
    tokens = data.draw(st.integers(1, 20), label="tokens")
    result = quick(model, torch.randn(tokens, widths[0]), plan=Plan([Rule("*", Unstructured(amount), scope=scope)]))
    assert_right(result, model, torch.randn(data.draw(st.integers(1, 70), label="other"), widths[0]))


# --- the user's model, random numbers and inputs stay as they were ----------------------------------------------------


def test_measuring_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(768, 1024), nn.ReLU(), nn.Linear(1024, 768)).eval()
    model[2].weight.requires_grad_(False)
    x = torch.randn(64, 768)
    kept, before, random = dict(vars(x)), snapshot(model), torch.random.get_rng_state()
    result: Any = fxprune.transform(model, Plan([Rule("*", Unstructured(0.97))]), (x,), progress=False)
    assert snapshot(model) == before
    assert torch.equal(random, torch.random.get_rng_state())
    assert vars(x) == kept
    assert_right(result, model, x)


def test_attributes_that_forward_sets_are_put_back() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls, self.last = nn.Linear(16, 8), 0, None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = self.linear(x)
            return self.last * 2

    model = Remembers().eval()
    before = snapshot(model)
    result = quick(model, torch.randn(3, 16))
    assert snapshot(model) == before and model.calls == 0 and model.last is None
    assert_right(result, model, torch.randn(3, 16))


def test_hooks_of_the_user_run_and_stay() -> None:
    model, x = net(), torch.randn(2, 7, 24)
    model.query.register_forward_hook(lambda _, __, out: out * 2)
    model.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    before = snapshot(model)
    result = quick(model, x)
    assert snapshot(model) == before
    assert_right(result, model, x)
