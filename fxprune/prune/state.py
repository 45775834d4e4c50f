"""The state of pruned models, understood: load what a pruned model saved into one that is not pruned."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune as torch_prune

from fxprune.errors import InputError
from fxprune.plan.plan import near

from .functions import custom_from_mask
from .place import Place, hooks
from .undo import unchanged_on_failure

_WHAT = "cannot load the state dict"


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> _IncompatibleKeys:
    """Load a state dict with `name_orig` and `name_mask` keys into `model`, whose weights need no mask yet.

    Afterwards the model is what was saved: the weights are pruned by custom_from_mask with the saved masks, and the
    model's own state dict has the saved keys. Other keys load as torch loads them; the "module." that nn.DataParallel
    puts in front is taken off where the model has no such child. With strict=False keys without a place in the model
    are returned, not refused, as torch does.

    Raises InputError, with the model as it was, if a mask is missing, a shape differs or a name is unknown.
    To promise that, a second copy of the model's tensors is held while loading.
    """
    if not isinstance(state_dict, Mapping):
        why = f"it is a {type(state_dict).__name__}, not a mapping from names to tensors"
        raise InputError(_WHAT, where=type(model).__name__, why=why, do="Give what model.state_dict() returned.")
    state = _without_wrapper(model, state_dict)
    pairs = _pairs(model, state, strict)
    with _as_it_was_on_failure(model, [weight for weight, _ in pairs]):
        for weight, mask in pairs:
            if not hooks(weight.module, weight.name):
                custom_from_mask(weight.module, weight.name, mask)
        try:
            result = model.load_state_dict(state, strict=strict)
        except RuntimeError as error:
            do = "Load it into the model that was saved, or pass strict=False for keys only one side has."
            raise InputError(_WHAT, where=type(model).__name__, why=str(error), do=do) from error
        for module in model.modules():
            _recompute(module)
    return result


def _without_wrapper(model: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    wrapped = bool(state_dict) and all(key.startswith("module.") for key in state_dict)
    if not wrapped or "module" in model._modules:
        return state_dict
    state: OrderedDict[str, Any] = OrderedDict(state_dict)
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None:
        state._metadata = OrderedDict(versions)  # pyright: ignore[reportAttributeAccessIssue]
    consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def _pairs(model: nn.Module, state: Mapping[str, Any], strict: bool) -> list[tuple[Place, Tensor]]:
    """The weights to prune and their masks, in the state dict's order, so that the model's own keys take it too."""
    own = model.state_dict().keys()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pairs = []
    for key in state:
        base, _, ending = key.rpartition("_")
        if key in own or ending not in ("orig", "mask"):
            continue  # the model has it by this name: an ordinary key, or a weight that is pruned already
        other = f"{base}_{'mask' if ending == 'orig' else 'orig'}"
        if base not in parameters:
            if strict and other in state and ending == "orig":
                found = near(base, parameters)
                raise InputError(
                    _WHAT,
                    where=f'"{key}"',
                    why=f'the model has no parameter "{base}"',
                    do=f"Near it: {', '.join(found)}." if found else "Load it into the model that was saved.",
                )
            continue
        if other not in state:
            raise InputError(
                _WHAT,
                where=f'"{key}" for parameter "{base}"',
                why=f'"{other}" is missing, and a pruned weight is saved as both',
                do=f'Add "{other}", or save the weight as "{base}" (torch.nn.utils.prune.remove).',
            )
        for name in (key, other):
            _check_shape(name, state[name], base, parameters[base])
        if ending == "orig":
            path, _, name = base.rpartition(".")
            mask = state[other].to(parameters[base].device)
            pairs.append((Place(model.get_submodule(path), name), mask))
    return pairs


def _check_shape(key: str, value: object, base: str, parameter: Tensor) -> None:
    if not isinstance(value, Tensor):
        why = f"it is a {type(value).__name__}, not a tensor"
    elif value.shape != parameter.shape:
        why = f'it has shape {list(value.shape)}, parameter "{base}" of the model {list(parameter.shape)}'
    else:
        return
    raise InputError(_WHAT, where=f'"{key}"', why=why, do="Load it into the model that was saved.")


def _recompute(module: nn.Module) -> None:
    """Give `module` the pruned weights that its next forward would compute; until then they are the old."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, torch_prune.BasePruningMethod):
            setattr(module, hook._tensor_name, hook.apply_mask(module))


@contextmanager
def _as_it_was_on_failure(model: nn.Module, weights: list[Place]) -> Iterator[None]:
    """Put values, parameters, buffers and hooks back if the body raises."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        why = "some of its parameters have no shape yet"
        raise InputError(_WHAT, where=type(model).__name__, why=why, do="Call the model once, then load.")
    with torch.no_grad():
        values = [tensor.detach().clone() for tensor in tensors]
    try:
        with unchanged_on_failure(weights):
            yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        raise
