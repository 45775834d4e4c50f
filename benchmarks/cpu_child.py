"""One runtime with one model, in a process of its own that takes turns with the others.

    python -m benchmarks.cpu_child RUNTIME MODEL SPARSITY THREADS FOLDER

Writes its output to FOLDER, says `ready` with what it has to tell of the row, and then, for each line on standard
input, calls the model for a moment and says the seconds of each call.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cpu_models import example, models, pruned
from benchmarks.cpu_work import outside, weighted, work_of
from fxprune.graph.environment import words_of

SECONDS = 0.25
FEWEST = 3
Call = Callable[[], Any]


def eager(model: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Call:
    """As the user wrote it; tells what a call has to do."""
    told["facts"]["work"] = work_of(model, inputs)
    return lambda: model(*inputs)


def channels_last(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Images, and what reads them, with the channels of a pixel side by side; others stay as they are."""
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model, inputs
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return model, tuple(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)


def compiled(model: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Call:
    """torch.compile with freezing, images in channels_last."""
    model, inputs = channels_last(model, inputs)
    fast = torch.compile(model, options={"freezing": True})
    return lambda: fast(*inputs)


def bfloat16(model: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Call:
    """The same in bfloat16."""
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    return compiled(model.bfloat16(), inputs, threads)


def sparse_csr(model: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Call:
    """Weights of linears as torch's sparse CSR, which MKL multiplies."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise RuntimeError("the model has no linear layer")
    for module in linears:
        module.weight = nn.Parameter(module.weight.detach().to_sparse_csr(), requires_grad=False)
    return lambda: model(*inputs)


def onnxruntime(model: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Call:
    """onnxruntime's CPU provider."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(onnx_file(model, inputs), options, providers=["CPUExecutionProvider"])
    feeds = dict(zip((given.name for given in session.get_inputs()), (x.numpy() for x in inputs)))
    return lambda: session.run(None, feeds)


def openvino(model: nn.Module, inputs: tuple[Tensor, ...], threads: int, precision: str = "f32") -> Call:
    """OpenVINO's CPU plugin, for the least latency."""
    ov = importlib.import_module("openvino")
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    fast = ov.Core().compile_model(onnx_file(model, inputs), "CPU", hints)
    request, arrays = fast.create_infer_request(), [x.numpy() for x in inputs]
    return lambda: list(request.infer(arrays).values())


def openvino_bf16(model: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Call:
    """The same in bfloat16."""
    return openvino(model, inputs, threads, "bf16")


def fxprune(model: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Call:
    """What transform makes of the zeros that are there; tells the bytes of what it stores, and where time goes."""
    package = importlib.import_module("fxprune")
    plan = package.Plan([package.Rule("*", package.Existing())])
    fast = package.transform(model, plan, inputs, progress=False)
    stored = {row.name: row.lowered.bytes for row in fast.report.weights}
    weights = {f"{name}.weight": module.weight for name, module in weighted(model).items()}
    size = sum(stored.get(name, weight.nbytes) for name, weight in weights.items())
    report = str(fast.report).splitlines()[:6]
    told["facts"] |= {"report": report, "bytes": size, "outside": outside(lambda: fast(*inputs))}
    return lambda: fast(*inputs)


def fxprune_bf16(model: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Call:
    """The same of the model in bfloat16."""
    package = importlib.import_module("fxprune")
    plan = package.Plan([package.Rule("*", package.Existing())])
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    fast = package.transform(model.bfloat16(), plan, inputs, progress=False)
    told["facts"]["report bf16"] = str(fast.report).splitlines()[:6]
    return lambda: fast(*inputs)


told: dict[str, Any] = {"facts": {}}
RUNTIMES: dict[str, Callable[[nn.Module, tuple[Tensor, ...], int], Call]] = {
    "eager": eager,
    "torch.compile": compiled,
    "onnxruntime": onnxruntime,
    "OpenVINO": openvino,
    "sparse CSR": sparse_csr,
    "torch bf16": bfloat16,
    "OpenVINO bf16": openvino_bf16,
    "fxprune": fxprune,
    "fxprune bf16": fxprune_bf16,
}


def onnx_file(model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """The model as a file, in the folder of this process."""
    file = told["folder"] / f"{told['runtime']}.onnx".replace(" ", "-")
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert program is not None
    program.save(str(file))
    if told["runtime"] == "onnxruntime":
        for number, x in enumerate(inputs):
            np.save(file.with_name(f"input-{number:02}.npy"), x.numpy())
        for_deepsparse(model, inputs, str(file.with_name("deepsparse.onnx")))
    return str(file)


def for_deepsparse(model: nn.Module, inputs: tuple[Tensor, ...], file: str) -> None:
    """The model in the newest set of operators that DeepSparse reads, which has no attention yet."""
    try:
        with mock.patch.object(functional, "scaled_dot_product_attention", attention):
            torch.onnx.export(model, inputs, file, dynamo=False, opset_version=13)
    except Exception as error:
        told["facts"]["no deepsparse"] = words_of(error)


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention step by step, for q [..., s, d]; where no mask is needed or one is given."""
    if is_causal or dropout_p or (attn_mask is not None and attn_mask.dtype == torch.bool):
        raise NotImplementedError("attention with a causal or boolean mask, or with dropout")
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.softmax(scores if attn_mask is None else scores + attn_mask, -1) @ v


def array(value: Any) -> np.ndarray:
    """The first output."""
    first = value[0] if isinstance(value, (list, tuple)) else value
    return first.float().numpy() if isinstance(first, Tensor) else np.asarray(first, dtype=np.float32)


@torch.no_grad()
def main(argv: Sequence[str]) -> int:
    """Serve one runtime."""
    runtime, name, sparsity, threads, folder = argv
    torch.set_num_threads(int(threads))
    told.update(folder=Path(folder), runtime=runtime)
    model = models()[name]
    try:
        weights = pruned(model, float(sparsity), told["folder"] / "weights.pt")
        call = RUNTIMES[runtime](weights, example(model), int(threads))
        np.save(told["folder"] / f"{runtime}.npy", array(call()))
    except Exception as error:
        print(json.dumps({"failed": words_of(error)[:300]}), flush=True)
        return 1
    print(json.dumps({"ready": True, "facts": told["facts"]}), flush=True)
    for _ in sys.stdin:
        seconds: list[float] = []
        start = time.perf_counter()
        while len(seconds) < FEWEST or time.perf_counter() - start < SECONDS:
            before = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - before)
        # The first call after others had the machine finds cold caches.
        print(json.dumps(seconds[1:]), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
