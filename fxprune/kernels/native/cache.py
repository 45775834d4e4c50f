"""cache: where compiled kernels and measured choices are kept between processes."""

from __future__ import annotations

import os
import stat
import tempfile
from functools import cache
from pathlib import Path

from fxprune.errors import warn_once
from fxprune.graph.environment import variable


def cache_dir() -> Path:
    """FXPRUNE_CACHE_DIR, else fxprune/ in the user's cache directory. RuntimeError where the user has no home."""
    chosen = variable("FXPRUNE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxprune"


def cached(name: str) -> Path:
    """The path of a file of the cache, which is there or can be written.

    Where the cache cannot be written it is in a temporary folder of the user's own, and a warning says so. Raises
    OSError where there is none of these either.
    """
    try:
        folder = cache_dir()
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Modes do not tell: not of a full disk, nor to root.
            with tempfile.TemporaryFile(dir=folder):
                pass
    except (OSError, RuntimeError) as error:
        folder = _temporary()
        warn_once(
            f"fxprune cannot write to its cache ({error}): compiled kernels and measured choices are kept in {folder}, "
            "and made anew once that is gone. Set FXPRUNE_CACHE_DIR to a writable folder."
        )
    return folder / name


@cache
def _temporary() -> Path:
    """A folder that others can neither read nor write: what is loaded from it runs as the user."""
    folder = Path(tempfile.gettempdir()) / f"fxprune-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            return Path(tempfile.mkdtemp(prefix="fxprune-"))
    return folder
