"""One model of the zoo, in a process of its own: pruned, and written back to its own class.

    python -m benchmarks.write_back_child LABEL FILE

Writes one row of JSON to FILE. Its own class's outputs are held here against the result's, on two calls.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

import fxprune
from benchmarks.zoo_child import AMOUNT, FAR, TOLERANCE, count, difference, outputs
from benchmarks.zoo_models import named
from benchmarks.zoo_randomise import randomise
from fxprune.errors import FxPruneError


def run(label: str) -> dict[str, Any]:
    """The row of one model: "ok", "wrong", "refused" by write_back with why, or "not taken" by transform."""
    torch.manual_seed(0)
    listed = named(label)
    model, calls = listed.build(), [listed.inputs(), listed.inputs()]
    randomise(model, seed=0)
    dense = [outputs(model, call) for call in calls]
    plan = fxprune.Plan([fxprune.Rule("*", fxprune.Channels(AMOUNT))])
    quick = {"compile": False, "measure": False}
    try:
        result = fxprune.transform(model, plan, *calls[0], options=quick, progress=False)
    except FxPruneError as error:
        return {"verdict": "not taken", "error": str(error)[:300]}
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            own = fxprune.write_back(model, result.selection, *calls[0], progress=False)
        except FxPruneError as error:
            return {"verdict": "refused", "error": str(error)[:500], "seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    wanted = [outputs(result, call) for call in calls]
    error = max(difference(outputs(own, call), want) for call, want in zip(calls, wanted))
    moved = max(difference(a, b) for a, b in zip(dense, wanted))
    # A result for inference has its norms folded into other layers.
    norms = [module for module in own.modules() if "Norm" in type(module).__name__]
    small = count(own) <= count(result) + sum(p.numel() for norm in norms for p in norm.parameters(recurse=False))
    right = error <= TOLERANCE and type(own) is type(model) and small
    return {
        "verdict": "ok" if right else "wrong",
        "difference": error,
        "parameters": [count(model), count(own), count(result)],
        "far": moved >= FAR,
        "seconds": seconds,
        "notes": [str(note.message)[:300] for note in told if issubclass(note.category, fxprune.FxPruneWarning)],
    }


def main() -> int:
    """Writes the row."""
    label, file = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    try:
        row = run(label)
    # Whatever else comes out is a fault, and a row.
    except Exception as error:
        row = {"verdict": "wrong error", "error": f"{type(error).__name__}: {error}\n{traceback.format_exc()[-2000:]}"}
    file.write_text(json.dumps({"label": label, **row}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
