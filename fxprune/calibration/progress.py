"""progress: what a calibration has solved, in a file, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fxprune.select.selection import Fit

from .batches import Batch
from .checkpoint import Checkpoint
from .fit import Outcome


class Saved:
    """Outcomes by weight, kept in memory and, with a file, on disk after every stage."""

    def __init__(self, file: str | Path | None, about: str, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` are the model's by name: what is read from the file goes to where they are."""
        self._file = Checkpoint(file, "calibration", about)
        held = self._file.read()
        self.outcomes = {
            name: Outcome(
                {n: value.to(tensors[n].device) for n, value in entry["values"].items()},
                entry["keep"],
                Fit(**entry["fit"]),
                entry["units"],
                entry["staying"],
            )
            for name, entry in (held or {"outcomes": {}})["outcomes"].items()
        }

    def add(self, found: Mapping[str, Outcome]) -> None:
        """Adds a stage's outcomes and writes the file."""
        self.outcomes.update(found)
        outcomes = {
            name: {"values": o.values, "keep": o.keep, "fit": vars(o.fit), "units": o.units, "staying": o.staying}
            for name, o in self.outcomes.items()
        }
        self._file.write(outcomes=outcomes)


def about(tensors: Mapping[str, Tensor], batches: Sequence[Batch], *words: str) -> str:
    """A digest of tensors, data and words."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(word.encode() + b"\0")
    for name, tensor in tensors.items():
        digest.update(name.encode())
        _add(digest, tensor)
    for batch in batches:
        for leaf in batch.flat:
            if isinstance(leaf, Tensor):
                _add(digest, leaf)
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _add(digest: hashlib._Hash, tensor: Tensor) -> None:
    digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
