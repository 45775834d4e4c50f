"""ways: how a user may run a model as it is: eager or compiled by torch, frozen or not, in either memory format.

Each way is made only when it is its turn, for a compiled model takes time and memory. It is compiled as code of its
own: what Dynamo keeps goes with it, but for what it compiles behind breaks of the graph, which stays with the code of
the user's modules.
"""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import InputError
from fxprune.graph import compat

from .device import has_bfloat16_units

Call = Callable[[], Any]
Maker = Callable[[], Call]

_GRAPH_MODES = ("reduce-overhead", "max-autotune")
_CONVS = (nn.modules.conv._ConvNd,)
_numbers = itertools.count()


def ways_of(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device | None,
    modes: Sequence[str] = (),
) -> dict[str, Maker]:
    """The ways of calling `model(*args, **kwargs)` by name: one for what is compiled or no module, else all of them.

    `modes` are modes of torch.compile to try besides. Raises InputError for a model in training mode.
    """

    def call(function: Callable[..., Any]) -> Call:
        return lambda: function(*args, **kwargs)

    if isinstance(model, torch._dynamo.OptimizedModule):
        return {"torch.compile": lambda: call(model)}
    if not isinstance(model, nn.Module):
        return {"as given": lambda: call(model)}
    if getattr(model, "is_compiled", False) or model._compiled_call_impl is not None:
        return {"compiled": lambda: call(model)}
    if model.training:
        raise InputError("cannot measure a model in training mode", do="Call model.eval() first.")
    ways: dict[str, Maker] = {
        "eager": lambda: call(model),
        "torch.compile": lambda: call(compiled(model)),
        "torch.compile, frozen": lambda: call(compiled(model, freezing=True)),
    }
    if any(isinstance(module, _CONVS) for module in model.modules()) and _has_images(args, kwargs):
        ways |= {
            "eager, channels_last": lambda: call(channels_last(model)),
            "torch.compile, frozen, channels_last": lambda: call(compiled(channels_last(model), freezing=True)),
        }
    more = (*modes, *(_GRAPH_MODES if device is not None and device.type == "cuda" else ()))
    return ways | {f"torch.compile, {mode}": lambda mode=mode: call(compiled(model, mode=mode)) for mode in more}


def compiled(
    function: Callable[..., Any],
    *,
    freezing: bool = False,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """torch.compile of a model or function, as code of its own; the first call compiles.

    Freezing has to be switched on for all that is compiled meanwhile: as an option it does nothing.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # Dynamo knows a function by its code, and remembers sizes by its name.
    code = run.__code__.replace(co_name=f"way_{next(_numbers)}")
    fresh = types.FunctionType(code, run.__globals__, closure=run.__closure__)
    result = torch.compile(fresh, mode=mode, options=dict(options) if options else None)
    if not freezing:
        return result

    def first(*args: Any, **kwargs: Any) -> Any:
        frozen = torch._inductor.config.patch(freezing=True)  # pyright: ignore[reportAttributeAccessIssue]
        with frozen, compat.constants_go_with_code():
            return result(*args, **kwargs)

    return _Once(first, result)


class _Once:
    """A function whose first call goes another way."""

    def __init__(self, first: Callable[..., Any], then: Callable[..., Any]) -> None:
        self._first, self._then, self._called = first, then, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._called:
            return self._then(*args, **kwargs)
        self._called = True
        return self._first(*args, **kwargs)


def channels_last(model: nn.Module) -> Callable[..., Any]:
    """The model with weights and images in channels_last; a copy, for the format is a property of the tensors."""
    twin = copied(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(_to_channels_last, (args, kwargs))
        return twin(*args, **kwargs)

    return run


def has_half(model: Any, device: torch.device | None) -> bool:
    """Whether a model is in float32 and the device has units for bfloat16."""
    if not isinstance(model, nn.Module) or not has_bfloat16_units(device):
        return False
    return {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}


def in_bfloat16(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """A call of a float32 model in bfloat16, as torch.compile runs it, frozen; its outputs are in bfloat16 too.

    Raises whatever the model raises that does not run in this precision.
    """
    args, kwargs = pytree.tree_map(_to_bfloat16, (tuple(args), dict(kwargs)))
    with compat.many_compilations(), torch.no_grad():
        function = compiled(copied(model).bfloat16(), freezing=True)
        function(*args, **kwargs)
    return lambda: function(*args, **kwargs)


def copied(model: nn.Module) -> nn.Module:
    """A copy of the module tree with tensors of its own, also of one whose weights a hook computes."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    memo[id(tensor)] = tensor.detach()
    return copy.deepcopy(model, memo)


def _to_channels_last(leaf: Any) -> Any:
    return leaf.to(memory_format=torch.channels_last) if isinstance(leaf, Tensor) and leaf.dim() == 4 else leaf


def _to_bfloat16(leaf: Any) -> Any:
    return leaf.bfloat16() if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf


def _has_images(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.dim() == 4 for leaf in pytree.tree_leaves((args, kwargs)))
