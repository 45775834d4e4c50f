"""rebatch: calibration data as batches of the program, cut anew so that results do not depend on how they came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.capture.capture import Capture
from fxprune.check.calls import Call
from fxprune.check.compare import compare, outputs
from fxprune.errors import InputError
from fxprune.graph.compat import example_size

from .batches import Batch, batch_of, has_samples, in_any_place, map_tensors, samples_of

# A batch is cut so that the largest tensor of the graph has about as many numbers as this.
_LARGEST = 1 << 22
_MOST_SAMPLES = 256
# How far, relative to the largest output, a sample may differ from itself in a batch: by rounding alone.
_APART = 1e-4


def cut(captured: Capture, calls: Sequence[Call]) -> list[Batch]:
    """Calls -> batches of one size for each shape, in order, whatever the size of the calls.

    Where samples cannot be told apart (tensors whose dim 0 differs, or a model that lets samples of a batch see each
    other), calls stay as they are.
    """
    if any(samples_of(call) is None for call in calls) or not _cuttable(captured, calls):
        return [batch_of(captured, call) for call in calls]
    size = _samples_at_a_time(captured)
    by_shape: dict[Any, list[Call]] = {}
    for call in calls:
        by_shape.setdefault(_signature(call), []).append(call)
    batches = []
    for alike in by_shape.values():
        leaves = [pytree.tree_flatten((call.args, call.kwargs)) for call in alike]
        spec = leaves[0][1]
        columns = zip(*(flat for flat, _ in leaves), strict=True)
        joined = [torch.cat(list(column)) if has_samples(column[0]) else column[0] for column in columns]
        names = [call.label for call in alike for _ in range(samples_of(call) or 0)]
        for start in range(0, len(names), size):
            part = [t[start : start + size] if has_samples(t) else t for t in joined]
            args, kwargs = pytree.tree_unflatten(part, spec)
            call = Call(names[start], args, kwargs)
            batches.append(batch_of(captured, call, tuple(names[start : start + size])))
    return batches


def _signature(call: Call) -> Any:
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    return str(spec), tuple((tuple(leaf.shape[1:]), leaf.dtype) if has_samples(leaf) else repr(leaf) for leaf in leaves)


def _cuttable(captured: Capture, calls: Sequence[Call]) -> bool:
    """Whether two samples that are not the same give apart what they give together."""
    both = _two(calls)
    if both is None:
        return False
    one, other = map_tensors(both, lambda t: t[:1]), map_tensors(both, lambda t: t[1:])
    try:
        for each in (both, one):
            captured.entry.check(each.args, each.kwargs)
        together, apart = outputs(captured.program, both), [outputs(captured.program, c) for c in (one, other)]
    except (InputError, RuntimeError):
        return False
    for whole, *parts in zip(together, *apart, strict=True):
        if not isinstance(whole, Tensor) or whole.dim() == 0 or whole.shape[0] != 2:
            return False
        joined = torch.cat(parts)
        if compare("", both, [whole], [joined]).error > _APART:
            return False
    return True


def _two(calls: Sequence[Call]) -> Call | None:
    """The first sample and the next one of its sizes that differs from it, as one call."""
    first, spec = pytree.tree_flatten((calls[0].args, calls[0].kwargs))
    for call in calls:
        if _signature(call) != _signature(calls[0]):
            continue
        leaves = pytree.tree_leaves((call.args, call.kwargs))
        pairs = [(one[:1], leaf) for one, leaf in zip(first, leaves, strict=True) if has_samples(one)]
        apart = torch.stack([in_any_place(leaf != one).cpu() for one, leaf in pairs]).any(0)
        if bool(apart.any()):
            at = int(apart.nonzero()[0])
            both = [
                torch.cat([one[:1], leaf[at : at + 1]]) if has_samples(one) else one
                for one, leaf in zip(first, leaves, strict=True)
            ]
            args, kwargs = pytree.tree_unflatten(both, spec)
            return Call(calls[0].label, args, kwargs)
    return None


def _samples_at_a_time(captured: Capture) -> int:
    largest, batch = 1, 1
    for node in captured.program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.op != "get_attr":
            numbers = [example_size(size) for size in value.shape]
            largest = max(largest, math.prod(numbers))
            if node.op == "placeholder" and numbers:
                batch = max(batch, numbers[0])
    return max(1, min(_MOST_SAMPLES, _LARGEST * batch // largest))
