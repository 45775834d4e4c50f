"""Removal: what a structured selection takes away, as the oracle needs it: zeros, and statistics over what is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .axis import Axis, atoms
from .coupling import Coupling, Ruled
from .indices import kept_indices
from .rules import STATISTICS, Dims, Resize, packet_name

Cuts = list[tuple[int, Tensor]]


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A norm over an axis that shrinks: it runs over what is kept, and what is removed is zero afterwards.

    `cuts` are the indices that stay, by argument; `literals` the arguments that are sizes; `out` those of the output.
    """

    cuts: dict[str, Cuts]
    literals: dict[str, Any]
    out: Cuts

    def run(self, node: Node, arguments: dict[str, Any]) -> Tensor:
        """The op over the kept indices, put back into zeros of the whole shape."""
        assert isinstance(node.target, torch._ops.OpOverload)
        shape = arguments["input"].shape
        for name, cuts in self.cuts.items():
            if arguments.get(name) is None:
                continue
            for dim, indices in cuts:
                arguments[name] = arguments[name].index_select(dim, indices.to(arguments[name].device))
        result = node.target(**{**arguments, **self.literals})
        for dim, indices in self.out:
            whole = list(result.shape)
            whole[dim] = shape[dim]
            result = result.new_zeros(whole).index_copy(dim, indices.to(result.device), result)
        return result


@dataclasses.dataclass(frozen=True)
class Removal:
    """What leaves: tensor -> [(dim, indices that stay)], and node -> how its statistic runs over what is kept."""

    kept: Mapping[str, Cuts] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, Statistic] = dataclasses.field(default_factory=dict)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with +0.0 at the indices that leave; integers and masks, which are no factors, as they are."""
        if not tensor.is_floating_point():
            return tensor
        for dim, removed in self.removed(name, tensor):
            tensor = tensor.index_fill(dim, removed.to(tensor.device), 0.0)
        return tensor

    def removed(self, name: str, tensor: Tensor) -> Cuts:
        """[(dim, indices that leave)] of one tensor."""
        result = []
        for dim, kept in self.kept.get(name, []):
            leaves = torch.ones(tensor.shape[dim], dtype=torch.bool)
            leaves[kept] = False
            result.append((dim, leaves.nonzero().flatten()))
        return result


def removal(coupling: Coupling, keep: Mapping[str, Tensor]) -> Removal:
    """What the groups' kept indices come to."""
    by_atom = coupling.atoms_of(keep)
    statistics = {
        node.name: _statistic(call, by_atom)
        for node, call in coupling.ruled.items()
        if packet_name(node.target) in STATISTICS and _changes(call, by_atom)
    }
    return Removal(coupling.kept(keep), statistics)


def _changes(call: Ruled, by_atom: Mapping[Axis, Tensor]) -> bool:
    assert isinstance(call.out, Dims)
    return any(atom.mixed and atom in by_atom for axis in call.out.axes for atom in atoms(axis))


def _statistic(call: Ruled, by_atom: Mapping[Axis, Tensor]) -> Statistic:
    assert isinstance(call.out, Dims)
    cuts = {name: _cuts(dims, by_atom) for name, dims in call.arguments.items() if isinstance(dims, Dims)}
    sizes = Resize(by_atom, lambda *_: None)  # pyright: ignore[reportArgumentType]
    literals = call.rule.resize(sizes, call.out, **call.arguments) if call.rule.resize else {}
    return Statistic(cuts, literals, _cuts(call.out, by_atom))


def _cuts(dims: Dims, by_atom: Mapping[Axis, Tensor]) -> Cuts:
    return [
        (dim, kept_indices(axis, by_atom))
        for dim, axis in enumerate(dims.axes)
        if any(atom in by_atom for atom in atoms(axis))
    ]
