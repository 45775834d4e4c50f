"""remember: choices that were measured, kept in the user's cache for the next process.

One file for each device and each set of versions and kernels, so that another CPU or GPU or an update measures anew.
Deleting it does as well, and FXPRUNE_REMEMBER=0 neither reads nor writes it. What was measured on a CPU while others
wanted its cores is not kept (`interleave_steady`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import warn_once
from fxprune.graph.environment import cores, variable
from fxprune.kernels import native
from fxprune.kernels.native import build
from fxprune.kernels.native.cache import cached
from fxprune.kernels.triton import language
from fxprune.measure import timing


class Choices:
    """What was chosen by key, and the file that it is kept in."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def get(self, key: str) -> dict[str, Any] | None:
        """The fields of the choice kept for `key`; None where there is none that can be read."""
        found = self._read().get(key)
        return found if isinstance(found, dict) else None

    def put(self, key: str, choice: Mapping[str, Any]) -> None:
        """Keeps a choice. Where the file cannot be written nothing is kept: the next process measures again."""
        kept = {**self._read(), key: dict(choice)}
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


def choices_of(device: torch.device) -> Choices | None:
    """The memory of a device's choices; None where none is kept."""
    return None if variable("FXPRUNE_REMEMBER") == "0" or device.type not in ("cpu", "cuda") else _choices_of(device)


@cache
def _choices_of(device: torch.device) -> Choices:
    digest = hashlib.sha256()
    layouts = Path(__file__).parent
    if device.type == "cuda":
        triton = getattr(language.triton, "__version__", "")
        parts = (torch.cuda.get_device_name(device), torch.__version__, torch.version.cuda, triton)
        folders = (Path(language.__file__).parent, layouts)
    else:
        # The object of the C++ kernels is called by its sources, its compiler, and what the processor has.
        parts = (build.cpu(), cores(), torch.__version__, native.status().detail, native.status().object)
        folders = (Path(native.__file__).parent, layouts.parent)
    for part in parts:
        digest.update(str(part).encode() + b"\0")
    sources = [*(file for folder in folders for file in folder.rglob("*.py")), Path(timing.__file__)]
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return Choices(cached(f"choices-{digest.hexdigest()[:24]}.json"))
