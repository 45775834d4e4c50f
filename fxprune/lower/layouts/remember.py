"""remember: choices that were measured on a GPU, kept in the user's cache for the next process.

One file for each device and each set of versions and kernels, so that another GPU or an update measures anew. Deleting
it does as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import warn_once
from fxprune.kernels.native.cache import cached
from fxprune.kernels.triton import language
from fxprune.measure import timing

from .site import Choice


class Choices:
    """Choices by key, and the file that they are kept in."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def get(self, key: str) -> dict[str, Any] | None:
        """The fields of the choice kept for `key`; None where there is none that can be read."""
        found = self._read().get(key)
        return found if isinstance(found, dict) else None

    def put(self, key: str, choice: Choice) -> None:
        """Keeps a choice. Where the file cannot be written nothing is kept: the next process measures again."""
        kept = {**self._read(), key: dataclasses.asdict(choice)}
        temporary = None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Written beside its final name and moved there in one step: others see all of it or nothing.
            handle, temporary = tempfile.mkstemp(suffix=".json", prefix="writing-", dir=self.file.parent)
            with os.fdopen(handle, "w") as file:
                json.dump(kept, file, indent=1)
            os.replace(temporary, self.file)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            warn_once(
                f"fxprune cannot keep what it measured ({error}): every process measures again. Set FXPRUNE_CACHE_DIR "
                "to a writable folder."
            )

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


@cache
def choices_of(device: torch.device) -> Choices:
    """The memory of a GPU's choices."""
    digest = hashlib.sha256()
    triton = getattr(language.triton, "__version__", "")
    for part in (torch.cuda.get_device_name(device), torch.__version__, torch.version.cuda, triton):
        digest.update(str(part).encode() + b"\0")
    folders = (Path(language.__file__).parent, Path(__file__).parent)
    sources = [*(file for folder in folders for file in folder.glob("*.py")), Path(timing.__file__)]
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return Choices(cached(f"choices-{digest.hexdigest()[:24]}.json"))
