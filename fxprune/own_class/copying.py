"""copying: the user's model copied, with other tensors under their own names."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fxprune.capture.hooks import fold_existing
from fxprune.couple.removal import Cuts
from fxprune.errors import CaptureError

from .target import Target


def copy_smaller(model: nn.Module, target: Target) -> nn.Module:
    """A deep copy of the model whose tensors are those of the target; no storage is shared with the model.

    Masks of torch.nn.utils.prune and parametrizations have become plain weights. Tied tensors stay tied, and each
    parameter asks for gradients as the model's does. Raises CaptureError where the module tree cannot be copied.
    """
    shadow = fold_existing(model)[0]
    memo: dict[int, Any] = {}
    held = list(_held(shadow))
    for name, tensor in held:
        if name in target.tensors:
            memo[id(tensor)] = _like(tensor, target.tensors[name].detach().clone())
    for name, tensor in held:
        # Under another name a tied tensor may have been replaced.
        if id(tensor) not in memo:
            memo[id(tensor)] = _like(tensor, _cut(tensor.detach(), target.cuts.get(name, [])).clone())
    try:
        return copy.deepcopy(shadow, memo)
    except Exception as error:
        raise CaptureError(
            "cannot write a smaller model of its own class",
            where=type(model).__name__,
            why=f"its module tree cannot be copied ({type(error).__name__}: {error})",
            do="Use transform(..., trainable=True), which needs no copy of the modules.",
        ) from error


def names_held(model: nn.Module) -> set[str]:
    """The names of all parameters and buffers, and of tensors that are plain attributes of modules."""
    return {name for name, _ in _held(model)}


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything that modules hold; what stands in lists has no name."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for table in (module._parameters, module._buffers, vars(module)):
            for leaf, found in table.items():
                if isinstance(found, Tensor):
                    yield prefix + leaf, found
                elif isinstance(found, list):
                    yield from (("", item) for item in found if isinstance(item, Tensor))


def _like(old: Tensor, value: Tensor) -> Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(value, requires_grad=old.requires_grad)
    return value


def _cut(tensor: Tensor, cuts: Cuts) -> Tensor:
    for dim, indices in cuts:
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor
