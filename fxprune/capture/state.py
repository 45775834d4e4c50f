"""state: what calls of a model may change, kept so that it can be put back by value."""

from __future__ import annotations

import functools
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import InputError

# Tensors that are no buffers are copied up to this many bytes in all, the smallest first.
_COPIED = 64 * 2**20
_CHUNK = 2**20
# Eight bytes are two numbers: products with the top bit of 64 would all be alike.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


class State:
    """Everything that is reached from a model: attributes, containers, generators, tensors, each as it was.

    Walked are modules, dicts, lists, tuples, sets, deques, and objects of the package that the module which holds them
    comes from. Buffers and small tensors are copied, arrays of numbers alike. Weights beyond those have a fingerprint,
    for a copy would double the memory of the model: one of them that is written to is an error. Global settings of
    torch are kept as well.
    """

    def __init__(self, model: nn.Module, weights: Collection[int] = ()) -> None:
        """`weights` are ids of buffers that are as large as weights and are treated as these."""
        self._settings = _settings()
        self._containers: list[tuple[Any, Any]] = []
        tensors: list[tuple[str, Tensor]] = []
        for path, found in _reached(model):
            if isinstance(found, Tensor):
                tensors.append((path, found))
            else:
                self._containers.append((found, _contents(found)))
        buffers = {id(buffer) for module in model.modules() for buffer in module._buffers.values()} - set(weights)
        left = _COPIED
        self._tensors: list[_Kept] = []
        for path, tensor in sorted(tensors, key=lambda found: found[1].nbytes):
            is_buffer, size = id(tensor) in buffers, tensor.nbytes
            self._tensors.append(_Kept(path, tensor, copied=is_buffer or size <= left))
            left -= 0 if is_buffer else size

    def restore(self) -> bool:
        """Puts back what is not as it was, and says whether anything of the model was not."""
        self._settings()
        changed = [_put_back(container, contents) for container, contents in self._containers]
        return any(changed + [kept.restore() for kept in self._tensors])

    def check(self) -> None:
        """Raises InputError where a tensor that was not copied has other values than it had."""
        changed = [kept.path for kept in self._tensors if kept.is_lost()]
        if changed:
            raise InputError(
                "cannot transform a model that writes to its weights",
                where=f'"{changed[0]}"' + (f" and {len(changed) - 1} more" if len(changed) > 1 else ""),
                why="a call of the model changed it; it is too large to have been copied, and holds the new values now",
                do="Load its values again, and take the write out of forward.",
            )


class _Kept:
    """A tensor with what tells whether it changed: its memory, and a copy or a fingerprint of what that holds."""

    def __init__(self, path: str, tensor: Tensor, *, copied: bool) -> None:
        self.path, self._tensor = path, tensor
        # What is written through .data takes other memory; this one then still has the values.
        self._memory = tensor.detach()
        self._requires_grad = tensor.requires_grad
        self._copy = self._memory.clone() if copied else None
        self._fingerprint = None if copied else fingerprint(self._memory)

    def restore(self) -> bool:
        tensor, memory = self._tensor, self._memory
        moved = not _same_memory(tensor, memory)
        if moved:
            tensor.data = memory
        written = self._copy is not None and not _same_bits(memory, self._copy)
        if written and self._copy is not None:
            with torch.no_grad():
                memory.copy_(self._copy)
        if tensor.is_leaf and tensor.requires_grad != self._requires_grad:
            tensor.requires_grad_(self._requires_grad)
        return moved or written

    def is_lost(self) -> bool:
        return self._fingerprint is not None and fingerprint(self._memory) != self._fingerprint


def fingerprint(tensor: Tensor) -> int:
    """A number that changes with the bits of a tensor, and with their order; needs little memory beside it."""
    bits = _bits(tensor)
    factors = _factors(bits.device)
    sums = [(chunk * factors[: chunk.numel()]).sum() for chunk in bits.split(_CHUNK)]
    found = 0
    for total in torch.stack(sums).tolist():
        found = (1000003 * found + total) % (2**61 - 1)
    return found


