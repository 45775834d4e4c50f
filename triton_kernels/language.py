"""language: triton and its language, or where they do not work stand-ins with which kernels can still be defined."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

triton: Any = None
tl: Any = None
WHY_NOT = ""
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except Exception as error:  # A broken installation raises whatever its compiled half does.
    WHY_NOT = f"triton cannot be imported ({type(error).__name__}: {error})"

if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = None if tl is None else tl.constexpr


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where to launch a kernel that reads x: Triton takes the current device, whatever its arguments lie on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`; without triton the function as it is, which nobody may launch (`WHY_NOT`)."""
    return kernel if triton is None else triton.jit(kernel)
