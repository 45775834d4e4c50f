"""recurrent: units of recurrent layers that stay zero, and what sums over them.

A unit whose rows and biases are zero in every gate, and whose state begins at zero, is zero after every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.couple.axis import Axis
from fxprune.couple.rules import packet_name

from .known import Known, State, size_of

# op -> gates
RECURRENT = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class Sum(NamedTuple):
    """A sum over `axis` [i] in a recurrent layer: which indices are read, and which are zero, both bool [i]."""

    axis: Axis
    reads: Tensor
    zero: Tensor


def follow_units(node: Node, states: Mapping[str, Any]) -> State:
    """The outputs of a recurrent layer: units that stay zero are known."""
    silent = _silent(node, states)
    if silent is None or not any(bool(units.any()) for units in silent):
        return None
    directions = _directions(states)
    flags = [torch.cat(silent[-directions:]), *[torch.stack(silent).unsqueeze(1)] * (len(node.meta["val"]) - 1)]
    found: list[Known | None] = []
    for value, sure in zip(node.meta["val"], flags, strict=True):
        shape = [size_of(size) for size in value.shape]
        found.append(Known(torch.zeros(shape, device=value.device), sure.expand(shape)))
    return found


def sums_of_units(
    node: Node, given: Mapping[str, Any], states: Mapping[str, Any], zero_along: Callable[[Any, int, Any], Tensor]
) -> list[Sum] | None:
    """The sums of a recurrent layer over its inputs and its own units; None where they are not followed."""
    silent = _silent(node, states)
    if silent is None:
        return None
    directions, found = _directions(states), []
    dims = _cells(given["params"], len(silent))
    for place, (known, axes) in enumerate(zip(_cells(states["params"], len(silent)), dims, strict=True)):
        layer = place // directions
        below = torch.cat(silent[(layer - 1) * directions : layer * directions]) if layer else None
        comes_in = zero_along(states["input"], -1, given["input"]) if below is None else below
        found.append(Sum(axes[0][1], ~known[0].zero.all(0), comes_in))
        found.append(Sum(axes[1][1], ~known[1].zero.all(0), silent[place]))
    return [Sum(axis, reads.cpu(), zero.cpu()) for axis, reads, zero in found]


def _silent(node: Node, states: Mapping[str, Any]) -> list[Tensor] | None:
    """bool [unit] for each cell: the units that stay zero; None for layers that are not followed."""
    op, params = packet_name(node.target), states.get("params")
    begins = states.get("hx")
    if op not in RECURRENT or not isinstance(params, list) or (states.get("train") and states.get("dropout")):
        return None
    if not all(isinstance(p, Known) and p.is_whole for p in params) or not isinstance(states["num_layers"], int):
        return None
    count = states["num_layers"] * _directions(states)
    each = _cells(params, count)
    if len(each[0]) > (4 if states["has_biases"] else 2):
        return None  # projections
    found = []
    for place, cell in enumerate(each):
        gates = RECURRENT[op]
        rows = [p.zero.reshape(gates, p.zero.shape[0] // gates, -1).all(2).all(0) for p in cell]
        zero = torch.stack(rows).all(0)
        for state in begins if isinstance(begins, list) else [begins]:
            zero = zero & (state.zero[place].all(0) if isinstance(state, Known) else torch.zeros_like(zero))
        found.append(zero)
    return found


def _cells(params: list[Any], count: int) -> list[list[Any]]:
    each = len(params) // count
    return [params[i : i + each] for i in range(0, len(params), each)]


def _directions(states: Mapping[str, Any]) -> int:
    return 2 if states["bidirectional"] else 1
