"""Which indices of an axis stay when its atoms lose some."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .axis import Axis, Size, atoms, whole_size


def kept_indices(axis: Axis, keep: Mapping[Axis, Tensor]) -> Tensor:
    """Indices of an axis that stay (int64, ascending) when the atoms in `keep` keep theirs, all others everything."""
    axis = axis.root()
    if axis.kind is None:
        kept = keep.get(axis)
        return torch.arange(axis.size.number, device="cpu") if kept is None else kept
    parts = [(part.root().size.number, kept_indices(part, keep)) for part in axis.parts]
    if axis.kind == "concat":
        offset, found = 0, []
        for size, kept in parts:
            found.append(kept + offset)
            offset += size
        return torch.cat(found)
    result = parts[0][1]
    for size, kept in parts[1:]:
        result = (result[:, None] * size + kept).flatten()
    return result


def shrunk_size(axis: Axis, keep: Mapping[Axis, Tensor]) -> Size:
    """The size of an axis when the atoms in `keep` keep those indices only."""
    axis = axis.root()
    if axis.kind is None:
        kept = keep.get(axis)
        return axis.size if kept is None else Size(len(kept))
    sizes = [shrunk_size(part, keep) for part in axis.parts]
    return Size(sum(size.number for size in sizes)) if axis.kind == "concat" else whole_size(sizes)


def positions(axis: Axis, atom: Axis) -> Tensor:
    """For each index of an axis, which index of `atom` it belongs to, or -1: int64 [size].

    Where the atom `is_twice` in the axis, the larger of the two.
    """
    axis = axis.root()
    if axis is atom:
        return torch.arange(axis.size.number, device="cpu")
    if axis.kind is None:
        return torch.full((axis.size.number,), -1, device="cpu")
    parts = [positions(part, atom) for part in axis.parts]
    if axis.kind == "concat":
        return torch.cat(parts)
    result = parts[0]
    for part in parts[1:]:
        result = torch.maximum(result[:, None], part).flatten()
    return result


def is_twice(axis: Axis, atom: Axis) -> bool:
    """Whether an axis has an atom as two of its factors, so that its indices belong to two of the atom's."""
    axis = axis.root()
    if axis.kind == "product" and sum(atom in atoms(part) for part in axis.parts) > 1:
        return True
    return any(is_twice(part, atom) for part in axis.parts)
