"""The one place that knows differences between torch (and transformers) versions, 2.11 to newest."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import _pytree as fx_pytree
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


def guards_code(exported: torch.export.ExportedProgram) -> list[str]:
    """Conditions on the inputs that torch.export relied on, as Python over `L['argument'].size()[dim]`.

    The attribute is private; a version without it must not be captured with dynamic shapes, so its absence raises.
    """
    return [str(line) for line in exported._guards_code]


def drop_guards(exported: torch.export.ExportedProgram, codes: Collection[str]) -> None:
    """Takes conditions that `guards_code` has out of a program that was exported."""
    exported._guards_code = [line for line in exported._guards_code if str(line) not in codes]


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
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache
        from transformers.integrations import executorch
    except ImportError:
        return
    register = getattr(executorch, "register_dynamic_cache_export_support", None)
    if register is not None and DynamicCache not in pytree.SUPPORTED_NODES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            register()
    if EncoderDecoderCache not in pytree.SUPPORTED_NODES:
        parts = ("self_attention_cache", "cross_attention_cache")

        def flatten(cache: Any) -> tuple[list[Any], None]:
            return [getattr(cache, part) for part in parts], None

        pytree.register_pytree_node(
            EncoderDecoderCache,
            flatten,
            lambda caches, _: EncoderDecoderCache(*caches),
            serialized_type_name="transformers.cache_utils.EncoderDecoderCache",
            flatten_with_keys_fn=lambda cache: (  # pyright: ignore[reportArgumentType]
                [(pytree.GetAttrKey(part), value) for part, value in zip(parts, flatten(cache)[0], strict=True)],
                None,
            ),
        )
        fx_pytree.register_pytree_flatten_spec(EncoderDecoderCache, lambda cache, _: flatten(cache)[0])
    for kind in (DynamicCache, EncoderDecoderCache):
        # Dynamo stumbles over the caches' constructors; a result that returns one compiles up to there.
        node = pytree.SUPPORTED_NODES.get(kind)
        if node is not None and not hasattr(node.unflatten_fn, "_torchdynamo_disable"):
            pytree.SUPPORTED_NODES[kind] = node._replace(unflatten_fn=torch.compiler.disable(node.unflatten_fn))


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Export without its warnings and logged errors about things that are ours to handle."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def symbol_hint(shape_env: Any, symbol: Any, unknown: int = 64) -> int:
    """The example's value of a symbolic size; `unknown` where only a run tells it (the rows of a boolean index)."""
    if shape_env.is_unbacked_symint(symbol):
        return unknown
    hint = getattr(shape_env, "guarding_hint_or_throw", None) or shape_env.size_hint
    return int(hint(symbol))


def example_size(size: Any, least: int = 0) -> Any:
    """A size as a number: each symbol stands at the example's value, or at `least` where that is more."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat)):
        return size
    symbols = size.node.expr.free_symbols
    found = size.node.expr.subs({symbol: max(least, symbol_hint(size.node.shape_env, symbol)) for symbol in symbols})
    return float(found) if isinstance(size, torch.SymFloat) else int(found)


def return_memory(expected: int) -> None:
    """Frees what a stage left and hands it back to the system.

    Graphs are cycles that wait for the collector, and glibc keeps what was freed: together as much as the weights.
    Both steps take time, so nothing is done for `expected` bytes that nobody would miss.
    """
    if expected < 32e6:
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def many_compilations() -> Iterator[None]:
    """Lets one forward be compiled in many ways: past Dynamo's limit of 8 it would run eager without a word."""
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
        yield


@contextlib.contextmanager
def constants_go_with_code() -> Iterator[None]:
    """What Inductor compiles inside keeps its frozen weights as long as somebody can call it.

    Inductor keeps each module that it generates, and with it the constants, for as long as the process lives.
    """
    from torch._inductor.codecache import PyCodeCache

    before = len(PyCodeCache.modules)
    try:
        yield
    finally:
        without = {id(module) for module in PyCodeCache.modules_no_attr.values()}
        for module in PyCodeCache.modules[before:]:
            if id(module) not in without:
                PyCodeCache.modules.remove(module)
                if sys.modules.get(module.__name__) is module:
                    del sys.modules[module.__name__]


@contextlib.contextmanager
def real_tensors_beside(values: Sequence[Any]) -> Iterator[None]:
    """Ops may meet real tensors beside these fake values: some make tensors of the numbers that they are given."""
    modes = dict.fromkeys(value.fake_mode for value in values if isinstance(value, FakeTensor))
    before = [mode.allow_non_fake_inputs for mode in modes]
    for mode in modes:
        mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        for mode, allowed in zip(modes, before, strict=True):
            mode.allow_non_fake_inputs = allowed


class GroupNormGoesBackward(TorchFunctionMode):
    """Inside, a group norm over an image in channels_last that needs no gradient can go backward.

    On the CPU torch 2.13 would end the process there, reading a gradient that nobody asked for.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's answer, for a norm over the same image in the plain format."""
        if getattr(func, "__name__", "").startswith(("group_norm", "native_group_norm")):
            args = [plain_where_fixed(arg) if place == 0 else arg for place, arg in enumerate(args)]
            kwargs = {name: plain_where_fixed(arg) if name == "input" else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def plain_where_fixed(image: Any) -> Any:
    """The image in the plain memory format, unless it needs a gradient."""
    return image if image.requires_grad else image.contiguous()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One thread at a time captures and compiles, and may do so again inside: what torch.export sets, all threads see.

    The lock is the one that torch.compile holds while it compiles. With one of our own, a thread that compiles inside a
    transform and one that transforms inside a compilation would wait for each other.
    """
    with getattr(torch._dynamo.convert_frame, "compile_lock", _LOCK):
        yield


_LOCK = threading.RLock()


def children_of(spec: Any) -> list[Any]:
    """The specs of a tree's branches: a method in newer versions of torch, an attribute in older ones."""
    return list(spec.children()) if hasattr(spec, "children") else list(spec.children_specs)


@contextlib.contextmanager
def read_tensors(path: Any) -> Iterator[tuple[dict[str, str], list[str], Callable[[str], Tensor]]]:
    """The header's texts, the names of the tensors, and what reads one of them, of a safetensors file.

    Each tensor has memory of its own: what is mapped would change with the file, and end the process where it shrinks.
    """
    import safetensors

    try:
        file, is_mapped = safetensors.safe_open(path, "pt", backend="pread"), False
    except TypeError:  # Before safetensors 0.8.
        file, is_mapped = safetensors.safe_open(path, "pt"), True
    with file:
        yield (
            file.metadata() or {},
            list(file.keys()),
            lambda key: file.get_tensor(key).clone() if is_mapped else file.get_tensor(key),
        )