@functools.cache
def _factors(device: torch.device) -> Tensor:
    # A plain sum would not see values that change places or signs.
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randint(2**30, (_CHUNK,), generator=generator) + 1).to(device)


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers [n], over its own memory where that is dense."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
    flat = tensor.detach().resolve_neg().permute(order).reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.stride() != b.stride():
        a, b = a.contiguous(), b.contiguous()
    return torch.equal(_bits(a), _bits(b))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    same = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    return same and a.dtype == b.dtype and a.device == b.device


def _reached(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, found) of the tables, containers, generators and tensors that are reached from a model, each once."""
    waiting: list[tuple[str, str, Any]] = [("", "", model)]
    seen: dict[int, Any] = {}
    while waiting:
        path, package, found = waiting.pop()
        if id(found) in seen:
            continue
        seen[id(found)] = found
        found = _as_tensor(found)
        if isinstance(found, torch.Generator) or (isinstance(found, Tensor) and _is_plain(found)):
            yield path, found
        if _is_walked(found, package):
            package, found = _package(found), vars(found)
        if isinstance(found, (dict, list, tuple, set, deque)):
            if not isinstance(found, tuple):
                yield path, found
            items = _contents(found) if isinstance(found, dict) else enumerate(found)
            waiting += [(_joined(path, name), package, inside) for name, inside in items]


def _as_tensor(found: Any) -> Any:
    """An array of numpy as a tensor over its memory, where torch can read it; all else as it is."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(found, numpy.ndarray) or not found.flags.writeable:
        return found
    try:
        return torch.from_numpy(found)
    # Numbers that torch does not have, and steps backward.
    except (TypeError, ValueError):
        return found


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own to read: it is not on meta, fake, sparse, quantised or a wrapper."""
    own: Any = type(tensor)
    plain: Any = Tensor
    if own.__torch_dispatch__ is not plain.__torch_dispatch__ or tensor.is_meta:
        return False
    return tensor.layout is torch.strided and not tensor.is_quantized


def _is_walked(found: Any, package: str) -> bool:
    if isinstance(found, nn.Module):
        return True
    # A logger, say, would lead to every logger there is.
    own = package != "torch" and _package(found) == package
    return own and hasattr(found, "__dict__") and not isinstance(found, type)


def _package(found: object) -> str:
    return type(found).__module__.partition(".")[0]


def _contents(found: Any) -> Any:
    if isinstance(found, torch.Generator):
        return found.get_state()
    if isinstance(found, set):
        return set(found)
    return list(_kind(found).items(found)) if isinstance(found, dict) else list(found)


def _kind(found: object) -> Any:
    # An OrderedDict has an order of its own beside that of a dict; others may do more than they are told.
    return OrderedDict if isinstance(found, OrderedDict) else dict


def _joined(path: str, name: Any) -> str:
    # Tensors go by the names that users know them by.
    if name in ("_modules", "_parameters", "_buffers"):
        return path
    return f"{path}.{name}".lstrip(".") if isinstance(name, (str, int)) else path


def _put_back(container: Any, saved: Any) -> bool:
    """Puts back what a container held where it is not the same, and says whether it was not."""
    now = _contents(container)
    if isinstance(container, torch.Generator):
        changed = not torch.equal(now, saved)
        container.set_state(saved)
    elif isinstance(container, set):
        changed = now != saved
        if changed:
            container.clear()
            container.update(saved)
    elif isinstance(container, dict):
        changed = len(now) != len(saved) or any(a is not c or b is not d for (a, b), (c, d) in zip(now, saved))
        if changed:
            _kind(container).clear(container)
            for name, value in saved:
                _kind(container).__setitem__(container, name, value)
    else:
        changed = len(now) != len(saved) or any(a is not b for a, b in zip(now, saved))
        if changed:
            container.clear()
            container.extend(saved)
    return changed


def _settings() -> Callable[[], None]:
    """What puts back the global settings as they are now."""
    grad, dtype, deterministic = torch.is_grad_enabled(), torch.get_default_dtype(), _deterministic()

    def put_back() -> None:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if _deterministic() != deterministic:
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])

    return put_back


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def random_streams() -> Callable[[], None]:
    """What puts back the random streams as they are now."""
    streams: list[tuple[Callable[[Any], object], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    if torch.cuda.is_initialized():
        streams.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if numpy := sys.modules.get("numpy"):
        streams.append((numpy.random.set_state, numpy.random.get_state()))

    def put_back() -> None:
        for write, value in streams:
            write(value)

    return put_back
