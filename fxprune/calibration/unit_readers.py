"""unit_readers: the weights that sum over the units of a group, and what the units are worth to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxprune.couple.coupling import Coupling
from fxprune.couple.indices import positions
from fxprune.graph.program import Program
from fxprune.graph.weights import Use
from fxprune.plan.matrix import to_matrix

from .layer import is_weight
from .measure_inputs import Watched
from .unfold import windows_of_use

# group -> weight -> the unit at each of its inputs, int64 [shape[inputs]], -1 for none
Readers = Mapping[str, Mapping[str, Tensor]]


def read_one_way(program: Program, name: str, places: Sequence[Use]) -> bool:
    """Whether a weight is read by linears or by convolutions alone, and always the same way round."""
    if not all(is_weight(program, name, use) for use in places):
        return False
    if len({(use.kind, use.transposed) for use in places}) != 1 or places[0].kind not in ("linear", "conv"):
        return False
    if places[0].kind == "linear":
        return True
    windows = [windows_of_use(program, name, use) for use in places]
    return None not in windows and len({w.groups for w in windows if w is not None}) == 1


def find_readers(
    program: Program, coupling: Coupling, groups: Sequence[str], places: Mapping[str, Sequence[Use]]
) -> Readers:
    """The readers of each of these groups; grouped convolutions, which mix few channels each, are none."""
    summing: dict[str, int] = {}
    for name, used in places.items():
        if read_one_way(program, name, used) and (used[0].kind == "linear" or _groups(program, name, used[0]) == 1):
            summing[name] = used[0].inputs
    found: dict[str, dict[str, Tensor]] = {}
    for group in groups:
        found[group] = {
            member.name: positions(coupling.tensors[member.name][member.dim], coupling[group].axis)
            for member in coupling[group].members
            if summing.get(member.name) == member.dim
        }
    return found


def _groups(program: Program, name: str, use: Use) -> int:
    windows = windows_of_use(program, name, use)
    return 0 if windows is None else windows.groups


def unit_energy(
    readers: Mapping[str, Tensor], weights: Mapping[str, Tensor], seen: Mapping[str, Watched], dims: Mapping[str, int]
) -> Tensor | None:
    """What the units of a group give to the outputs of its readers, as shares of these: float64 [units].

    None where no reader received any input.
    """
    total: Tensor | None = None
    for name, index in readers.items():
        watched = seen.get(name)
        if watched is None or not watched.count:
            continue
        matrix = to_matrix(weights[name].detach(), dims[name]).double()
        by_column = matrix.square().sum(0) * watched.norms.reshape(-1).square()
        by_input = by_column.reshape(-1, len(index)).sum(0)
        mine = index >= 0
        energy = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device=by_input.device)
        energy.index_add_(0, index[mine].to(by_input.device), by_input[mine])
        whole = float(by_input.sum())
        if whole > 0:
            total = energy / whole if total is None else total + energy / whole
    return None if total is None else total.cpu()
