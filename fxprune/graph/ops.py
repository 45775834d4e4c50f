"""ops: kinds of ATen ops that several stages look for, and the half types."""

from __future__ import annotations

import torch

aten = torch.ops.aten

HALF = (torch.float16, torch.bfloat16)
SUMS = {aten.add.Tensor, aten.add_.Tensor}
NORMS = {
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.batch_norm.default,
    aten.group_norm.default,
    aten.instance_norm.default,
    aten.native_layer_norm.default,
    aten.native_group_norm.default,
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
}


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 where its type is narrower."""
    return tensor.float() if tensor.dtype in HALF else tensor
