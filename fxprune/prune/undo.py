"""All or nothing: a module that pruning fails on is put back as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from fxprune.select.mask import PackedMask

from .masked import masked, packed, unpacked_like
from .place import Place


class Snapshot:
    """What one module was before pruning: its class, attributes, tables and the state of its pruning hooks."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kind = type(module)
        self.state = {key: (value, _copied(value)) for key, value in vars(module).items()}
        hooks = module._forward_pre_hooks.values()
        self.hooks = [(hook, dict(vars(hook))) for hook in hooks if isinstance(hook, torch_prune.BasePruningMethod)]
        self.masks: dict[str, tuple[PackedMask, torch.dtype]] = {}

    def pack(self, name: str) -> bool:
        """Hold the old mask of parameter `name` as bits from now on, and its pruned tensor not at all.

        False where there is no mask of 0 and 1.
        """
        mask = self.state["_buffers"][1].get(f"{name}_mask")
        bits = None if mask is None else packed(mask)
        if mask is not None and bits is not None:
            self.masks[name] = bits, mask.dtype
            self.state["_buffers"][1][f"{name}_mask"] = None
            if name in self.state:
                self.state[name] = (None, None)
        return name in self.masks

    def restore(self) -> None:
        """Put everything back; tables stay the objects that they were."""
        if type(self.module) is not self.kind:  # a module may have a __setattr__ of its own
            self.module.__class__ = self.kind
        now = vars(self.module)
        now.clear()
        for key, (value, saved) in self.state.items():
            if isinstance(value, (dict, set)):
                value.clear()
                value.update(saved)
            elif isinstance(value, list):
                value[:] = saved
            now[key] = value
        for hook, state in self.hooks:
            vars(hook).clear()
            vars(hook).update(state)
        for name, (bits, dtype) in self.masks.items():
            parameter = self.module._parameters[f"{name}_orig"]
            if parameter is None:
                continue
            mask = unpacked_like(bits, parameter).to(dtype)
            self.module._buffers[f"{name}_mask"] = mask
            if name in now:
                setattr(self.module, name, masked(parameter, mask))


@contextmanager
def unchanged_on_failure(places: Iterable[Place]) -> Iterator[list[Snapshot]]:
    """Restore the modules of `places` if the body raises, whatever it raises."""
    modules = {id(each.module): each.module for each in places}
    memories = [Snapshot(module) for module in modules.values()]
    try:
        yield memories
    except BaseException:
        for memory in memories:
            memory.restore()
        raise


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, set, list)) else value
