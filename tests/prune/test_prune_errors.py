"""Mistakes: the built-in type that torch raises, an FxPruneError with its parts, and the module exactly as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as theirs
from torch import nn

import fxprune.prune as ours
from fxprune.errors import FxPruneError
from tests.prune.module_snapshot import snapshot

Case = Callable[[Any, nn.Module], object]


def layer() -> nn.Module:
    return nn.Linear(4, 3)


def method(lib: Any, kind: str | None, mask: object = None) -> Any:
    """A user's own method on either library's base class."""

    class Own(lib.BasePruningMethod):  # pyright: ignore
        def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> object:
            if isinstance(mask, Exception):
                raise mask
            return default_mask if mask is None else mask

    if kind is not None:
        Own.PRUNING_TYPE = kind
    return Own


def twice_hooked(lib: Any, m: nn.Module) -> None:
    lib.identity(m, "weight")
    m.register_forward_pre_hook(next(iter(m._forward_pre_hooks.values())))


# what is done first, and then refused; each names the type that torch raises today
AMOUNTS: dict[str, tuple[Any, type[Exception]]] = {
    "a string": ("half", TypeError),
    "None": (None, TypeError),
    "a tensor": (torch.tensor(0.5), TypeError),
    "complex": (1j, TypeError),
    "above one": (1.5, ValueError),
    "below zero": (-0.1, ValueError),
    "a negative int": (-1, ValueError),
    "not a number": (float("nan"), ValueError),
    "more than there are": (13, ValueError),
}
CASES: dict[str, tuple[Case, type[Exception]]] = {
    "structured 1-D": (lambda p, m: p.ln_structured(m, "bias", 1, 2, 0), ValueError),
    "random structured 1-D": (lambda p, m: p.random_structured(m, "bias", 1, 0), ValueError),
    "dim too large": (lambda p, m: p.ln_structured(m, "weight", 1, 2, 2), IndexError),
    "dim too small": (lambda p, m: p.random_structured(m, "weight", 1, -3), IndexError),
    "dim a string": (lambda p, m: p.ln_structured(m, "weight", 1, 2, "a"), TypeError),
    "dim a float": (lambda p, m: p.ln_structured(m, "weight", 1, 2, 0.0), TypeError),
    "unknown norm": (lambda p, m: p.ln_structured(m, "weight", 0, "l2", 0), RuntimeError),
    "complex norm": (lambda p, m: p.ln_structured(m, "weight", 1, 1j, 0), RuntimeError),
    "norm a list": (lambda p, m: p.ln_structured(m, "weight", 1, [2], 0), TypeError),
    "no such name": (lambda p, m: p.identity(m, "wieght"), AttributeError),
    "name an int": (lambda p, m: p.identity(m, 3), TypeError),
    "name dotted": (lambda p, m: p.identity(nn.Sequential(m), "0.weight"), AttributeError),
    "bias is None": (lambda p, m: p.l1_unstructured(nn.Linear(2, 2, bias=False), "bias", 1), TypeError),
    "a buffer": (lambda p, m: p.l1_unstructured(nn.BatchNorm1d(3), "running_mean", 1), TypeError),
    "an attribute": (lambda p, m: p.identity(m, "in_features"), TypeError),
    "no module": (lambda p, m: p.identity(3, "weight"), AttributeError),
    "lazy": (lambda p, m: p.l1_unstructured(nn.LazyLinear(2), "weight", 0.5), ValueError),
    "scores of another shape": (
        lambda p, m: p.l1_unstructured(m, "weight", 1, importance_scores=torch.ones(12)),
        AssertionError,
    ),
    "scores a list": (lambda p, m: p.l1_unstructured(m, "weight", 1, importance_scores=[1]), AttributeError),
    "mask of another shape": (lambda p, m: p.custom_from_mask(m, "weight", torch.ones(4)), AssertionError),
    "mask a list": (lambda p, m: p.custom_from_mask(m, "weight", [1, 0]), AttributeError),
    "not pruned": (lambda p, m: p.remove(m, "weight"), ValueError),
    "remove from no module": (lambda p, m: p.remove(None, "weight"), AttributeError),
    "is_pruned of no module": (lambda p, m: p.is_pruned(3), AttributeError),
    "unknown kind": (lambda p, m: (p.identity(m, "weight"), method(p, "odd").apply(m, "weight")), ValueError),
    "no kind": (lambda p, m: (p.identity(m, "weight"), method(p, None).apply(m, "weight")), AttributeError),
    "no dim": (lambda p, m: (p.identity(m, "weight"), method(p, "structured").apply(m, "weight")), AttributeError),
    "own mask wrong": (lambda p, m: method(p, "global", torch.ones(2)).apply(m, "weight"), RuntimeError),
    "own mask no tensor": (lambda p, m: method(p, "global", 3).apply(m, "weight"), TypeError),
    "not applied": (lambda p, m: p.L1Unstructured(1).apply_mask(m), AttributeError),
    "not applied, removed": (lambda p, m: p.L1Unstructured(1).remove(m), AttributeError),
    "bare scores": (
        lambda p, m: p.L1Unstructured(1).prune(torch.ones(3), importance_scores=torch.ones(2)),
        AssertionError,
    ),
    "bare list": (lambda p, m: p.L1Unstructured(1).prune([1]), TypeError),
    "container of no method": (lambda p, m: p.PruningContainer(3), AttributeError),
}
POOLED: dict[str, tuple[Case, type[Exception]]] = {
    "no iterable": (lambda p, m: p.global_unstructured(3, p.L1Unstructured, amount=1), TypeError),
    "empty": (lambda p, m: p.global_unstructured([], p.L1Unstructured, amount=1), ValueError),
    "modules alone": (lambda p, m: p.global_unstructured([m], p.L1Unstructured, amount=1), TypeError),
    "three parts": (lambda p, m: p.global_unstructured([(m, "weight", 1)], p.L1Unstructured, amount=1), ValueError),
    "a path": (lambda p, m: p.global_unstructured([("a", "weight")], p.L1Unstructured, amount=1), AttributeError),
    "no such name": (lambda p, m: p.global_unstructured([(m, "w")], p.L1Unstructured, amount=1), AttributeError),
    "name an int": (lambda p, m: p.global_unstructured([(m, 3)], p.L1Unstructured, amount=1), TypeError),
    "None": (
        lambda p, m: p.global_unstructured([(nn.Linear(2, 2, bias=False), "bias")], p.L1Unstructured, amount=1),
        AttributeError,
    ),
    "scores a list": (
        lambda p, m: p.global_unstructured([(m, "weight")], p.L1Unstructured, importance_scores=[1], amount=1),
        TypeError,
    ),
    "scores of another shape": (
        lambda p, m: p.global_unstructured(
            [(m, "weight")], p.L1Unstructured, importance_scores={(m, "weight"): torch.ones(2)}, amount=1
        ),
        IndexError,
    ),
    "scores no tensor": (
        lambda p, m: p.global_unstructured([(m, "weight")], p.L1Unstructured, {(m, "weight"): 3}, amount=1),
        AttributeError,
    ),
    "structured": (lambda p, m: p.global_unstructured([(m, "weight")], p.LnStructured, amount=1, n=2), TypeError),
    "custom": (lambda p, m: p.global_unstructured([(m, "weight")], p.CustomFromMask, mask=torch.ones(12)), TypeError),
    "no kind": (lambda p, m: p.global_unstructured([(m, "weight")], method(p, None)), AttributeError),
    "amount": (lambda p, m: p.global_unstructured([(m, "weight")], p.L1Unstructured, amount=13), ValueError),
    "amount a string": (lambda p, m: p.global_unstructured([(m, "weight")], p.L1Unstructured, amount="x"), TypeError),
    "no method": (lambda p, m: p.global_unstructured([(m, "weight")], None, amount=1), TypeError),
}


def check(case: Case, kind: type[Exception], start: Callable[[], nn.Module] = layer) -> str:
    """Both libraries raise `kind`; ours with its parts, and the module is as it was."""
    with pytest.raises(kind):
        case(theirs, start())
    module = start()
    before = snapshot(module)
    with pytest.raises(kind) as error:
        case(ours, module)
    assert isinstance(error.value, FxPruneError)
    assert error.value.what and error.value.why and error.value.do
    assert snapshot(module) == before
    return str(error.value)


@pytest.mark.parametrize("name", AMOUNTS)
@pytest.mark.parametrize("how", ["l1_unstructured", "random_unstructured", "ln_structured", "random_structured"])
def test_amounts(name: str, how: str) -> None:
    amount, kind = AMOUNTS[name]
    rest = {"ln_structured": (2, 0), "random_structured": (0,)}.get(how, ())
    text = check(lambda p, m: getattr(p, how)(m, "weight", amount, *rest), kind)
    assert "Linear.weight [3, 4]" in text and (repr(amount) in text or str(amount) in text)


def pruned() -> nn.Module:
    torch.manual_seed(0)
    module = layer()
    ours.l1_unstructured(module, "weight", 2)
    ours.ln_structured(module, "weight", 1, 2, 0)
    module(torch.ones(1, 4)).sum().backward()
    return module


@pytest.mark.parametrize("name", CASES)
def test_calls(name: str) -> None:
    case, kind = CASES[name]
    if name in ("unknown kind", "no kind", "no dim"):
        check(lambda p, m: case(p, layer()), kind)
    else:
        check(case, kind)


@pytest.mark.parametrize("name", POOLED)
def test_pools(name: str) -> None:
    check(*POOLED[name])


AGAIN: dict[str, tuple[Case, type[Exception]]] = {
    "amount": (lambda p, m: p.l1_unstructured(m, "weight", 13), ValueError),
    "amount a string": (lambda p, m: p.random_unstructured(m, "weight", "x"), TypeError),
    "dim": (lambda p, m: p.ln_structured(m, "weight", 1, 2, 5), IndexError),
    "norm": (lambda p, m: p.ln_structured(m, "weight", 1, "l2", 0), RuntimeError),
    "scores": (lambda p, m: p.l1_unstructured(m, "weight", 1, torch.ones(1)), AssertionError),
    "mask": (lambda p, m: p.custom_from_mask(m, "weight", torch.ones(1)), AssertionError),
    "kind": (lambda p, m: method(p, "odd").apply(m, "weight"), ValueError),
    "own mask": (lambda p, m: method(p, "unstructured", torch.ones(2)).apply(m, "weight"), RuntimeError),
    "own mask no tensor": (lambda p, m: method(p, "unstructured", 3).apply(m, "weight"), AttributeError),
    "other name": (lambda p, m: p.remove(m, "bias"), ValueError),
    "pool": (lambda p, m: p.global_unstructured([(m, "weight")], p.L1Unstructured, amount=13), ValueError),
}


@pytest.mark.parametrize("name", AGAIN)
def test_a_pruned_module_keeps_its_hook(name: str) -> None:
    """torch takes the old hook off before it looks at the arguments, and loses it."""
    check(*AGAIN[name], start=pruned)


def test_a_container_of_torchs_is_no_way_around() -> None:
    module = layer()
    for _ in range(2):
        theirs.random_unstructured(module, "weight", 2)
    before = snapshot(module)
    with pytest.raises(IndexError) as error:
        ours.ln_structured(module, "weight", 1, 2, 5)
    assert isinstance(error.value, FxPruneError) and snapshot(module) == before
    (hook,) = ours.ln_structured(module, "weight", 1, 2, 0)._forward_pre_hooks.values()
    assert type(hook) is ours.PruningContainer and len(hook) == 3


def test_the_class_of_an_output_projection_is_put_back() -> None:
    class Broken(ours.Identity):
        def apply_mask(self, module: nn.Module) -> torch.Tensor:
            raise ZeroDivisionError

    module = nn.MultiheadAttention(4, 2)
    before = snapshot(module)
    with pytest.raises(ZeroDivisionError):
        Broken.apply(module.out_proj, "weight")
    assert snapshot(module) == before


@pytest.mark.parametrize("start", [layer, pruned])
def test_an_error_of_the_users_own_passes_through(start: Callable[[], nn.Module]) -> None:
    module = start()
    before = snapshot(module)
    with pytest.raises(ZeroDivisionError):
        method(ours, "unstructured", ZeroDivisionError()).apply(module, "weight")
    assert snapshot(module) == before


def test_two_hooks_are_refused() -> None:
    for lib in (theirs, ours):
        module = layer()
        twice_hooked(lib, module)
        before = snapshot(module)
        with pytest.raises(AssertionError):
            lib.l1_unstructured(module, "weight", 1)
        assert lib is theirs or snapshot(module) == before


@pytest.mark.parametrize("name", ["weight_orig", "weight_mask"])
def test_names_that_are_taken(name: str) -> None:
    for lib in (theirs, ours):
        module = layer()
        setattr(module, name, "mine")
        before = snapshot(module)
        with pytest.raises(KeyError) as error:
            lib.identity(module, "weight")
        if lib is ours:
            assert snapshot(module) == before and f'"{name}"' in str(error.value) and "\\" not in str(error.value)


def test_a_repeated_entry_is_refused_by_name() -> None:
    module = layer()
    before = snapshot(module)
    with pytest.raises(ValueError, match=r"Linear\.weight \[3, 4\]: entry 2 names it again"):
        pairs = [(module, "weight"), (module, "bias"), (module, "weight")]
        ours.global_unstructured(pairs, ours.L1Unstructured, amount=1)
    assert snapshot(module) == before


def test_scores_in_a_pool_are_refused_by_name() -> None:
    a, b = nn.Linear(4, 3), nn.Linear(2, 5)
    with pytest.raises(AssertionError, match=r"Linear\.weight \[5, 2\]: they have shape \[2, 5\]") as error:
        pairs, scores = [(a, "weight"), (b, "weight")], {(b, "weight"): torch.ones(2, 5)}
        ours.global_unstructured(pairs, ours.L1Unstructured, importance_scores=scores, amount=1)
    assert isinstance(error.value, IndexError)  # torch's
    assert not ours.is_pruned(a)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_pool_that_fails_midway_is_put_back(at: int) -> None:
    """The module that will not be written to stands first, between and last."""

    class Stubborn(nn.Linear):
        def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> None:
            if getattr(self, "closed", False):
                raise MemoryError("no more")
            super().register_buffer(name, tensor, persistent)

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)], nn.LSTM(6, 6))
    model[at] = Stubborn(6, 6)
    pairs = [(model[2], "weight"), (model[0], "weight"), (model[1], "weight"), (model[3], "weight_hh_l0")]
    ours.global_unstructured(pairs[2:], ours.L1Unstructured, amount=0.2)  # two were pruned before
    model[1](torch.ones(1, 6)).sum().backward()
    model[at].closed = True
    before = [m.state_dict() for m in model], [list(m._forward_pre_hooks.items()) for m in model]
    values = [getattr(m, n).clone() for m, n in pairs]
    lengths = [
        len(h) if isinstance(h, ours.PruningContainer) else 0 for m in model for h in m._forward_pre_hooks.values()
    ]
    with pytest.raises(MemoryError):
        ours.global_unstructured(pairs, ours.L1Unstructured, amount=0.4)
    for module, state in zip(model, before[0], strict=True):
        assert list(module.state_dict()) == list(state)
        assert all(torch.equal(*pair) for pair in zip(module.state_dict().values(), state.values(), strict=True))
    assert [list(m._forward_pre_hooks.items()) for m in model] == before[1]
    assert all(torch.equal(getattr(m, n), v) for (m, n), v in zip(pairs, values, strict=True))
    now = [len(h) if isinstance(h, ours.PruningContainer) else 0 for m in model for h in m._forward_pre_hooks.values()]
    assert now == lengths


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: ours.ln_structured(m, "weight", 1, 2, 1, include_bias=True), "belongs to dim 0"),
        (lambda m: ours.random_structured(nn.Embedding(3, 4), "weight", 1, 0, include_bias=True), "Embedding.weight"),
        (
            lambda m: ours.ln_structured(nn.ConvTranspose2d(4, 4, 2, groups=2), "weight", 1, 2, 1, include_bias=True),
            "ungrouped",
        ),
        (lambda m: ours.l1_unstructured(m, "weight", 1, model=nn.Linear(1, 1)), "not part of the model"),
    ],
)
def test_what_only_ours_has(call: Callable[[nn.Module], object], words: str) -> None:
    module = layer()
    before = snapshot(module)
    with pytest.raises(ValueError, match=words) as error:
        call(module)
    assert isinstance(error.value, FxPruneError) and snapshot(module) == before


def test_removal_that_fails_is_put_back() -> None:
    class Closed(nn.Linear):
        def register_parameter(self, name: str, param: Any) -> None:
            if getattr(self, "closed", False):
                raise MemoryError("no more")
            super().register_parameter(name, param)

    module = ours.l1_unstructured(Closed(4, 3), "weight", 5)
    module.closed = True
    before = snapshot(module)
    with pytest.raises(MemoryError):
        ours.remove(module, "weight")
    assert snapshot(module) == before
