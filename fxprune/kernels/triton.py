"""triton_kernels, and where they can run."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fxprune.graph.environment import words_of

# From a checkout that is not installed, triton_kernels/ stands beside this package instead of inside it.
_root = Path(__file__).parent.parent.parent
if not (_root / "fxprune" / "triton_kernels").exists() and (_root / "triton_kernels").exists():
    sys.modules["fxprune"].__path__.append(str(_root))

# ruff: noqa: F401 (others import the kernels from here)
if TYPE_CHECKING:
    from triton_kernels import (
        activation,
        bitmap,
        blocks,
        gemv24,
        language,
        masked,
        nonzeros,
        operands,
        prune24,
        select,
    )
else:
    from fxprune.triton_kernels import (
        activation,
        bitmap,
        blocks,
        gemv24,
        language,
        masked,
        nonzeros,
        operands,
        prune24,
        select,
    )

# What torch's and Triton's tensor cores have in common begins here.
OLDEST = (8, 0)


def cannot_run_on(device: torch.device) -> str:
    """Why no kernel can run on a device; nothing if they can."""
    if device.type != "cuda":
        return f"the kernel runs on CUDA, not on {device}"
    if language.WHY_NOT:
        return language.WHY_NOT
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST:
        return f"the GPU is sm_{major}{minor}, the kernel needs sm_{OLDEST[0]}{OLDEST[1]} or newer"
    return _cannot_launch(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cannot_launch(index: int) -> str:
    """Why the smallest kernel does not run on a GPU: at the first launch Triton needs a C compiler."""
    try:
        prune24.pack(torch.zeros(1, 4, dtype=torch.float16, device=f"cuda:{index}"))
    except Exception as error:  # Whatever it is, it is told, and the plain way is taken.
        return f"Triton cannot launch a kernel ({words_of(error)})"
    return ""
