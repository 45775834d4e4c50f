"""A place: one parameter of one module, pruned or not, and what pruning keeps there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune as torch_prune

from fxprune.graph.program import keep_name
from fxprune.select.mask import PackedMask

from .errors import InputError, MissingError, NameTakenError, TwoHooksError, WrongTypeError

_WHAT = "cannot prune"


@dataclass(frozen=True, eq=False)
class Place:
    """The parameter `name` of `module`. Once pruned it is kept as `name_orig`, its mask as `name_mask`."""

    module: nn.Module
    name: str

    def __str__(self) -> str:
        """`Linear.weight [7, 5]`."""
        value = vars(self.module).get(self.name, self.module._parameters.get(self.name))
        if value is None:
            value = self.module._parameters.get(f"{self.name}_orig")
        shape = f" {list(value.shape)}" if isinstance(value, Tensor) and not is_lazy(value) else ""
        return f"{type(self.module).__name__}.{self.name}{shape}"

    def hook(self) -> torch_prune.BasePruningMethod | None:
        """The pruning hook of this parameter, ours or torch's; None where it is not pruned."""
        found = [hook for _, hook in hooks(self.module, self.name)]
        if len(found) > 1:
            why = f"{len(found)} pruning hooks act on it, so that its masks would be applied apart"
            raise TwoHooksError(_WHAT, where=str(self), why=why, do="Put the methods into one PruningContainer.")
        return found[0] if found else None

    def value(self) -> Tensor:
        """The parameter as the module shows it: the pruned tensor where there is a mask."""
        if not isinstance(self.name, str):
            why = f"a parameter's name is a str, not {type(self.name).__name__}"
            raise WrongTypeError(_WHAT, where=f"{type(self.module).__name__}.{self.name}", why=why, do=_NAMES)
        if not hasattr(self.module, self.name):
            names = ", ".join(name for name, _ in self.module.named_parameters(recurse=False)) or "none"
            why = f"the module has no parameter of this name; it has: {names}"
            raise MissingError(_WHAT, where=str(self), why=why, do=_NAMES)
        return getattr(self.module, self.name)

    def parameter(self) -> nn.Parameter:
        """The parameter itself, all elements of it, which optimisers hold: `name_orig` where it is pruned."""
        pruned = self.hook() is not None
        value = self.module._parameters.get(f"{self.name}_orig") if pruned else self.value()
        if pruned and value is None:
            why = f'its pruning hook is there, but "{self.name}_orig" is not'
            raise MissingError(_WHAT, where=str(self), why=why, do="Take the hook away, or prune a fresh module.")
        if not isinstance(value, nn.Parameter) or is_lazy(value):
            self._refuse(value)
        if not pruned:
            if self.name not in self.module._parameters:  # a property, or an attribute of another module
                why = "the module shows a parameter under this name, but another module holds it"
                raise NameTakenError(_WHAT, where=str(self), why=why, do=_NAMES)
            self._check_names_are_free()
        return value  # pyright: ignore[reportReturnType]

    def mask(self) -> Tensor | None:
        """The mask so far; None where the parameter is not pruned. What a result that trains keeps zero is pruned."""
        if self.hook() is None:
            return self._kept()
        found = getattr(self.module, f"{self.name}_mask", None)
        if not isinstance(found, Tensor):
            why = f'its pruning hook is there, but "{self.name}_mask" is not'
            raise MissingError(_WHAT, where=str(self), why=why, do="Take the hook away, or prune a fresh module.")
        return found

    def _kept(self) -> Tensor | None:
        """The mask of a result that trains, in the parameter's dtype; None where it holds none for this parameter."""
        held, value = self.module._buffers.get(keep_name(self.name)), self.module._parameters.get(self.name)
        if held is None or value is None:
            return None
        if held.dtype == torch.bool and held.shape == value.shape:
            return held.to(value.dtype)
        if held.dtype == torch.uint8 and held.numel() == -(-value.numel() // 8):
            return PackedMask(tuple(value.shape), held).unpack().to(value.dtype)
        return None

    def _refuse(self, value: Any) -> None:
        if is_lazy(value):
            why = "it has no shape yet"
            raise InputError(_WHAT, where=str(self), why=why, do="Call the module once, then prune.")
        kind = "None" if value is None else f"a {type(value).__name__}"
        do = _NAMES
        if isinstance(value, Tensor) and self.name not in self.module._buffers:
            computed = [n for n in dict(self.module.named_parameters()) if self.name in n]
            do = f"It is computed, by a parametrization or a hook: remove that first, or prune {', '.join(computed)}."
        raise WrongTypeError(_WHAT, where=str(self), why=f"it is {kind}, not a parameter", do=do)

    def _check_names_are_free(self) -> None:
        for name in (f"{self.name}_orig", f"{self.name}_mask"):
            own = self.module._parameters if name.endswith("_orig") else self.module._buffers
            if hasattr(self.module, name) and name not in own:
                why = f'the module has an attribute "{name}" already, and pruning keeps its state under that name'
                raise NameTakenError(_WHAT, where=str(self), why=why, do="Rename the attribute.")


def place(module: nn.Module, name: str) -> Place:
    """The place of parameter `name` of `module`, which must be a module."""
    if not isinstance(module, nn.Module):
        why = f"{type(module).__name__} is not an nn.Module"
        raise MissingError(_WHAT, where=f'parameter "{name}"', why=why, do="Give the module that holds the parameter.")
    return Place(module, name)


def hooks(module: nn.Module, name: str) -> list[tuple[int, torch_prune.BasePruningMethod]]:
    """The pruning hooks of parameter `name`, ours and torch's, with their keys."""
    return [
        (key, hook)
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, torch_prune.BasePruningMethod) and getattr(hook, "_tensor_name", None) == name
    ]


def owners(first: Place, model: nn.Module) -> list[Place]:
    """`first`, then every other place in `model` that holds the very same (tied) parameter."""
    return [first, *Owners(model).others(first)]


class Owners:
    """Every place of a model by the parameter that it holds."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            why = f"model is a {type(model).__name__}, not an nn.Module"
            raise WrongTypeError("cannot look for tied owners", why=why, do="Give the whole model.")
        self._modules = {id(module) for module in model.modules()}
        self._places: dict[int, list[Place]] = {}
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    base = name.removesuffix("_orig")
                    found = Place(module, base if hooks(module, base) else name)
                    self._places.setdefault(id(value), []).append(found)

    def others(self, first: Place) -> list[Place]:
        """The places that hold the parameter of `first`, but for that one."""
        if id(first.module) not in self._modules:
            why, do = "its module is not part of the model given", "Give the model that holds it."
            raise InputError("cannot look for tied owners", where=str(first), why=why, do=do)
        found = self._places[id(first.parameter())]
        return [each for each in found if not (each.module is first.module and each.name == first.name)]


def start_mask(places: Sequence[Place]) -> Tensor | None:
    """The product of the masks that tied places have already; None where none has."""
    product = None
    with torch.no_grad():
        for each in places:
            mask = each.mask()
            if mask is not None:
                product = mask if product is None else product * mask.to(product.device, product.dtype)
    return product


_NAMES = 'Name a parameter of the module itself, such as "weight"; one of a child is the child\'s.'
