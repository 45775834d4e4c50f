"""checkpoint: how far a long run came, in a file, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import InputError

_FORMAT = 1


class Checkpoint:
    """A file that is whole at any time, or nothing where none was given.

    It says of what `kind` it is ("calibration") and what it is `about`, a digest of all that it depends on. Raises
    InputError where the file is about something else, is no such file, or cannot be where it is asked to be.
    """

    def __init__(self, file: str | Path | None, kind: str, about: str) -> None:
        if file is not None and not isinstance(file, (str, Path)):
            raise InputError(
                f"cannot use a {type(file).__name__} as a checkpoint",
                where=f"checkpoint={file!r}",
                why="it is no path of a file",
                do=f'Write checkpoint="{kind}.pt".',
            )
        self._kind = kind
        self._file, self._about = None if file is None else Path(file), about
        if self._file is not None and (self._file.is_dir() or not self._file.absolute().parent.is_dir()):
            why = "it is a folder" if self._file.is_dir() else "its folder does not exist"
            raise self._refuse(why, "Give the name of a file in a folder that exists.")

    def read(self) -> dict[str, Any] | None:
        """What was written last; None where nothing was."""
        if self._file is None or not self._file.exists():
            return None
        do = "Give another file, or delete this one to start anew."
        try:
            held: Any = torch.load(self._file, weights_only=True, map_location="cpu")
        except Exception as error:
            raise self._refuse(f"it cannot be read ({type(error).__name__})", do) from error
        if not isinstance(held, dict) or held.get(f"fxprune_{self._kind}") != _FORMAT:
            raise self._refuse(f"it holds no {self._kind}", do)
        if held.get("about") != self._about:
            raise self._refuse("it is of another model, of other data or other arguments", do)
        return held

    def write(self, **held: Any) -> None:
        """Puts this in place of what was written before."""
        if self._file is None:
            return
        beside = self._file.with_name(self._file.name + ".part")
        torch.save({f"fxprune_{self._kind}": _FORMAT, "about": self._about, **held}, beside)
        os.replace(beside, self._file)

    def _refuse(self, why: str, do: str) -> InputError:
        return InputError("cannot use a checkpoint", where=f"checkpoint={str(self._file)!r}", why=why, do=do)
