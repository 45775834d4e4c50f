"""written: a file that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxprune.errors import FileError


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to, of the same name, in a hidden folder beside `path`, and moves the file from there.

    What else the body writes into that folder moves first, and lies beside `path` then. Where the body raises, the file
    that was at `path` stays as it was. Raises FileError for a folder, and for a place that cannot be written to.
    """
    # Through a link its target is written, as open() does it.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise FileError(f'cannot write to "{path}"', why="it is a folder", do="Name a file in it.")
    if not target.parent.is_dir():
        why = f"there is no folder {target.parent}"
        raise FileError(f'cannot write to "{path}"', why=why, do="Make it first, or name another.")
    folder: str | None = None
    try:
        # A move within one file system is one step: others see the old file or the new one.
        folder = tempfile.mkdtemp(prefix=".writing-", dir=target.parent)
        temporary = Path(folder) / target.name
        yield temporary
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        for other in sorted({*Path(folder).iterdir()} - {temporary}):
            os.replace(other, target.parent / other.name)
        os.replace(temporary, target)
    except OSError as error:
        why = error.strerror or str(error)
        raise FileError(f'cannot write to "{path}"', why=why, do="Name a place that can be written to.") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
