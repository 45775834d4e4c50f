"""zero_slices: where weights have slices without anything, which is where channels die."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fxprune.couple.rules import packet_name
from fxprune.graph.program import Program, arguments
from fxprune.select.selection import Selection

from .known_ops import NORMS


def may_be_dead(program: Program, selection: Selection) -> bool:
    """Whether some weight has a slice without anything, or some norm a scale of zero: where a search can start."""
    tables, scales = weights_of(program, {"embedding"}), weights_of(program, NORMS)
    for name, weight in program.named_parameters():
        if not weight.is_floating_point() or weight.dtype.itemsize == 1 or weight.is_meta:
            continue  # torch compares no 8-bit floats
        if weight.dim() == 1 and name in scales and not bool(weight.detach().all()):
            return True
        mask = selection.mask.get(name)
        kept = weight.detach() != 0 if mask is None else mask.unpack()
        if weight.dim() > 1 and not bool(kept.all()):
            # The row that pads an embedding is zero, and is read all the same.
            found = {dim: zero for dim, zero in zero_slices(kept).items() if dim or name not in tables}
            if any(bool(zero.any()) for zero in found.values()):
                return True
    return False


def weights_of(program: Program, ops: Collection[str]) -> set[str]:
    """The names of the parameters that some ops read as their weight."""
    found = set()
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and packet_name(node.target) in ops:
            weight = arguments(node).get("weight")
            if isinstance(weight, torch.fx.Node) and weight.op == "get_attr":
                found.add(str(weight.target))
    return found


def zero_slices(weight: Tensor) -> dict[int, Tensor]:
    """bool [size] for each of the first two dimensions: where the weight is zero throughout."""
    if weight.dim() < 2:
        return {}
    nonzero = weight != 0
    return {dim: ~nonzero.movedim(dim, 0).flatten(1).any(1).cpu() for dim in (0, 1) if weight.shape[dim] > 1}
