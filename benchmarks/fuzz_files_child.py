"""The process of benchmarks.fuzz_files that loads changed files and calls what comes of them.

    python -m benchmarks.fuzz_files_child FOLDER

FOLDER has the originals with a call and its answer beside each. It reads seeds, one a line, and answers with JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

MEMORY = 12 << 30


def main() -> int:
    """Answers seeds until there are no more."""
    folder = Path(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    originals = sorted(folder.glob("*.safetensors"))
    calls = {path: torch.load(path.with_suffix(".pt")) for path in originals}

    def say(**told: Any) -> None:
        out.write(json.dumps(told) + "\n")

    say(at="start")
    for line in sys.stdin:
        seed = int(line)
        original = originals[seed % len(originals)]
        target = folder / f"changed-{os.getpid()}.bin"
        row = {"seed": seed, "file": original.stem}
        row |= one(original, target, seed, calls[original], lambda at: say(at=at))
        say(row=row)
    return 0


def one(original: Path, target: Path, seed: int, call: dict[str, Any], at: Any) -> dict[str, str]:
    """What became of one change. Faults are "wrong answer", "wrong error", and what ends the process."""
    import torch
    from torch.utils import _pytree as pytree

    import fxprune
    from benchmarks.fuzz_files_change import changed
    from fxprune.errors import FileError
    from fxprune.select.selection import Selection

    at("changing")
    kind, is_told = changed(original, target, seed)
    at("loading")
    try:
        result = fxprune.load(target, progress=False)
    except FileError as error:
        return {"change": kind, "outcome": "refused", "why": str(error)[:300]}
    # Whatever else comes out is a fault.
    except Exception as error:
        return {"change": kind, "outcome": "wrong error", "why": f"{type(error).__name__}: {str(error)[:300]}"}
    if isinstance(result, Selection):
        same = _same(result, fxprune.load(original, progress=False))
        return {"change": kind, "outcome": _outcome(same, is_told), "why": ""}
    at("calling")
    try:
        str(result.report)
        with torch.no_grad():
            got = result(*call["inputs"])
    # A changed graph may compute anything, or fail in any op of it.
    except Exception as error:
        outcome = "wrong error" if is_told else "refused at the call"
        return {"change": kind, "outcome": outcome, "why": f"{type(error).__name__}: {str(error)[:300]}"}
    leaves, wanted = pytree.tree_leaves(got), call["outputs"]
    same = len(leaves) == len(wanted) and all(
        isinstance(a, torch.Tensor) and torch.equal(a, b) for a, b in zip(leaves, wanted)
    )
    return {"change": kind, "outcome": _outcome(same, is_told), "why": ""}


def _same(a: Any, b: Any) -> bool:
    """Whether two selections say the same."""
    import torch

    from fxprune.files.plain import Writer
    from fxprune.files.trees import tree_data

    ours, theirs = Writer(tree_data), Writer(tree_data)
    if ours.encode(a, "") != theirs.encode(b, "") or ours.tensors.keys() != theirs.tensors.keys():
        return False
    return all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())


def _outcome(same: bool, is_told: bool) -> str:
    if same:
        return "loaded, same answer"
    return "wrong answer" if is_told else "loaded, another answer"


if __name__ == "__main__":
    raise SystemExit(main())
