"""The models of the CPU benchmark, with zeros in their weights: the same for every runtime, by a seed.

The weights are drawn, at the real shapes: how long a call takes does not depend on what they are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks.cpu_language import language_models
from benchmarks.cpu_model import CpuModel
from benchmarks.cpu_vision import vision_models
from benchmarks.zoo_randomise import randomise


def models() -> dict[str, CpuModel]:
    """Every model by name; builds none."""
    return {model.name: model for model in (*vision_models(), *language_models())}


def pruned(model: CpuModel, sparsity: float, file: Path | None = None) -> nn.Module:
    """The model with the least of each linear's and convolution's weights zero; depthwise convolutions stay dense.

    What is in `file` is taken from there; else it is put there: to prune a large model takes longer than to read it.
    """
    torch.manual_seed(0)
    built = model.build().eval().requires_grad_(False)
    if file is not None and file.exists():
        built.load_state_dict(torch.load(file))
        return built
    randomise(built, 0)
    for module in built.modules():
        if sparsity and isinstance(module, (nn.Linear, nn.Conv2d)) and not is_depthwise(module):
            prune.l1_unstructured(module, "weight", sparsity)
            prune.remove(module, "weight")
            module.weight.requires_grad_(False)
    if file is not None:
        torch.save(built.state_dict(), file)
    return built


def is_depthwise(module: nn.Module) -> bool:
    """Whether each output channel of a convolution reads one input channel."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def example(model: CpuModel) -> tuple[Tensor, ...]:
    """The inputs, the same in every process."""
    torch.manual_seed(1)
    return model.inputs()
