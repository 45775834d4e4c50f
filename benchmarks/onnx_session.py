"""A model in onnxruntime, as one more dense runtime to be measured against where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NEEDED = ("onnxruntime", "onnx", "onnxscript")


def onnx_session(model: nn.Module, ids: Tensor, attention_mask: Tensor, threads: int) -> Callable[..., Any] | None:
    """Return a call `(ids [b, s], attention_mask [b, s]) -> list of outputs` at the example's sizes.

    None where onnxruntime, onnx or onnxscript is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        return None
    runtime = importlib.import_module("onnxruntime")
    # The exporter warns of every torchvision op that it cannot register without torchvision.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(model, (ids,), kwargs={"attention_mask": attention_mask}, dynamo=True, verbose=False)
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    graph = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def call(ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        feeds = dict(zip(names, (ids.numpy(), attention_mask.numpy())))
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return call
