"""The bias of channels that leave: which module has one, and its mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .elements import CustomFromMask
from .errors import InputError
from .place import Place

_WHAT = "cannot prune the bias with its channels"


def bias_places(places: Sequence[Place], dim: int) -> list[Place]:
    """The biases of the modules of `places`, the owners of one weight, that have one value for each index of `dim`.

    Raises a ValueError unless the first module is one whose bias belongs to `dim` of its weight; it may have no bias.
    """
    first = places[0]
    own = output_dim(first.module)
    if first.name != "weight" or own is None:
        why = "only linear layers and convolutions (transposed: ungrouped) have one bias value for each channel"
        raise InputError(_WHAT, where=str(first), why=why, do="Leave include_bias out.")
    wanted = range(first.value().dim())[dim]
    if wanted != own:
        why = f"the bias belongs to dim {own} of this weight, and dim {dim} is pruned"
        raise InputError(_WHAT, where=str(first), why=why, do=f"Prune dim {own}, or leave include_bias out.")
    modules = {id(each.module): each.module for each in places if each.name == "weight"}
    fitting = [module for module in modules.values() if output_dim(module) == wanted]
    return [Place(module, "bias") for module in fitting if getattr(module, "bias", None) is not None]


def prune_biases(places: Sequence[Place], gone: Tensor) -> None:
    """Mask each of the biases where `gone` [channels] bool says so, on top of the mask that it has."""
    for each in places:
        CustomFromMask.apply(each.module, each.name, (~gone).to(torch.uint8))


def output_dim(module: nn.Module) -> int | None:
    """The dim of the weight whose channels the bias of `module` belongs to; None where there is none."""
    if isinstance(module, _ConvTransposeNd):
        return 1 if module.groups == 1 else None
    return 0 if isinstance(module, (nn.Linear, nn.Bilinear, _ConvNd)) else None
