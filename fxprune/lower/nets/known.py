"""known: what a net gains, measured once for regions alike and kept for the next process."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from fxprune.graph.program import Program, fetch
from fxprune.kernels.native.net import decode, encode

from ..layouts.remember import choices_of
from .gain import measure_gain, sizes_of
from .regions import Region


def gain_of(program: Program, region: Region, operands: Sequence[Any]) -> float:
    """How many times faster a net is than its region's ops; measured where no process has measured one alike."""
    memory, key = choices_of(torch.device("cpu")), _likeness(program, region, operands[-1])
    known = None if memory is None else (memory.get(key) or {}).get("gain")
    if isinstance(known, float) and math.isfinite(known):
        return known
    gain, steady = measure_gain(program, region, operands)
    if memory is not None and steady:
        memory.put(key, {"gain": gain})
    return gain


def _likeness(program: Program, region: Region, net: Sequence[int]) -> str:
    """What regions alike agree on: threads, sizes, ops, the net's steps, and weights by shape and zeros (to 2%)."""
    weights = [fetch(program, str(part.weight.target)) for part in region.parts.values() if part.weight is not None]
    parts = (
        torch.get_num_threads(),
        [sizes_of(node) for node in region.inputs],
        [(str(node.target), sizes_of(node)) for node in region.parts],
        [(*weight.shape, round(50 * int(torch.count_nonzero(weight)) / max(1, weight.numel()))) for weight in weights],
        encode([_without_places(step) for step in decode(net)]),
    )
    return f"net {hashlib.sha256(repr(parts).encode()).hexdigest()}"


def _without_places(step: Any) -> Any:
    """The step without how many nonzeros its weight has, and how many there are before it."""
    names = [field.name for field in dataclasses.fields(step)]
    places = [name for name in names if name.startswith("first_") or name == "values"]
    return dataclasses.replace(step, **dict.fromkeys(places, 0))
