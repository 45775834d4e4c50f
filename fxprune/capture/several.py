"""several: example calls of different sizes, whose graph is to take them all: what differs between them is dynamic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from fxprune.errors import InputError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Differing:
    """The dimensions that differ between calls, for each flat input."""

    dims: tuple[tuple[int, ...], ...]

    def shapes(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, with_batch: bool) -> ShapesCollection:
        """Dynamic shapes of a call for torch.export; `with_batch` dim 0 of every tensor is dynamic as well."""
        shapes = ShapesCollection()
        for leaf, dims in zip(pytree.tree_leaves((args, kwargs)), self.dims, strict=True):
            if isinstance(leaf, Tensor):
                dynamic = {*dims, *((0,) if with_batch and leaf.dim() and leaf.shape[0] else ())}
                if dynamic:
                    shapes[leaf] = dict.fromkeys(sorted(dynamic), Dim.AUTO)
        return shapes


def is_several(args: Any) -> bool:
    """Whether example inputs are a list of calls: tuples of arguments, or dicts of them by name."""
    kinds = (tuple, Mapping)
    return isinstance(args, list) and len(args) > 1 and any(all(isinstance(a, kind) for a in args) for kind in kinds)


def differing(calls: Sequence[Arguments]) -> Differing:
    """What differs between calls. Raises InputError where that is more than sizes."""
    first, spec = pytree.tree_flatten(calls[0])
    dims: list[set[int]] = [set() for _ in first]
    for number, call in enumerate(calls[1:], 2):
        leaves, other = pytree.tree_flatten(call)
        if other != spec:
            raise _apart(number, "its arguments are nested otherwise, or have other names")
        for place, (a, b) in enumerate(zip(first, leaves, strict=True)):
            if not isinstance(a, Tensor) or not isinstance(b, Tensor):
                if type(a) is not type(b) or a != b:
                    raise _apart(number, f"flat input {place + 1} is {a!r:.60} in the first and {b!r:.60} in this one")
            elif (a.dtype, a.device, a.dim()) != (b.dtype, b.device, b.dim()):
                kinds = [f"{t.dtype} with {t.dim()} dimensions on {t.device}" for t in (a, b)]
                raise _apart(number, f"flat input {place + 1} is {kinds[0]} in the first and {kinds[1]} in this one")
            else:
                dims[place].update(dim for dim, (m, n) in enumerate(zip(a.shape, b.shape)) if m != n)
    return Differing(tuple(tuple(sorted(each)) for each in dims))


def widest(calls: Sequence[Arguments], dims: Differing) -> Arguments:
    """The call whose smallest differing size is the largest: what export learns of a size of 1 is seldom true."""

    def smallest(call: Arguments) -> int:
        pairs = zip(pytree.tree_leaves(call), dims.dims, strict=True)
        return min((leaf.shape[dim] for leaf, own in pairs for dim in own), default=0)

    return max(calls, key=smallest)


def _apart(number: int, why: str) -> InputError:
    return InputError(
        "cannot make one graph for these example calls",
        where=f"call {number} of example_inputs",
        why=f"{why}; calls of one result may differ in sizes alone",
        do="Transform once for each kind of call.",
    )
