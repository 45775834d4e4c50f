"""Which module a pruning hook acts on, so that a copy of the module can be made at any time.

A pruned weight is a plain attribute that autograd computed, and deepcopy refuses such tensors. A module's hooks are
copied before its plain attributes: the hook's Home then tells deepcopy what stands in for the weight.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from .masked import masked


class Home:
    """A weak reference to a module, which deepcopy and pickle carry over to the module's copy."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = None if module is None else weakref.ref(module)

    def module(self) -> nn.Module | None:
        """The module, while it lives."""
        return None if self._module is None else self._module()

    def __deepcopy__(self, memo: dict[int, Any]) -> Home:
        """The home of the copied hook; gives `memo` copies of the pruned weights of this module."""
        module = self.module()
        if module is None:
            return Home(None)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, torch_prune.BasePruningMethod):
                _remember_copy(module, hook._tensor_name, memo)
        return Home(memo.get(id(module)))

    def __getstate__(self) -> dict[str, nn.Module | None]:
        """The module itself: pickle meets it again while it writes that module."""
        return {"module": self.module()}

    def __setstate__(self, state: dict[str, nn.Module | None]) -> None:
        """Refer weakly to what pickle has read."""
        self.__init__(state["module"])


def _remember_copy(module: nn.Module, name: str, memo: dict[int, Any]) -> None:
    value = vars(module).get(name)
    if not isinstance(value, Tensor) or value.is_leaf or id(value) in memo:
        return
    original = memo.get(id(module._parameters.get(f"{name}_orig")))
    mask = memo.get(id(module._buffers.get(f"{name}_mask")))
    if original is None or mask is None:
        memo[id(value)] = value.detach().clone()
    else:
        with torch.enable_grad():
            memo[id(value)] = masked(original, mask)
