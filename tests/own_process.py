"""Memory as a process that does nothing else sees it."""

from __future__ import annotations

import os
import subprocess
import sys


def printed(script: str, *arguments: str) -> str:
    """The last line that `script` prints, run by a process of its own in which a peak is what lived at a time.

    Where glibc takes large blocks from its heap, what was freed there stays, in pieces that fit the next block or do
    not, by chance. Here blocks of 64 KiB and more are mapped one by one, and go back to the system at once.
    """
    command = [sys.executable, "-c", script, *arguments]
    mapped = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=mapped, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]
