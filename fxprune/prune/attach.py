"""The one place that puts pruning on modules: the mask first, then what every owner of the parameter keeps of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from .combine import check_scores, combined
from .copying import Home
from .errors import WrongMaskError, WrongTypeError
from .out_proj import read_anew
from .place import Place, hooks, start_mask
from .undo import unchanged_on_failure

Method = torch_prune.BasePruningMethod
# (old hook or None, new method) -> the hook of both
Join = Callable[[Method | None, Method], Any]


def attach(method: Method, places: Sequence[Place], join: Join, scores: Tensor | None = None) -> Method:
    """Prune the parameter that all of `places` hold by `method`; the hook of the first place is returned.

    The mask starts from what the masks of all places leave, and `scores` (None: the parameter as it is shown) are what
    the method ranks. If anything raises, every module is as it was.
    """
    with unchanged_on_failure(places):
        return write(method, places, join, scores)


def _without_inference(call: Callable[..., Method]) -> Callable[..., Method]:
    """Masks made under torch.inference_mode could never be trained with."""

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Method:
        if not torch.is_inference_mode_enabled():
            return call(*args, **kwargs)
        with torch.inference_mode(False):
            return call(*args, **kwargs)

    return wrapped


@_without_inference
def write(method: Method, places: Sequence[Place], join: Join, scores: Tensor | None = None) -> Method:
    """As `attach`, with nothing put back on failure."""
    first = places[0]
    parameter = first.parameter()
    if scores is not None:
        check_scores(scores, parameter, "the parameter")
    start = start_mask(places)
    made = []
    for each in places:
        each.parameter()
        own = method if each is first else copy.copy(method)
        own._tensor_name = each.name
        made.append((each, own, join(each.hook(), own)))
    hook = made[0][2]
    mask_for = getattr(method, "_mask_for", None)
    mask = None if mask_for is None else mask_for(parameter, start)
    if mask is None:
        ranked = first.value() if scores is None else scores
        # the pruned tensor is still where the model was when it last ran
        mask = _computed(method, hook, ranked.to(parameter.device), parameter, start)
    del start
    mask = _fit(mask, parameter, method)
    for each, own, joined in made:
        own._home = joined._home = Home(each.module)
        _keep(each, parameter, mask if each is first else mask.clone(), joined)
    return hook


def _computed(method: Method, hook: Method, t: Tensor, parameter: Tensor, start: Tensor | None) -> object:
    if start is None:
        return method.compute_mask(t, default_mask=torch.ones_like(parameter, requires_grad=False))
    if hook is method:  # another owner of the parameter was pruned before
        return combined(method, t, start)
    return hook.compute_mask(t, default_mask=start.detach().clone(memory_format=torch.contiguous_format))


def _fit(mask: object, parameter: Tensor, method: Method) -> Tensor:
    """What compute_mask returned as a mask of the parameter's shape, dtype and device."""
    what = f"cannot use the mask of {type(method).__name__}"
    do = "compute_mask returns a tensor of the shape of default_mask."
    if not isinstance(mask, Tensor):
        raise WrongTypeError(what, why=f"it is a {type(mask).__name__}, not a tensor", do=do)
    mask = mask.detach()
    if mask.shape != parameter.shape:
        try:
            mask = mask.expand(parameter.shape).contiguous()
        except RuntimeError as error:
            why = f"it has shape {list(mask.shape)}, the parameter {list(parameter.shape)}"
            raise WrongMaskError(what, why=why, do=do) from error
    mask = mask.to(parameter.device, parameter.dtype)
    if mask.stride() == parameter.stride():
        return mask
    return torch.empty_like(parameter, requires_grad=False).copy_(mask)


def _keep(place: Place, parameter: nn.Parameter, mask: Tensor, hook: Any) -> None:
    """Write parameter, mask, pruned tensor and hook, in the order that makes torch's order of names."""
    module, name = place.module, place.name
    for key, _ in hooks(module, name):
        del module._forward_pre_hooks[key]
    if name in module._parameters:
        module.register_parameter(f"{name}_orig", parameter)
        del module._parameters[name]
    module.register_buffer(f"{name}_mask", mask)
    vars(module).pop(name, None)
    read_anew(module, name)
    setattr(module, name, hook.apply_mask(module))
    module.register_forward_pre_hook(hook)
