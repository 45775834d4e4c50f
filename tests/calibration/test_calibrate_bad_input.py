"""What calibration refuses, and that the error names what was given, where, and what is allowed instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import Blocks, Channels, Plan, Rule, SemiStructured, Unstructured
from fxprune.calibration.calibrate import calibrate
from fxprune.calibration.solvers import METHODS
from fxprune.errors import FxPruneError, InputError, PlanError
from tests.calibration.calibrate_case import HALF, model, tensors_of
from tests.structured_oracle import net


def refused(
    model: Any, plan: Any, data: Any, *words: str, kind: type[FxPruneError] = InputError, **more: Any
) -> FxPruneError:
    """The error of a calibration, all four parts of which are said and hold these words among them."""
    with pytest.raises(kind) as caught:
        calibrate(model, plan, data, progress=False, **more)
    error = caught.value
    text = " | ".join((error.what, error.where, error.why, error.do))
    for word in words:
        assert word in text, text
    assert str(error) and error.what
    return error


@pytest.mark.parametrize(
    "data, word",
    [
        (torch.zeros(4, 16), "Tensor"),
        ({"x": torch.zeros(4, 16)}, "dict"),
        (nn.Linear(16, 4), "Linear"),
        ("texts", "str"),
        (b"bytes", "bytes"),
        (7, "int"),
        (None, "NoneType"),
        (len, "builtin_function_or_method"),
    ],
)
def test_data_that_are_no_series(data: Any, word: str) -> None:
    dense, _ = model("linear")
    error = refused(dense, HALF, data, f"from a {word}", "batches=", "not a series of batches", "[batch]")
    assert error.where == "batches="


@pytest.mark.parametrize("data", [[], (), iter([]), (x for x in ())])
def test_no_data(data: Any) -> None:
    refused(model("linear")[0], HALF, data, "without data", "batches=", "no batches", "at least one")


@pytest.mark.parametrize(
    "item, word", [(3, "int"), ("text", "str"), ([1, 2], "list"), ({1: torch.ones(2)}, "dict"), (None, "NoneType")]
)
def test_items_of_the_wrong_form(item: Any, word: str) -> None:
    dense, x = model("linear")
    refused(dense, HALF, [x, item], f"use a {word}", "batches[1]", "no batch of inputs", "tuple of arguments")


def test_empty_batches() -> None:
    dense, x = model("linear")
    refused(dense, HALF, [x, x[:0]], "empty batch", "batches[1]", "size 0", "Leave it out")


def test_labels_among_the_inputs() -> None:
    dense, x = model("linear")
    error = refused(dense, HALF, [(x, torch.zeros(24))], "batches[0]", "[24, 16]", "TypeError", "without labels")
    assert isinstance(error.__cause__, TypeError)
    refused(dense, HALF, [{"x": x, "labels": x}], "batches[0]", "without labels")
    refused(dense, HALF, [torch.zeros(4, 9)], "batches[0]", "[4, 9] torch.float32", "RuntimeError")


def test_later_batches_of_another_form() -> None:
    dense, x = model("linear")
    for other in (x.double(), torch.zeros(4, 16, 3), x[:, :9], (x, x), {"other": x}):
        refused(dense, HALF, [x, x, other], "batches[2]", "like the first")


@pytest.mark.parametrize("samples", [0, -1, 2.0, True, "8"])
def test_samples_that_are_no_number(samples: Any) -> None:
    dense, x = model("linear")
    refused(dense, HALF, [x], f"samples={samples!r}", "1 or more", samples=samples)


def test_fewer_samples_than_asked() -> None:
    dense, x = model("linear")
    refused(dense, HALF, x.split(5), "on 25 samples", "batches=", "there are 24", "fewer", samples=25)


def test_sizes_that_cannot_vary() -> None:
    dense = net(lambda m, x: m.b(m.a(x).flatten(1)), a=nn.Linear(8, 8), b=nn.Linear(24, 4))
    refused(dense, Plan([Rule("*", Unstructured(0.5))]), [torch.zeros(4, 3, 8), torch.zeros(4, 5, 8)], "batches[1]")

    def fixed(m: Any, x: Tensor) -> Tensor:
        return m.a(x) + torch.ones(4, 1)

    one = net(fixed, a=nn.Linear(8, 8))
    refused(one, HALF, [torch.zeros(4, 8), torch.zeros(3, 8)], "batches[1]", "dynamic_shapes=")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", METHODS)
def test_activations_that_are_not_finite(value: float, method: str) -> None:
    dense, x = model("tokens")
    x[17, 3, 2] = value
    error = refused(
        dense, HALF, x.split(6), '"a.weight"', "dense model", "batches[2]", "with the model itself", method=method
    )
    assert "node linear" in error.where


def test_the_first_layer_that_is_not_finite_is_named() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x).sqrt())

    dense = net(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 4))
    refused(dense, HALF, [torch.randn(20, 8)], '"b.weight"', "dense model", "batches[0]")


def test_only_the_pruned_side_is_not_finite() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(1 / m.a(x))

    dense = net(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 4))
    with torch.no_grad():
        dense.a.bias.zero_()
    plan = Plan([Rule("a.weight", Unstructured(1.0)), Rule("b.weight", Unstructured(0.5))])
    x = torch.randn(20, 8)
    x = torch.cat([x, -x])  # of mean zero, so that a layer without weights answers zero
    refused(dense, plan, [x], '"b.weight"', "pruned model", "NaN or infinite", "prune less")


@pytest.mark.parametrize("plan", [HALF, Plan([Rule("*", Unstructured(0.5), scope="global")])])
def test_nan_at_a_weight_that_is_read_twice(plan: Plan) -> None:
    dense = net(lambda m, x: m.b(m.a(m.a(x).relu())), a=nn.Linear(8, 8), b=nn.Linear(8, 4))
    x = torch.randn(20, 8)
    x[3, 3] = torch.nan
    refused(dense, plan, [x], '"a.weight"', "dense model", "batches[0]")


@pytest.mark.parametrize("method", METHODS[1:])
def test_inputs_whose_squares_are_not_finite(method: str) -> None:
    dense = net(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(8, 8), b=nn.Linear(8, 4))
    refused(dense, HALF, [torch.randn(20, 8) * 1e25], '"a.weight"', "squares are not finite", "Scale", method=method)
    again = net(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(8, 8))
    refused(again, HALF, [torch.randn(20, 8) * 1e25], '"a.weight"', "squares are not finite", method=method)


def test_data_on_another_device() -> None:
    dense, x = model("linear")
    refused(dense, HALF, [x.to("meta")], "another device", "batches[0]", "on meta", "model on cpu", "Move")
    refused(dense, HALF, [x, x.to("meta")], "another device", "batches[1]")


@pytest.mark.parametrize("method", ["obs", "", None, 3, "Refit"])
def test_unknown_methods(method: Any) -> None:
    dense, x = model("linear")
    refused(dense, HALF, [x], f"method {method!r}", *METHODS, method=method)


@pytest.mark.parametrize("plan", [0.5, "plan", Unstructured(0.5), [Rule("*", Unstructured(0.5))], {}])
def test_plans_that_are_none(plan: Any) -> None:
    dense, x = model("linear")
    refused(dense, plan, [x], type(plan).__name__, "as a plan", "Plan([Rule(")


@pytest.mark.parametrize("memory", [-1, "4GB", float("nan"), True])
def test_memory_that_is_no_number(memory: Any) -> None:
    dense, x = model("linear")
    refused(dense, HALF, [x], f"memory={memory!r}", "0 or more", memory=memory)


def test_memory_without_end() -> None:
    dense, x = model("linear")
    assert calibrate(dense, HALF, [x], memory=float("inf"), progress=False).fits


def test_plans_that_weights_cannot_meet() -> None:
    dense, x = model("linear")
    odd = net(lambda m, x: m.a(x), a=nn.Linear(10, 6))
    for how, word in ((SemiStructured(2, 4), "multiple of 4"), (Blocks(0.5, (4, 4)), "multiple of 4")):
        refused(odd, Plan([Rule("a.weight", how)]), [torch.zeros(4, 10)], '"a.weight"', word, kind=PlanError)
    missing = Plan([Rule("nothing.weight", Unstructured(0.5))])
    refused(dense, missing, [x], "nothing.weight", kind=PlanError)
    refused(dense, Plan([Rule("c.weight", Channels(0.5, dim=0))]), [x], "c.weight", kind=PlanError)


def test_models_that_are_none() -> None:
    dense, x = model("linear")
    refused(dense.train(), HALF, [x], "training mode", "eval()")
    dense.eval()
    refused(torch.compile(dense), HALF, [x], "compiled")
    exported = torch.export.export(dense, (x,))
    refused(exported, HALF, [x], "ExportedProgram", "model itself")
    refused(F.relu, HALF, [x], "not a torch.nn.Module")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(16, 4)).eval()
    refused(empty, HALF, [x.to("meta")], "meta device", '"0.weight"')
    with torch.no_grad():
        dense.a.weight[0, 0] = torch.nan
    refused(dense, HALF, [x], '"a.weight"', "NaN")


def test_models_that_draw_or_remember() -> None:
    x = torch.randn(8, 8)
    drawing = net(lambda m, x: m.a(x) * torch.rand_like(x), a=nn.Linear(8, 8))
    with pytest.raises(FxPruneError, match="random"):
        calibrate(drawing, HALF, [x], progress=False)

    def count(m: Any, x: Tensor) -> Tensor:
        m.calls.add_(1)
        return m.a(x) * m.calls

    counting = net(count, a=nn.Linear(8, 8), calls=torch.zeros(()))
    before = tensors_of(counting)
    refused(counting, HALF, [x], '"calls"', "keeps state")
    assert tensors_of(counting) == before


def test_a_refusal_leaves_the_model_alone() -> None:
    dense, x = model("conv and norm")
    before = tensors_of(dense)
    x[3, 0, 0, 0] = torch.nan
    refused(dense, HALF, [x], '"c1.weight"')
    assert tensors_of(dense) == before
