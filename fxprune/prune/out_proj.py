"""The output projection of nn.MultiheadAttention: its forward never runs, so that no hook can renew its weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .masked import masked


def _computed(name: str) -> property:
    """A property that is `name_orig * name_mask` at each read while the parameter `name` is pruned."""

    def get(self: MaskedOutProj) -> Tensor:
        pair = self._pair(name)
        if pair is not None:
            return masked(*pair)
        if name in vars(self):
            return vars(self)[name]
        raise AttributeError(name)  # nn.Module's own look-up comes next and finds the parameter

    def put(self: MaskedOutProj, value: object) -> None:
        if self._pair(name) is None:  # what a hook computes need not be kept
            vars(self)[name] = value

    def drop(self: MaskedOutProj) -> None:
        vars(self).pop(name, None)

    return property(get, put, drop)


class MaskedOutProj(NonDynamicallyQuantizableLinear):
    """Reads its pruned weight anew at each use; becomes what it was once no parameter of it is pruned."""

    weight = _computed("weight")  # pyright: ignore[reportAssignmentType]
    bias = _computed("bias")  # pyright: ignore[reportAssignmentType]

    def __setattr__(self, name: str, value: object) -> None:
        """As nn.Module; a parameter that takes its place again ends this class where it was the last."""
        super().__setattr__(name, value)  # pyright: ignore[reportArgumentType]
        ended = isinstance(value, nn.Parameter) and self._pair("weight") is None and self._pair("bias") is None
        if ended:
            self.__class__ = NonDynamicallyQuantizableLinear  # pyright: ignore[reportAttributeAccessIssue]

    def _pair(self, name: str) -> tuple[Tensor, Tensor] | None:
        original, mask = self._parameters.get(f"{name}_orig"), self._buffers.get(f"{name}_mask")
        return None if original is None or mask is None else (original, mask)

    def _get_name(self) -> str:
        return "NonDynamicallyQuantizableLinear"


def read_anew(module: nn.Module, name: str) -> None:
    """Let a module whose forward never runs compute its pruned parameter `name` at each read."""
    if type(module) is NonDynamicallyQuantizableLinear and name in ("weight", "bias"):
        module.__class__ = MaskedOutProj
