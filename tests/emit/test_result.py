"""What a result is as a module: pickled, converted, put in train mode by what holds it, and asked for a weight."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fxprune
from fxprune import FxPruneError, FxPruneWarning, errors
from tests.oracle import assert_close
from tests.structured_oracle import Net

QUICK = {"options": {"compile": False}, "progress": False}


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def recurrent(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Net(lambda m, x: m.r(x)[0], r=kind(16, 8, batch_first=True))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": recurrent(nn.LSTM),
    "GRU": recurrent(nn.GRU),
    "RNN": recurrent(nn.RNN),
    "topk": lambda: Net(lambda m, x: torch.topk(m.l(x), 3), l=nn.Linear(16, 8)),
    "a named tuple": lambda: Net(lambda m, x: Pair(m.l(x), x), l=nn.Linear(16, 8)),
    "a dict": lambda: Net(lambda m, x: {"y": m.l(x), "rest": [x, None, 3]}, l=nn.Linear(16, 8)),
    "sizes": lambda: Net(lambda m, x: m.l(x) + torch.arange(x.shape[1])[:, None], l=nn.Linear(16, 8)),
    "attention": lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
}


def saved(result: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(result, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_result_is_the_result(name: str, trainable: bool) -> None:
    model, x = MODELS[name]().eval(), torch.randn(2, 5, 16)
    result = fxprune.transform(model, None, (x,), trainable=trainable, **QUICK)
    result(x)
    for other in (pickle.loads(pickle.dumps(result)), saved(result), copy.deepcopy(result)):
        for size in (1, 2, 3):
            y = torch.randn(size, 5, 16)
            got, expected = other(y), model(y)
            assert type(got) is type(expected)
            assert_close(
                [v.detach() for v in torch.utils._pytree.tree_leaves(got) if isinstance(v, Tensor)],
                [v.detach() for v in torch.utils._pytree.tree_leaves(expected) if isinstance(v, Tensor)],
            )
        assert [n.name for n in other.graph.nodes] == [n.name for n in result.graph.nodes]
        assert type(other).__mro__[1] is type(result).__mro__[1] and not other.training
        assert str(other.report) == str(result.report)


def pruned() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    prune.l1_unstructured(model[0], "weight", 0.9)
    return model, torch.randn(2, 64)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_a_result_is_not_converted_to_another_precision(convert: str, trainable: bool) -> None:
    model, x = pruned()
    result = fxprune.transform(model, None, (x,), trainable=trainable, **QUICK)
    before = {name: value.clone() for name, value in result.state_dict().items()}
    with pytest.raises(FxPruneError, match=r"cannot convert a result from torch.float32") as error:
        getattr(result, convert)()
    assert error.value.do
    assert all(torch.equal(value, before[name]) for name, value in result.state_dict().items())
    assert_close(result.to("cpu").float()(x).detach(), model(x).detach())


def test_train_mode_of_what_holds_a_result_leaves_it_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    model, x = pruned()
    result = fxprune.transform(model, None, (x,), **QUICK)
    whole = nn.Sequential(result, nn.Dropout(0.5))
    with pytest.warns(FxPruneWarning, match="trainable=True") as told:
        whole.train()
        whole.train()
    assert len(told) == 1
    assert whole[1].training and not any(module.training for module in result.modules())
    assert_close(result(x), model(x).detach())


def test_a_report_is_asked_for_a_weight_that_it_has_not() -> None:
    model, x = pruned()
    report = fxprune.transform(model, None, (x,), **QUICK).report
    assert report["0.weight"].name == "0.weight"
    with pytest.raises(KeyError, match=r"Near it: 0.weight"):
        report["0.wieght"]
    with pytest.raises(KeyError, match=r"report.weights"):
        report["typo"]
