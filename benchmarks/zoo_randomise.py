"""randomise: every parameter and floating buffer of a model drawn anew at unit-like scale.

Initial values hide mistakes: a LayerScale of 1e-6 silences its block, a bias or a batch-norm mean of zero cannot be
dropped wrongly, a norm scale of one cannot be sliced wrongly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Floating buffers that are values of a formula (rotary caches, relative coordinates, masks) stay: only these are state.
RUNNING = ("running_mean", "running_var")
SCALE_NAMES = ("gamma", "layer_scale", "lambda", "ls1", "ls2")


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draws every floating parameter, and the running statistics of batch-norms, in place; the same for a seed.

    Matrices have standard deviation 1 / sqrt(fan in), biases 0.1, scales of norms and residual branches are uniform in
    [0.5, 1.5], other bare parameters have 0.5 or 1 / sqrt(fan in), whichever is less.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            parameter.copy_(_draw(module, name, parameter, generator))
        for name, buffer in module._buffers.items():
            if buffer is not None and name in RUNNING:
                buffer.copy_(_uniform(buffer, generator) if name == "running_var" else _normal(buffer, 0.1, generator))


def _draw(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    kind = type(module).__name__.lower()
    if "bias" in name and parameter.dim() == 1:
        return _normal(parameter, 0.1, generator)
    if any(scale in name.lower() for scale in SCALE_NAMES):
        return _uniform(parameter, generator)
    if parameter.dim() <= 1:
        if "norm" in kind or kind.startswith("bn") or hasattr(module, "running_mean") or name == "weight":
            return _uniform(parameter, generator)
        return _normal(parameter, 0.5, generator)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return _normal(parameter, 1.0, generator)
    if isinstance(module, parametrize.ParametrizationList) and name == "original0":
        # The magnitude of a weight norm.
        return _uniform(parameter, generator)
    if "norm" in kind:
        return _uniform(parameter, generator)
    fan = 1.0 / math.sqrt(_fan_in(module, parameter))
    known = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention))
    return _normal(parameter, fan if known or parameter.numel() >= 4096 else min(0.5, fan * 4), generator)


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return max(1, weight.shape[0] // module.groups * math.prod(weight.shape[2:]))
    if type(module).__name__ == "Conv1D":
        return weight.shape[0]
    return max(1, math.prod(weight.shape[1:]) if weight.dim() != 3 or _is_conv(module) else weight.shape[-1])


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _normal(like: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype) * deviation


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=torch.float32).to(like.dtype) + 0.5
