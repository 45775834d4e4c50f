"""progress: what a calibration has solved, in a file, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..fits import Fit
from .batches import Batch
from .fit import Outcome

_FORMAT = 1


class Saved:
    """Outcomes by weight, kept in memory and, with a file, on disk after every stage.

    The file says what it is about: the model's tensors, the plan, the data and the method. Raises InputError where it
    is about something else, or is no such file.
    """

    def __init__(self, file: str | Path | None, about: str) -> None:
        self.outcomes: dict[str, Outcome] = {}
        if file is not None and not isinstance(file, (str, Path)):
            raise InputError(
                f"cannot use a {type(file).__name__} as a checkpoint",
                where=f"checkpoint={file!r}",
                why="it is no path of a file",
                do='Write checkpoint="calibration.pt".',
            )
        self._file, self._about = None if file is None else Path(file), about
        if self._file is not None and not self._file.parent.is_dir():
            raise InputError(
                "cannot write a checkpoint",
                where=f"checkpoint={str(file)!r}",
                why=f"there is no folder {str(self._file.parent)!r}",
                do="Make it, or give a file in another folder.",
            )
        if self._file is not None and self._file.exists():
            self._read(self._file)

    def _read(self, file: Path) -> None:
        where = f"checkpoint={str(file)!r}"
        do = "Give another file, or delete this one to start anew."
        try:
            held: Any = torch.load(file, weights_only=True)
        except Exception as error:
            why = f"it cannot be read ({type(error).__name__})"
            raise InputError("cannot go on from a checkpoint", where=where, why=why, do=do) from error
        if not isinstance(held, dict) or held.get("fxprune_calibration") != _FORMAT:
            raise InputError("cannot go on from a checkpoint", where=where, why="it is no calibration", do=do)
        if held.get("about") != self._about:
            why = "it is of another model, plan, method or of other data"
            raise InputError("cannot go on from a checkpoint", where=where, why=why, do=do)
        for name, entry in held["outcomes"].items():
            self.outcomes[name] = Outcome(entry["values"], entry["keep"], Fit(**entry["fit"]), entry["units"])

    def add(self, found: Mapping[str, Outcome]) -> None:
        """Adds a stage's outcomes and writes the file, which is whole at any time."""
        self.outcomes.update(found)
        if self._file is None:
            return
        outcomes = {
            name: {"values": o.values, "keep": o.keep, "fit": vars(o.fit), "units": o.units}
            for name, o in self.outcomes.items()
        }
        beside = self._file.with_name(self._file.name + ".part")
        torch.save({"fxprune_calibration": _FORMAT, "about": self._about, "outcomes": outcomes}, beside)
        os.replace(beside, self._file)


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
