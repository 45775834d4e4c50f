"""progress: what a calibration has solved, in a file, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..fits import Fit
from .batches import Batch
from .checkpoint import Checkpoint
from .fit import Outcome


class Saved:
    """Outcomes by weight, kept in memory and, with a file, on disk after every stage."""

    def __init__(self, file: str | Path | None, about: str) -> None:
        self._file = Checkpoint(file, "calibration", about)
        held = self._file.read()
        self.outcomes = {
            name: Outcome(entry["values"], entry["keep"], Fit(**entry["fit"]), entry["units"])
            for name, entry in (held or {"outcomes": {}})["outcomes"].items()
        }

    def add(self, found: Mapping[str, Outcome]) -> None:
        """Adds a stage's outcomes and writes the file."""
        self.outcomes.update(found)
        outcomes = {
            name: {"values": o.values, "keep": o.keep, "fit": vars(o.fit), "units": o.units}
            for name, o in self.outcomes.items()
        }
        self._file.write(outcomes=outcomes)


def about(tensors: Mapping[str, Tensor], batches: Sequence[Batch], *words: str) -> str:
    """A digest of tensors, data and words."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(word.encode() + b"\0")
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{_sum(tensor)}".encode())
    for batch in batches:
        for leaf in batch.flat:
            text = f"{tuple(leaf.shape)}{leaf.dtype}{_sum(leaf)}" if isinstance(leaf, Tensor) else repr(leaf)
            digest.update(text.encode())
    return digest.hexdigest()


def _sum(tensor: Tensor) -> str:
    """A number that another tensor of this shape hardly has."""
    if not tensor.numel() or tensor.is_complex():
        return ""
    flat = tensor.detach().reshape(-1).double()
    weights = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device).sin_()
    return f"{float(flat.nan_to_num() @ weights)!r}"
