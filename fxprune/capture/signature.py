"""signature: how a model takes its arguments: their order, and which values are the same as leaving one out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
# What models of transformers read off their configuration where they are not told, whether or not forward names it.
_CONFIGURED = ("return_dict", "use_cache", "output_attentions", "output_hidden_states")
_MISSING = object()


def positional(forward: Callable[..., Any] | None) -> tuple[str, ...]:
    """The names of the parameters that a call may give by position, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters_of(forward) if parameter.kind in kinds)


def left_out(forward: Callable[..., Any] | None) -> dict[str, tuple[Any, ...]]:
    """Name -> the values that are the same as leaving this argument out: its default, and what None stands for.

    A default of None stands for the configuration's value of this name, where the model has a configuration.
    """
    config = getattr(getattr(forward, "__self__", None), "config", None)
    parameters = parameters_of(forward)
    found: dict[str, tuple[Any, ...]] = {p.name: (p.default,) for p in parameters if isinstance(p.default, _PLAIN)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        found = {**dict.fromkeys(_CONFIGURED if config is not None else (), (None,)), **found}
    for name, values in found.items():
        configured = getattr(config, name, _MISSING)
        if values == (None,) and configured is not None and isinstance(configured, _PLAIN):
            found[name] = (None, configured)
    return found


def parameters_of(forward: Callable[..., Any] | None) -> list[inspect.Parameter]:
    """The parameters of a function; none where it has no signature."""
    try:
        return list(inspect.signature(forward).parameters.values()) if forward is not None else []
    except (TypeError, ValueError):
        return []
