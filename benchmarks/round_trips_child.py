"""The process of benchmarks.round_trips that loads a saved result.

python -m benchmarks.round_trips_child model.safetensors told.pt
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def weights_of(module: nn.Module) -> dict[str, str]:
    """Name -> a checksum of the parameter's or buffer's bytes, strides and dtype."""
    found = {}
    for name, tensor in module.state_dict().items():
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        found[name] = hashlib.sha256(memoryview(data)).hexdigest() + f" {tensor.dtype} {tensor.stride()}"
    return found


def refusals(module: nn.Module, call: Mapping[str, Any]) -> list[str]:
    """What calls of other sizes and dtypes are told; "" for one that is taken."""
    others = []
    for change in (_wider, _of_another_dtype, lambda tensor: tensor[..., None]):
        others.append({name: change(value) if isinstance(value, Tensor) else value for name, value in call.items()})
    told = []
    for other in (*others, {}):
        try:
            module(**other)
            told.append("")
        except ValueError as error:
            told.append(str(error))
    return told


def _wider(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[..., :1]], -1)


def _of_another_dtype(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.to(torch.int16)


def main() -> int:
    """Loads, compares and prints a line of JSON."""
    import fxprune
    from fxprune.kernels.native import status

    path, told = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
    status()
    # The peak counts anew from here.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    start = time.perf_counter()
    result = fxprune.load(path, progress=False)
    first = time.perf_counter() - start
    memory = _peak() - before
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        fxprune.load(path, progress=False)
        seconds.append(time.perf_counter() - start)
    with torch.no_grad():
        outputs = pytree.tree_leaves(result(**told["call"]))
    error = max(_error(a, b) for a, b in zip(outputs, told["outputs"], strict=True))
    others = {
        "weights": weights_of(result) != told["weights"],
        "report": str(result.report) != told["report"],
        "refusals": refusals(result, told["call"]) != told["refusals"],
    }
    wrong = [name for name, is_other in others.items() if is_other]
    row = {"error": error, "same": not wrong, "others": wrong, "seconds": median(seconds), "first": first}
    print(json.dumps({**row, "memory": memory}))
    return 0


def _peak() -> int:
    """Bytes that lay in memory at most since the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _error(got: Any, wanted: Any) -> float:
    if not isinstance(wanted, Tensor):
        return 0.0 if got == wanted else float("inf")
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


if __name__ == "__main__":
    raise SystemExit(main())
