"""export_call: a call that a result takes, made from what its entry check says of its inputs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.capture.entry import EntryCheck, TensorInput
from fxprune.check.calls import Call
from fxprune.errors import InputError
from fxprune.graph import compat

# Sizes that models ask for: small ones, then multiples and sides of images.
_SIZES = (*range(2, 34), 48, 64, 96, 128, 160, 192, 196, 197, 224, 256, 384, 512, 1024)
_MOST_TRIES = 20_000
_SYMBOL = re.compile(r"\b[a-z]\d+\b")


def made_call(entry: EntryCheck, wanted: Mapping[str, int] | None = None) -> Call:
    """A call at the sizes `wanted` of the symbols, or at the smallest that the entry check accepts, different ones
    where it lets them differ.

    Floats are drawn, integers are 0, flags are True. Raises InputError where no sizes are found.
    """
    symbols = _symbols(entry)
    first = [{symbol: wanted[symbol] for symbol in symbols}] if wanted and set(symbols) <= set(wanted) else []
    for sizes in itertools.chain(first, _assignments(symbols)):
        if all(_is_met(condition, entry, sizes) for condition, _ in entry.guards):
            values = [_value(want, sizes, index) for index, want in enumerate(entry.inputs)]
            args, kwargs = structured(entry, values)
            if entry.takes(args, kwargs):
                return Call("made call", args, kwargs)
    conditions = "; ".join(readable for _, readable in entry.guards)
    raise InputError(
        "cannot make inputs that the result takes",
        why=f"no sizes were found that meet its conditions ({conditions or 'none'})",
        do="Pass example_inputs=, as to transform.",
    )


def structured(entry: EntryCheck, flat: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Flat inputs as the arguments of a call."""
    args, kwargs = pytree.tree_unflatten(flat, entry.spec) if entry.spec is not None else (flat, {})
    return tuple(args), dict(kwargs)


def _symbols(entry: EntryCheck) -> list[str]:
    """The symbols in the sizes of the inputs, in order."""
    sizes = [size for want in entry.inputs if isinstance(want, TensorInput) for size in want.sizes]
    return list(dict.fromkeys(symbol for size in sizes if isinstance(size, str) for symbol in _SYMBOL.findall(size)))


def _assignments(symbols: list[str]) -> Iterator[dict[str, int]]:
    """Sizes to try for the symbols: all different, all equal, then any."""
    if not symbols:
        yield {}
        return
    different = (sizes for sizes in itertools.product(_SIZES, repeat=len(symbols)) if len({*sizes}) == len(symbols))
    equal = ((size,) * len(symbols) for size in _SIZES)
    half = _MOST_TRIES // 2
    tries = itertools.chain(
        itertools.islice(different, half), equal, itertools.islice(itertools.product(_SIZES, repeat=len(symbols)), half)
    )
    for sizes in tries:
        yield dict(zip(symbols, sizes))


class _Sized:
    """What a condition reads of a tensor."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.shape = sizes

    def size(self) -> tuple[int, ...]:
        return self.shape


def _is_met(condition: str, entry: EntryCheck, sizes: Mapping[str, int]) -> bool:
    """Whether sizes meet a condition, as far as it is one on sizes: the entry check says the rest."""
    inputs = [_Sized(_shape(want, sizes)) if isinstance(want, TensorInput) else 2 for want in entry.inputs]
    try:
        return bool(eval(condition, {**compat.guard_names(), "a": inputs}))
    except ZeroDivisionError:
        return False
    except (AttributeError, TypeError):
        return True


def _shape(want: TensorInput, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an input where its symbols stand for these sizes."""
    names = {**compat.guard_names(), **sizes}
    return tuple(int(eval(size, names)) if isinstance(size, str) else size for size in want.sizes)


def _value(want: TensorInput | tuple[str, Any] | None, sizes: Mapping[str, int], seed: int) -> Any:
    if isinstance(want, TensorInput):
        return _tensor(want, _shape(want, sizes), seed)
    if want is None or want[0] == "constant":
        return want[1] if want is not None else None
    return want[1](2)


def _tensor(want: TensorInput, shape: tuple[int, ...], seed: int) -> Tensor:
    turned = want.contiguous is False and len(shape) > 1
    laid_out = [*shape[:-2], *reversed(shape[-2:])] if turned else shape
    if want.dtype.is_floating_point or want.dtype.is_complex:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(laid_out, generator=generator).to(want.dtype)
    else:
        drawn = torch.full(laid_out, want.dtype is torch.bool, dtype=want.dtype)
    return (drawn.transpose(-1, -2) if turned else drawn).to(want.device)
