"""activation: the functions that a kernel can apply to what it stores, computed in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .language import constexpr, jit, tl

NAMES = ("", "relu", "gelu", "gelu_tanh", "silu")


def reference(y: Tensor, name: str) -> Tensor:
    """y of any shape -> act(y). Raises ValueError for a name that is not in NAMES."""
    if name == "relu":
        return y.relu()
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(y, approximate="tanh" if name == "gelu_tanh" else "none")
    if name == "silu":
        return F.silu(y)
    if name:
        raise ValueError(f"there is no activation {name!r}, only {', '.join(map(repr, NAMES))}")
    return y


def index(name: str) -> int:
    """The kernels' number of a name. Raises ValueError as `reference` does."""
    if name not in NAMES:
        reference(torch.empty(0), name)
    return NAMES.index(name)


@jit
def activate(y, KIND: constexpr):
    """y float32 -> act(y), by its number in NAMES."""
    if KIND == 1:
        return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == 2:
        return 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif KIND == 3:
        # tanh(z) = 2 sigmoid(2 z) - 1
        return y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif KIND == 4:
        return y * tl.sigmoid(y)
    else:
        return y
