"""The CPU ops fxprune::nonzeros_linear and nonzeros_linear_split: schemas, shape rules, plain-torch kernels, loading.

The ops exist as soon as this module is imported. Their C++ kernels are compiled and loaded at the first call (or by
`load`); where that cannot be, the plain-torch kernels below answer: right, but slow.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.errors import BuildError, InputError, warn_once
from fxprune.graph.environment import variable

from . import build, segments


@dataclass(frozen=True)
class Status:
    """Whether the C++ kernels run on this machine, with which vector instructions, from which file; if not, why."""

    available: bool
    detail: str
    isa: str = ""
    object: str = ""


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
ACTIVATIONS = tuple(_ACTIVATIONS)

_library = torch.library.Library("fxprune", "FRAGMENT")
# The schema of every op, for those who define them where fxprune is not imported.
SCHEMAS: dict[str, str] = {}
_PACKED = "Tensor values, Tensor columns, Tensor order, Tensor counts, Tensor blocks, Tensor? bias"
_lock = threading.Lock()
_status: Status | None = None
_object: ctypes.CDLL | None = None


def load() -> Status:
    """Build and load the C++ kernels, once per process; never raises. FXPRUNE_NATIVE=0 leaves them out."""
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _load()
    return _status


status = load


def function_of_object(name: str) -> Any:
    """A C function of the compiled kernels, for ctypes; None where they do not run on this machine."""
    return getattr(_object, name) if load().available else None


def _load() -> Status:
    global _object
    if variable("FXPRUNE_NATIVE") == "0":
        return Status(False, "switched off by FXPRUNE_NATIVE=0")
    try:
        path = build.build()
        _object = _loaded(path)
        name = _object.fxprune_isa
        name.restype = ctypes.c_char_p
        isa = name().decode()
    except (BuildError, OSError, RuntimeError) as error:
        why = f"{error} {error.__cause__ or ''}".strip()
        warn_once(
            f"fxprune runs without its C++ kernels, so weights with scattered zeros stay dense on the CPU: {why} "
            "Install g++ or name a C++ compiler in CXX; FXPRUNE_NATIVE=0 says that it is meant."
        )
        return Status(False, why)
    return Status(True, f"C++ kernels with {isa}", isa, path.name)


def _loaded(path: Path) -> ctypes.CDLL:
    """The object, which registers its kernels when it is loaded: once, also where a package brought it with itself."""
    try:
        return ctypes.CDLL(build.soname(path), mode=os.RTLD_NOLOAD)
    # It is not in the process, or this system cannot tell.
    except (OSError, AttributeError):
        torch.ops.load_library(path)
        return ctypes.CDLL(str(path))


def activated(y: Tensor, activation: str) -> Tensor:
    """activation(y), contiguous. Raises InputError for one that the kernels do not have."""
    if activation not in _ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}", do=f"Use one of {ACTIVATIONS}.")
    return _ACTIVATIONS[activation](y).contiguous()


def to_dense(values: Tensor, columns: Tensor, order: Tensor, counts: Tensor, blocks: Tensor) -> Tensor:
    """The weight [o, i] that the tensors of the nonzeros layout store, bit for bit."""
    o, i, row_block, k_block = blocks[:4].tolist()
    packed = segments.Segments(values, columns, order, counts, blocks[4:])
    return segments.unpack(packed, (o, i), row_block, k_block)


def nonzeros_linear_reference(
    x: Tensor, values: Tensor, columns: Tensor, order: Tensor, counts: Tensor, blocks: Tensor,
    bias: Tensor | None, out_features: int, activation: str,
) -> Tensor:  # fmt: skip
    """activation(x [..., i] @ W^T + bias) [..., o] in plain torch: the definition, and the fallback."""
    if x.dtype != torch.float32:
        raise InputError("nonzeros_linear takes float32 only", why=f"x is {x.dtype}")
    if blocks[:2].tolist() != [out_features, *x.shape[-1:]]:
        why = f"the packed weight is {blocks[:2].tolist()}, the call wants {[out_features, *x.shape[-1:]]}"
        raise InputError("nonzeros_linear got a weight of another shape", why=why)
    return activated(F.linear(x, to_dense(values, columns, order, counts, blocks), bias), activation)


def nonzeros_linear_split_reference(
    x: Tensor, values: Tensor, columns: Tensor, order: Tensor, counts: Tensor, blocks: Tensor,
    bias: Tensor | None, out_features: Sequence[int], activation: str,
) -> list[Tensor]:  # fmt: skip
    """nonzeros_linear with the rows of W dealt out in order: one tensor [..., out_features[j]] for each part."""
    if min(out_features, default=0) < 0:
        raise InputError("nonzeros_linear_split cannot deal out the rows", why=f"the parts have {out_features}")
    y = nonzeros_linear_reference(x, values, columns, order, counts, blocks, bias, sum(out_features), activation)
    return [part.clone(memory_format=torch.contiguous_format) for part in y.split(list(out_features), -1)]


def runs() -> bool:
    """Whether the C++ kernels run on this machine."""
    return load().available


def register(
    name: str,
    arguments: str,
    results: str,
    reference: Callable[..., Any],
    shape: Callable[..., Any],
    runs: Callable[[], bool] = runs,
) -> None:
    """Define the op fxprune::`name`: by the C++ kernel where that `runs`, else by `reference`; `shape` is its fake.

    A library that was made for processes without fxprune may have defined it (`op_library`). Raises BuildError where
    that library is of another version.
    """
    SCHEMAS[name] = f"{name}({arguments}) -> {results}"
    known = torch._C._jit_get_schemas_for_operator(f"fxprune::{name}")
    if not known:
        _library.define(SCHEMAS[name], tags=(torch.Tag.needs_fixed_stride_order,))
    elif known != [torch._C.parse_schema(f"fxprune::{SCHEMAS[name]}")]:
        raise BuildError(
            f"cannot define the op fxprune::{name}",
            why=f"something that this process has loaded defines it as {known[0]}",
            do="Load what another version of fxprune exported in a process of its own, or export it anew.",
        )

    def first_call(*given: Any) -> Any:
        # Registered below the CPU key: once the C++ kernel is loaded, the dispatcher never comes here again.
        first = given[0] if isinstance(given[0], Tensor) else given[0][0]
        if first.device.type == "cpu" and runs():
            return getattr(torch.ops.fxprune, name).default(*given)
        return reference(*given)

    _library.impl(name, first_call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxprune::{name}", shape, lib=_library)


def shape(x: Tensor, *packed_and_bias: Any) -> Tensor:
    """The result of an op whose last arguments are out_features and activation."""
    *_, out_features, _activation = packed_and_bias
    return x.new_empty(*x.shape[:-1], out_features)


def shapes(x: Tensor, *packed_and_bias: Any) -> list[Tensor]:
    """The results of an op that splits its rows."""
    *_, out_features, _activation = packed_and_bias
    return [x.new_empty(*x.shape[:-1], rows) for rows in out_features]


register(
    "nonzeros_linear",
    f"Tensor x, {_PACKED}, int out_features, str activation",
    "Tensor",
    nonzeros_linear_reference,
    shape,
)
register(
    "nonzeros_linear_split",
    f"Tensor x, {_PACKED}, int[] out_features, str activation",
    "Tensor[]",
    nonzeros_linear_split_reference,
    shapes,
)
