"""torch's pruning and fxprune's on one module, in either order, and methods of the user's own on either base."""

from __future__ import annotations

import copy
from itertools import permutations, product
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as theirs
from torch import Tensor, nn

import fxprune.prune as ours

LIBS = {"ours": ours, "theirs": theirs}


def calls(lib: Any) -> list[Any]:
    return [
        lambda m: lib.l1_unstructured(m, "weight", 0.3),
        lambda m: lib.ln_structured(m, "weight", 1, 2, 0),
        lambda m: lib.random_unstructured(m, "weight", 0.2),
        lambda m: lib.custom_from_mask(m, "weight", torch.arange(54).view(6, 9) % 7 != 0),
        lambda m: lib.global_unstructured([(m, "weight")], lib.L1Unstructured, amount=0.2),
    ]


def layer() -> nn.Linear:
    torch.manual_seed(4)
    return nn.Linear(9, 6)


@pytest.mark.parametrize("which", list(product(LIBS, repeat=3)), ids="-".join)
def test_any_order_of_both_gives_torchs_mask(which: tuple[str, ...]) -> None:
    for order in list(permutations(range(5), 3))[::4]:
        found = []
        for names in (which, ("theirs",) * 3):
            module = layer()
            torch.manual_seed(1)
            for lib, index in zip(names, order, strict=True):
                calls(LIBS[lib])[index](module)
            assert ours.is_pruned(module) and theirs.is_pruned(module)
            (hook,) = module._forward_pre_hooks.values()
            assert isinstance(hook, theirs.PruningContainer) and len(hook) == 3
            found.append(module)
        assert torch.equal(found[0].weight_mask, found[1].weight_mask)
        assert torch.equal(found[0].weight, found[1].weight)
        for remove in (ours.remove, theirs.remove):
            module = copy.deepcopy(found[0]) if which[-1] == "ours" else found[0]
            remove(module, "weight")
            assert torch.equal(module.weight, found[1].weight.detach()) and not ours.is_pruned(module)
            if which[-1] == "theirs":
                break


def own(base: Any, kind: str) -> Any:
    class Own(base.BasePruningMethod):  # pyright: ignore
        """Every other of what is given (elements), or of the channels along dim."""

        PRUNING_TYPE = kind
        dim = 1

        def __init__(self, start: int) -> None:
            self.start = start

        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            mask = default_mask.clone()
            if kind == "structured":
                mask[:, self.start :: 2] = 0
            else:
                mask.view(-1)[self.start :: 2] = 0
            return mask

        @classmethod
        def apply(cls, module: nn.Module, name: str, start: int) -> Any:
            return super().apply(module, name, start)

    return Own


@pytest.mark.parametrize("kind", ["unstructured", "structured", "global"])
@pytest.mark.parametrize("base", LIBS)
def test_a_users_own_method(base: str, kind: str) -> None:
    found = []
    for lib, method in ((LIBS[base], own(LIBS[base], kind)), (theirs, own(theirs, kind))):
        module = layer()
        method.apply(module, "weight", 0)
        method.apply(module, "weight", 1)
        lib.l1_unstructured(module, "weight", 0.3)
        method.apply(module, "weight", 0)
        container = lib.PruningContainer()
        container._tensor_name = "weight"
        last = method(1)
        last._tensor_name = "weight"
        container.add_pruning_method(last)
        found.append((module.weight_mask, container.compute_mask(torch.ones(6, 9), torch.ones(6, 9))))
        assert torch.equal(last.prune(torch.ones(4, 4)), last.compute_mask(torch.ones(4, 4), torch.ones(4, 4)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("base", LIBS)
def test_a_users_own_method_in_a_pool(base: str) -> None:
    found = []
    for lib, source in ((ours, LIBS[base]), (theirs, theirs)):
        torch.manual_seed(0)
        modules = [nn.Linear(5, 3), nn.Linear(3, 4)]
        pairs = [(m, n) for m in modules for n in ("weight", "bias")]
        lib.global_unstructured(pairs, source.L1Unstructured, amount=0.3)
        lib.global_unstructured(pairs, own(source, "unstructured"), start=1)
        lib.global_unstructured(pairs, source.Identity)
        torch.manual_seed(2)
        lib.global_unstructured(pairs, source.RandomUnstructured, amount=0.25)
        found.append([getattr(m, f"{n}_mask") for m, n in pairs])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_container_of_the_users_own_is_kept() -> None:
    class Mine(ours.PruningContainer):
        pass

    module = layer()
    hook = ours.L1Unstructured.apply(module, "weight", 0.2)
    del module._forward_pre_hooks[next(iter(module._forward_pre_hooks))]
    mine = Mine(hook)
    module.register_forward_pre_hook(mine)
    assert ours.RandomUnstructured.apply(module, "weight", 0.2) is mine and len(mine) == 2


def test_the_hooks_of_others_stay() -> None:
    module, seen = layer(), []
    module.register_forward_pre_hook(lambda *_: seen.append(1))
    ours.l1_unstructured(module, "weight", 0.2)
    ours.l1_unstructured(module, "bias", 0.5)
    ours.remove(module, "weight")
    module(torch.ones(1, 9))
    assert seen == [1] and len(module._forward_pre_hooks) == 2 and module.bias_mask.sum() == 3


def test_compile_traces_the_hook() -> None:
    module = ours.l1_unstructured(layer(), "weight", 0.2)
    x = torch.ones(2, 9)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))
