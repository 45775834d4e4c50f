"""Pruning that a model already carries: hooks and parametrizations turned into plain weights and known masks.

torch.nn.utils.prune keeps `name_orig` and `name_mask` and recomputes `name` in a forward pre-hook; a parametrization
recomputes it in a property. Both are folded here on a copy of the module tree that shares every other tensor with the
user's model, which is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fxprune.errors import CaptureError


def fold_existing(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with hooks and parametrizations folded, and the masks found: name -> bool, True where kept.

    Returns the model itself where there is nothing to fold. Otherwise the copy shares all storage with the model except
    the folded weights.
    """
    if not any(pruned_names(m) or parametrize.is_parametrized(m) for m in model.modules()):
        return model, {}
    shadow = _shadow(model)
    masks: dict[str, Tensor] = {}
    folded: Folded = {}
    with torch.no_grad():
        for path, module in shadow.named_modules():
            if isinstance(module, parametrize.ParametrizationList):
                continue
            prefix = f"{path}." if path else ""
            for name in pruned_names(module):
                masks[prefix + name] = _fold_hook(module, name, folded)
            if parametrize.is_parametrized(module):
                masks.update({prefix + n: m for n, m in _fold_parametrizations(module).items()})
    return shadow, masks


def mask_hooks(module: nn.Module) -> Mapping[int, prune.BasePruningMethod]:
    """The torch.nn.utils.prune hooks of one module, by hook id."""
    return {k: h for k, h in module._forward_pre_hooks.items() if isinstance(h, prune.BasePruningMethod)}


def parametrized_names(model: nn.Module) -> list[str]:
    """The tensors of a model that parametrizations compute."""
    found = [(path, m) for path, m in model.named_modules() if parametrize.is_parametrized(m)]
    return [f"{path}.{name}".lstrip(".") for path, m in found for name in cast(nn.ModuleDict, m.parametrizations)]


def pruned_names(module: nn.Module) -> list[str]:
    """The parameters of one module that torch.nn.utils.prune hooks mask."""
    return list(dict.fromkeys(h._tensor_name for h in mask_hooks(module).values()))


def _shadow(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose tensors are the model's own."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None:
                memo[id(tensor)] = tensor
        for value in vars(module).values():
            # A pruned weight is a non-leaf tensor, which deepcopy refuses.
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach()
            elif isinstance(value, list):
                memo.update({id(t): t.detach() if t.grad_fn is not None else t for t in value if isinstance(t, Tensor)})
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            "cannot fold the pruning masks of the model",
            where=type(model).__name__,
            why=f"its module tree cannot be copied ({type(error).__name__}: {error})",
            do="Make the masks permanent with torch.nn.utils.prune.remove on each pruned weight first.",
        ) from error


def separate(model: nn.Module) -> nn.Module:
    """A copy of the module tree over the same storage, whose tensors are objects of their own."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        others = [v for v in [*module._buffers.values(), *vars(module).values()] if isinstance(v, Tensor)]
        for tensor in others:
            memo.setdefault(id(tensor), tensor.detach())
    return copy.deepcopy(model, memo)


# id of a pruned parameter -> the masks it has at its owners, each with what became of it there
Folded = dict[int, list[tuple[Tensor, nn.Parameter]]]


def _fold_hook(module: nn.Module, name: str, folded: Folded) -> Tensor:
    original, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
    if original is None or mask is None:
        raise CaptureError(
            f'cannot fold the pruning mask of "{name}"',
            where=type(module).__name__,
            why=f'its hook is there but "{name}_orig" or "{name}_mask" is not',
            do="Prune the weight again, or make it permanent with torch.nn.utils.prune.remove.",
        )
    keep = mask != 0
    # A tied parameter with one mask at its owners stays tied.
    tied = [value for other, value in folded.get(id(original), ()) if bool((other == mask).all())]
    if tied:
        value = tied[0]
    elif original.dtype.itemsize == 1:  # 8-bit floats cannot be filled, and a mask of them is 0 or 1
        value = torch.where(keep, original.detach().view(torch.uint8), 0).view(original.dtype)
    else:
        value = (original.detach() * mask.to(original.dtype)).masked_fill_(~keep, 0)
    for hook_id in [k for k, h in mask_hooks(module).items() if h._tensor_name == name]:
        del module._forward_pre_hooks[hook_id]
    del module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
    vars(module).pop(name, None)
    if not tied:
        value = nn.Parameter(value, requires_grad=original.requires_grad)
        folded.setdefault(id(original), []).append((mask, value))
    setattr(module, name, value)
    return keep


def _fold_parametrizations(module: nn.Module) -> dict[str, Tensor]:
    lists = cast(nn.ModuleDict, module.parametrizations)
    # In training mode spectral_norm would write to buffers that are the user's own.
    lists.eval()
    values = {name: getattr(module, name).detach().clone() for name in lists}
    # parametrize.remove_parametrizations would edit the class, which the copy shares with the user's module.
    del module._modules["parametrizations"]
    module.__class__ = type(module).__mro__[1]
    masks = {}
    for name, value in values.items():
        # Not `original` itself: a mask makes a plain tensor of it.
        parts = [*lists[name].parameters()]
        if parts:
            setattr(module, name, nn.Parameter(value, requires_grad=any(part.requires_grad for part in parts)))
        else:
            module.register_buffer(name, value)
        if not bool((value != 0).all()):
            masks[name] = value != 0
    return masks
