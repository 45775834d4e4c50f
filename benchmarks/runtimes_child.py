"""The process of benchmarks.runtimes that runs one runtime on the two files of a model.

python -m benchmarks.runtimes_child RUNTIME THREADS FOLDER
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.measure.timing import interleave

Call = Callable[[], list[Any]]
SECONDS = 6.0


def torch_compile(file: Path, inputs: tuple[Tensor, ...], threads: int) -> Call:
    """fxprune.load, which compiles at the first call."""
    result = importlib.import_module("fxprune").load(file.with_suffix(".safetensors"), progress=False)
    return lambda: pytree.tree_leaves(result(*inputs))


def aotinductor(file: Path, inputs: tuple[Tensor, ...], threads: int) -> Call:
    """A package of AOTInductor."""
    package = torch._inductor.aoti_load_package(f"{file}.aoti.pt2")
    return lambda: pytree.tree_leaves(package(*inputs))


def onnxruntime(file: Path, inputs: tuple[Tensor, ...], threads: int) -> Call:
    """onnxruntime's CPU provider."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(f"{file}.onnx", options, providers=["CPUExecutionProvider"])
    feeds = dict(zip((given.name for given in session.get_inputs()), (x.numpy() for x in inputs)))
    return lambda: session.run(None, feeds)


def openvino(file: Path, inputs: tuple[Tensor, ...], threads: int) -> Call:
    """OpenVINO's CPU plugin, for the least latency."""
    ov = importlib.import_module("openvino")
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(f"{file}.onnx", "CPU", hints).create_infer_request()
    arrays = [x.numpy() for x in inputs]
    return lambda: list(request.infer(arrays).values())


RUNTIMES = {
    "torch.compile": torch_compile,
    "AOTInductor": aotinductor,
    "onnxruntime": onnxruntime,
    "OpenVINO": openvino,
}


def main() -> int:
    """Loads, compares, times, and prints a line of JSON."""
    runtime, threads, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(threads)
    answers = torch.load(folder / "answers.pt", weights_only=True)
    inputs, calls, load, errors = answers["inputs"], [], [], []
    with torch.no_grad():
        for side in ("dense", "half"):
            start = time.perf_counter()
            call = RUNTIMES[runtime](folder / side, inputs, threads)
            got = [torch.from_numpy(np.array(value)) if not isinstance(value, Tensor) else value for value in call()]
            load.append(time.perf_counter() - start)
            errors.append(max(map(_error, got, answers[side])))
            calls.append(call)
        dense, half = interleave(calls, seconds=SECONDS)
    ratio = median(a / b for a, b in zip(dense.warm, half.warm))
    row = {"seconds": [median(dense.warm), median(half.warm)], "ratio": ratio, "errors": errors, "load": load}
    print(json.dumps(row))
    return 0


def _error(got: Tensor, wanted: Tensor) -> float:
    if not bool(wanted.abs().max() > 0):
        raise ValueError("the model answers zeros, so that nothing is compared")
    return float((got - wanted).abs().max() / wanted.abs().max())


if __name__ == "__main__":
    raise SystemExit(main())
