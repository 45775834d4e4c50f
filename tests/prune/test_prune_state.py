"""Loading what a pruned model saved into a model that is not pruned."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from fxprune.errors import InputError
from fxprune.prune import load_state_dict


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Linear(5, 5), "c": nn.Linear(5, 5)})
        if tied:
            self.head["c"].weight = self.head["b"].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head["c"](self.head["b"](self.head["a"](self.body(x).mean((2, 3)))))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def pruned(tied: bool = False) -> Net:
    torch.manual_seed(1)
    net = Net(tied).eval()
    torch_prune.l1_unstructured(net.body[0], "weight", 0.5)
    torch_prune.l1_unstructured(net.body[0], "bias", 1)
    torch_prune.ln_structured(net.head["a"], "weight", 0.4, n=2, dim=0)
    torch_prune.l1_unstructured(net.head["a"], "weight", 0.5)
    torch_prune.random_unstructured(net.head["b"], "weight", 0.5)
    net(X)
    return net


def fresh(tied: bool = False) -> Net:
    torch.manual_seed(2)
    return Net(tied).eval()


def snapshot(model: nn.Module) -> tuple[list[str], list[Tensor], list[int], list[set[str]]]:
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    values = [value.clone() for value in model.state_dict().values()]
    return list(model.state_dict()), values, hooks, attributes


def same(a: tuple[list[str], list[Tensor], list[int], list[set[str]]], model: nn.Module) -> bool:
    b = snapshot(model)
    return a[0] == b[0] and all(map(torch.equal, a[1], b[1])) and a[2:] == b[2:]


def weight(module: nn.Module) -> Tensor:
    found = module.weight
    assert isinstance(found, Tensor)
    return found


def check(saved: nn.Module, loaded: nn.Module) -> None:
    assert list(loaded.state_dict()) == list(saved.state_dict())
    for ours, theirs in zip(loaded.state_dict().values(), saved.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    with torch.no_grad():
        assert torch.equal(loaded(X), saved(X))


@pytest.mark.parametrize("tied", [False, True])
def test_loads_into_an_unpruned_model(tied: bool) -> None:
    saved, loaded = pruned(tied), fresh(tied)
    result = load_state_dict(loaded, saved.state_dict())
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert torch.equal(weight(loaded.head["a"]), weight(saved.head["a"]))  # before any forward
    check(saved, loaded)
    assert torch_prune.is_pruned(loaded)
    if tied:
        assert loaded.head["c"].weight is loaded.head["b"].weight_orig


def test_both_owners_of_a_tied_weight_pruned() -> None:
    saved = pruned(tied=True)
    torch_prune.l1_unstructured(saved.head["c"], "weight", 0.3)
    loaded = fresh(tied=True)
    load_state_dict(loaded, saved.state_dict())
    check(saved, loaded)
    assert loaded.head["c"].weight_orig is loaded.head["b"].weight_orig


def test_loads_into_a_model_pruned_already() -> None:
    saved, loaded = pruned(), fresh()
    torch_prune.l1_unstructured(loaded.head["a"], "weight", 0.9)
    torch_prune.l1_unstructured(loaded.head["a"], "weight", 0.9)
    load_state_dict(loaded, saved.state_dict())
    assert torch.equal(weight(loaded.head["a"]), weight(saved.head["a"]))
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(X), saved(X))


def test_shared_module_is_pruned_once() -> None:
    def make() -> nn.Sequential:
        layer = nn.Linear(8, 8)
        return nn.Sequential(layer, nn.ReLU(), layer)

    saved, loaded = make(), make()
    torch_prune.l1_unstructured(saved[0], "weight", 0.5)
    load_state_dict(loaded, saved.state_dict())
    check(saved, loaded)
    assert len(loaded[0]._forward_pre_hooks) == 1


def test_data_parallel_prefix_both_ways() -> None:
    saved, loaded = pruned(), fresh()
    wrapped = nn.DataParallel(saved).state_dict()
    keys = list(wrapped)
    load_state_dict(loaded, wrapped)
    check(saved, loaded)
    assert list(wrapped) == keys
    load_state_dict(nn.DataParallel(fresh()), wrapped)


def test_plain_state_dict_and_names_that_only_look_pruned() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_orig = nn.Parameter(torch.randn(3))
            self.register_buffer("attn_mask", torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w_orig

    saved, loaded = Odd(), Odd()
    load_state_dict(loaded, saved.state_dict())
    assert torch.equal(loaded.w_orig, saved.w_orig) and not torch_prune.is_pruned(loaded)


def test_the_callers_tensors_are_not_kept_or_changed() -> None:
    saved, loaded = pruned(), fresh()
    state = copy.deepcopy(saved.state_dict())
    load_state_dict(loaded, state)
    with torch.no_grad():
        for tensor in state.values():
            tensor.zero_()
    check(saved, loaded)
    for hook in loaded.head["a"]._forward_pre_hooks.values():
        assert torch.equal(hook.mask, loaded.head["a"].weight_mask)
        assert not any(isinstance(value, Tensor) for value in vars(hook).values())  # one bit an element, no second copy


def test_not_strict_returns_what_has_no_place() -> None:
    saved, loaded = pruned(), fresh()
    state = saved.state_dict()
    state["tail.weight_orig"] = state["tail.weight_mask"] = torch.ones(2)
    del state["head.c.bias"]
    result = load_state_dict(loaded, state, strict=False)
    assert result.missing_keys == ["head.c.bias"]
    assert set(result.unexpected_keys) == {"tail.weight_orig", "tail.weight_mask"}


def _broken(kind: str) -> OrderedDict[str, object]:
    state: OrderedDict[str, object] = OrderedDict(pruned().state_dict())
    if kind == "no mask":
        del state["head.a.weight_mask"]
    elif kind == "no orig":
        del state["head.a.weight_orig"]
    elif kind == "mask shape":
        state["head.a.weight_mask"] = torch.ones(5, 3)
    elif kind == "orig shape":
        state["head.a.weight_orig"] = torch.ones(4, 5)
    elif kind == "not a tensor":
        state["head.a.weight_mask"] = [1, 0]
    elif kind == "unknown":
        state["heat.a.weight_orig"] = state.pop("head.a.weight_orig")
        state["heat.a.weight_mask"] = state.pop("head.a.weight_mask")
    elif kind == "ordinary shape":
        state["head.c.bias"] = torch.ones(7)
    elif kind == "ordinary missing":
        del state["head.c.bias"]
    elif kind == "ordinary unexpected":
        state["head.d.bias"] = torch.ones(7)
    return state


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no mask", ["head.a.weight_orig", '"head.a.weight_mask" is missing']),
        ("no orig", ["head.a.weight_mask", '"head.a.weight_orig" is missing']),
        ("mask shape", ["head.a.weight_mask", "[5, 3]", "[5, 4]"]),
        ("orig shape", ["head.a.weight_orig", "[4, 5]", "[5, 4]"]),
        ("not a tensor", ["head.a.weight_mask", "list"]),
        ("unknown", ['no parameter "heat.a.weight"', "head.a.weight"]),
        ("ordinary shape", ["head.c.bias", "size mismatch"]),
        ("ordinary missing", ["head.c.bias"]),
        ("ordinary unexpected", ["head.d.bias"]),
    ],
)
def test_errors_have_four_parts_and_leave_the_model(kind: str, words: list[str]) -> None:
    loaded = fresh()
    before, parameters = snapshot(loaded), list(map(id, loaded.parameters()))
    with pytest.raises(InputError) as error:
        load_state_dict(loaded, _broken(kind))  # pyright: ignore[reportArgumentType]
    assert error.value.what and error.value.where and error.value.why and error.value.do
    for word in words:
        assert word in str(error.value)
    assert same(before, loaded) and list(map(id, loaded.parameters())) == parameters


def test_other_bad_input() -> None:
    with pytest.raises(InputError, match="not a mapping"):
        load_state_dict(fresh(), [("a", 1)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="no shape yet"):
        load_state_dict(nn.LazyLinear(3), nn.Linear(2, 3).state_dict())
