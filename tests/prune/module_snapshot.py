"""Everything that pruning could change in a model: taken before a call that fails, it must compare equal after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> list[Any]:
    """Classes, tables in order, identities and values of tensors, hooks and what they hold, plain attributes."""
    return [(path, type(module), _plain(vars(module))) for path, module in model.named_modules()]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        grad = None if value.grad_fn is not None else value.grad
        return id(value), _numbers(value), None if grad is None else _numbers(grad), value.grad_fn
    if isinstance(value, dict):
        return type(value), [(key, _plain(entry)) for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [_plain(entry) for entry in value]
    if isinstance(value, set):
        return sorted(map(repr, value))
    if isinstance(value, nn.Module):
        return id(value)
    if hasattr(value, "_tensor_name"):
        state = {key: entry for key, entry in vars(value).items() if key != "_home"}
        return id(value), _plain(state)
    return id(value) if callable(value) else repr(value)


def _numbers(value: Tensor) -> tuple[Any, ...]:
    if torch.nn.parameter.is_lazy(value):
        return (type(value),)
    if value.is_meta:
        return type(value), value.shape, value.stride(), value.dtype
    raw = value.detach().contiguous().view(torch.uint8) if value.dim() else value.detach().reshape(1).view(torch.uint8)
    return type(value), value.shape, value.stride(), value.dtype, raw.flatten().tolist()
