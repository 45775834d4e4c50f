"""The functions of torch.nn.utils.prune under their names: each prunes one parameter of one module in place.

They leave what torch leaves: the parameter as `name_orig`, the very same object, its mask as the buffer `name_mask`,
and `name`, their product, which a forward pre-hook computes anew. Each answers the module. If one raises, the module is
as it was. With `model=`, every other owner of a tied parameter in that model gets the same mask and a hook of its own.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from .attach import Method
from .channels import LnStructured, RandomStructured
from .elements import CustomFromMask, Identity, L1Unstructured, RandomUnstructured
from .errors import InputError, MissingError
from .place import Place, hooks, owners, place
from .undo import unchanged_on_failure

M = TypeVar("M", bound=nn.Module)


def identity(module: M, name: str, *, model: nn.Module | None = None) -> M:
    """Give parameter `name` of `module` a mask of ones: nothing is pruned, all of the state is there.

    >>> m = prune.identity(nn.Linear(2, 3), "bias")
    >>> print(m.bias_mask)
    tensor([1., 1., 1.])
    """
    Identity.apply(module, name, model=model)
    return module


def random_unstructured(
    module: M, name: str, amount: float, *, generator: torch.Generator | None = None, model: nn.Module | None = None
) -> M:
    """Prune `amount` of the remaining elements of parameter `name` at random.

    amount: a float from 0 to 1, the share of what remains, rounded half to even; or an int, how many. generator: draws
    as torch's own would after torch.manual_seed with its seed.

    >>> m = prune.random_unstructured(nn.Linear(2, 3), "weight", amount=1)
    >>> torch.sum(m.weight_mask == 0)
    tensor(1)
    """
    RandomUnstructured.apply(module, name, amount, generator=generator, model=model)
    return module


def l1_unstructured(
    module: M,
    name: str,
    amount: float,
    importance_scores: Tensor | None = None,
    *,
    model: nn.Module | None = None,
) -> M:
    """Prune the `amount` of remaining elements of parameter `name` that have the smallest magnitude.

    amount: a float from 0 to 1, the share of what remains, rounded half to even; or an int, how many.
    importance_scores: a tensor of the parameter's shape, whose magnitudes count instead. Among equal magnitudes the
    lowest flat index goes first; NaN counts as the largest.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015.

    >>> m = prune.l1_unstructured(nn.Linear(2, 3), "weight", amount=0.2)
    >>> m.state_dict().keys()
    odict_keys(['bias', 'weight_orig', 'weight_mask'])
    """
    L1Unstructured.apply(module, name, amount, importance_scores=importance_scores, model=model)
    return module


def random_structured(
    module: M,
    name: str,
    amount: float,
    dim: int,
    *,
    generator: torch.Generator | None = None,
    include_bias: bool = False,
    model: nn.Module | None = None,
) -> M:
    """Prune `amount` of the remaining channels along `dim` of parameter `name` at random.

    amount: a float from 0 to 1, the share of the channels that remain, or an int, how many. include_bias: the bias of
    the module loses the same channels, where `dim` is that of its outputs (0; 1 for a transposed convolution).

    >>> m = prune.random_structured(nn.Linear(5, 3), "weight", amount=3, dim=1)
    >>> columns_pruned = int(sum(torch.sum(m.weight, dim=0) == 0))
    >>> print(columns_pruned)
    3
    """
    RandomStructured.apply(module, name, amount, dim, generator=generator, include_bias=include_bias, model=model)
    return module


def ln_structured(
    module: M,
    name: str,
    amount: float,
    n: float | str,
    dim: int,
    importance_scores: Tensor | None = None,
    *,
    include_bias: bool = False,
    model: nn.Module | None = None,
) -> M:
    """Prune the `amount` of remaining channels along `dim` of parameter `name` that have the lowest norm.

    amount: a float from 0 to 1, the share of the channels that remain, or an int, how many. n: p of the norm: a number,
    inf, -inf, 'fro' or 'nuc'. importance_scores: a tensor of the parameter's shape, whose norms count instead.
    include_bias: the bias of the module loses the same channels, where `dim` is that of its outputs (0; 1 for a
    transposed convolution). Among equal norms the lowest index goes first; NaN counts as the largest.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", 2017.

    >>> m = prune.ln_structured(nn.Conv2d(5, 3, 2), "weight", amount=0.3, dim=1, n=float("-inf"))
    >>> int(sum(torch.sum(m.weight_mask, dim=(0, 2, 3)) == 0))
    2
    """
    LnStructured.apply(module, name, amount, n, dim, importance_scores, include_bias=include_bias, model=model)
    return module


def custom_from_mask(module: M, name: str, mask: Tensor, *, model: nn.Module | None = None) -> M:
    """Prune what is 0 in `mask`, a tensor of the shape of parameter `name`.

    >>> m = prune.custom_from_mask(nn.Linear(5, 3), name="bias", mask=torch.tensor([0, 1, 0]))
    >>> print(m.bias_mask)
    tensor([0., 1., 0.])
    """
    CustomFromMask.apply(module, name, mask, model=model)
    return module


def remove(module: M, name: str, *, model: nn.Module | None = None) -> M:
    """Make the pruning of parameter `name` permanent: plain zeros, without mask and hook.

    Nothing keeps the zeros at zero afterwards: an optimiser may move them. Raises a ValueError if it is not pruned.

    >>> m = prune.random_unstructured(nn.Linear(5, 7), name="weight", amount=0.2)
    >>> m = prune.remove(m, name="weight")
    >>> prune.is_pruned(m)
    False
    """
    first = place(module, name)
    places = [first] if model is None else owners(first, model)
    with unchanged_on_failure(places):
        for each in places:
            _remove(each, must=each is first)
    return module


def is_pruned(module: nn.Module) -> bool:
    """Whether any parameter of `module` or of a module in it has a pruning hook, ours or torch's.

    >>> m = nn.Linear(5, 7)
    >>> print(prune.is_pruned(m))
    False
    >>> m = prune.random_unstructured(m, name="weight", amount=0.2)
    >>> print(prune.is_pruned(m))
    True
    """
    if not isinstance(module, nn.Module):
        why = f"it is a {type(module).__name__}, not an nn.Module"
        raise MissingError("cannot look for pruning", why=why, do="Give a module.")
    return any(isinstance(hook, Method) for each in module.modules() for hook in each._forward_pre_hooks.values())


def _remove(each: Place, *, must: bool) -> None:
    found = hooks(each.module, each.name)
    if not found and must:
        others = [hook for hook in each.module._forward_pre_hooks.values() if isinstance(hook, Method)]
        do = f"Pruned in this module: {', '.join(sorted(hook._tensor_name for hook in others)) or 'nothing'}."
        raise InputError("cannot remove pruning", where=str(each), why="it is not pruned", do=do)
    for key, hook in found[:1]:
        hook.remove(each.module)
        del each.module._forward_pre_hooks[key]
