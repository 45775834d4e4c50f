"""The CPU op fxprune::nonzeros_linear: schema, shape rule, plain-torch kernel, and loading of the C++ one.

The op exists as soon as this module is imported. Its C++ kernel is compiled and loaded at the first call (or
by `load`); where that cannot be, the plain-torch kernel below answers: right, but slow.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.errors import BuildError, InputError
from fxprune.native import build


@dataclass(frozen=True)
class Status:
    """Whether the C++ kernels run on this machine, and with which vector instructions; if not, why."""

    available: bool
    detail: str
    isa: str = ""


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
ACTIVATIONS = tuple(_ACTIVATIONS)

_library = torch.library.Library("fxprune", "FRAGMENT")
_library.define(
    "nonzeros_linear(Tensor x, Tensor values, Tensor columns, Tensor order, Tensor counts, Tensor starts,"
    " Tensor geometry, Tensor? bias, int out_features, str activation) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_lock = threading.Lock()
_status: Status | None = None


def load() -> Status:
    """Build and load the C++ kernels, once per process; never raises. FXPRUNE_NATIVE=0 leaves them out."""
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _load()
    return _status


status = load


def _load() -> Status:
    if os.environ.get("FXPRUNE_NATIVE", "1") == "0":
        return Status(False, "switched off by FXPRUNE_NATIVE=0")
    try:
        path = build.build()
        torch.ops.load_library(path)
        name = ctypes.CDLL(str(path)).fxprune_isa
        name.restype = ctypes.c_char_p
        isa = name().decode()
    except (BuildError, OSError, RuntimeError) as error:
        return Status(False, f"{error} {error.__cause__ or ''}".strip())
    return Status(True, f"C++ kernels with {isa}", isa)


def to_dense(
    values: Tensor, columns: Tensor, order: Tensor, counts: Tensor, starts: Tensor, geometry: Tensor
) -> Tensor:
    """The weight [o, i] that the tensors of the nonzeros layout store, bit for bit."""
    o, i, row_block, k_block = geometry.tolist()
    k_blocks = -(-i // k_block)
    segment = torch.arange(order.numel(), device=order.device)
    # Segments stand by row block, then K-block, then sorted row; the last row block may have fewer rows.
    block = segment // (row_block * k_blocks)
    rows = (o - block * row_block).clamp(max=row_block)
    k = (segment - block * row_block * k_blocks) // rows
    base = (block * row_block + order) * i + k * k_block
    at = base.repeat_interleave(counts.long(), output_size=values.numel()) + columns
    return values.new_zeros(o * i).index_copy_(0, at, values).view(o, i)


def nonzeros_linear_reference(
    x: Tensor, values: Tensor, columns: Tensor, order: Tensor, counts: Tensor, starts: Tensor,
    geometry: Tensor, bias: Tensor | None, out_features: int, activation: str,
) -> Tensor:  # fmt: skip
    """activation(x [..., i] @ W^T + bias) [..., o] in plain torch: the definition, and the fallback."""
    if x.dtype != torch.float32:
        raise InputError("nonzeros_linear takes float32 only", why=f"x is {x.dtype}")
    if activation not in _ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}", do=f"Use one of {ACTIVATIONS}.")
    if geometry[:2].tolist() != [out_features, x.shape[-1]]:
        why = f"the packed weight is {geometry[:2].tolist()}, the call wants {[out_features, x.shape[-1]]}"
        raise InputError("nonzeros_linear got a weight of another shape", why=why)
    y = F.linear(x, to_dense(values, columns, order, counts, starts, geometry), bias)
    return _ACTIVATIONS[activation](y).contiguous()


def _first_call(x: Tensor, *rest: object) -> Tensor:
    # Registered below the CPU key: once the C++ kernel is loaded, the dispatcher never comes here again.
    if x.device.type == "cpu" and load().available:
        return torch.ops.fxprune.nonzeros_linear.default(x, *rest)
    return nonzeros_linear_reference(x, *rest)  # pyright: ignore[reportArgumentType]


def _shape(
    x: Tensor, values: Tensor, columns: Tensor, order: Tensor, counts: Tensor, starts: Tensor,
    geometry: Tensor, bias: Tensor | None, out_features: int, activation: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], out_features)


_library.impl("nonzeros_linear", _first_call, "CompositeExplicitAutograd")
torch.library.register_fake("fxprune::nonzeros_linear", _shape, lib=_library)
