"""The one place that knows differences between torch (and transformers) versions, 2.11 to newest."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch


def guards_code(exported: torch.export.ExportedProgram) -> list[str]:
    """Conditions on the inputs that torch.export relied on, as Python over `L['argument'].size()[dim]`.

    The attribute is private; a version without it must not be captured with dynamic shapes, so its absence raises.
    """
    return [str(line) for line in exported._guards_code]


def guard_names() -> dict[str, Any]:
    """Names that guard conditions may use besides `L`: sympy's printers emit Max, FloorDiv, Mod and so on."""
    import math

    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    return {**SYMPY_INTERP, "math": math, "inf": float("inf"), "torch": torch}


@contextlib.contextmanager
def sizes_of_one_stay_dynamic() -> Iterator[None]:
    """Lets an example of batch 1 stand for every batch: export does not specialise on a size of 1."""
    from torch.fx.experimental import _config

    with _config.patch(backed_size_oblivious=True):  # pyright: ignore[reportAttributeAccessIssue]
        yield


def register_foreign_outputs() -> None:
    """Makes the cache objects that transformers models return known to torch.export, if transformers is loaded."""
    if "transformers" not in sys.modules:
        return
    try:
        from transformers.cache_utils import DynamicCache
        from transformers.integrations import executorch
    except ImportError:
        return
    if DynamicCache in torch.utils._pytree.SUPPORTED_NODES:
        return
    register = getattr(executorch, "register_dynamic_cache_export_support", None)
    if register is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            register()


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Export without its warnings about things that are ours to handle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def symbol_hint(shape_env: Any, symbol: Any, unknown: int = 64) -> int:
    """The example's value of a symbolic size; `unknown` where only a run tells it (the rows of a boolean index)."""
    if shape_env.is_unbacked_symint(symbol):
        return unknown
    hint = getattr(shape_env, "guarding_hint_or_throw", None) or shape_env.size_hint
    return int(hint(symbol))


def return_memory() -> None:
    """Hands freed memory back to the system: glibc keeps what a stage freed, as much as the dense weights themselves."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
