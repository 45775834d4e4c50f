"""What tests of exact removal share: models that hide nothing, and the masked model as the right answer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import fxprune
from fxprune.emit.pruned import PrunedModule

QUIET = {"compile": False, "measure": False, "layout": "dense", "align": 1}


def shuffled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation, with biases and statistics that hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None or not tensor.is_floating_point():
                    continue
                if name == "running_var" or (name == "weight" and tensor.dim() == 1):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                elif tensor.dim() == 1:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model.eval()


def zero(weight: Tensor, *, out: object = (), into: object = ()) -> None:
    """Zeros for these outputs (dim 0) and inputs (dim 1) of a weight, in place and for good."""
    with torch.no_grad():
        weight[list(out)] = 0  # pyright: ignore
        weight[:, list(into)] = 0  # pyright: ignore


def removed(
    model: nn.Module, *inputs: Tensor, tolerance: float = 1e-5, align: int = 1, **settings: object
) -> PrunedModule:
    """What transform makes of the model, held against it on these inputs and on others, at another batch size too."""
    before = copy.deepcopy(model.state_dict())
    options = {**QUIET, "align": align}
    result = fxprune.transform(model, example_inputs=inputs, options=options, progress=False, **settings)
    more = [torch.cat([x, x.flip(0)]) if x.is_floating_point() else torch.cat([x, x]) for x in inputs]
    with torch.no_grad():
        for case in (inputs, more, [-3 * x if x.is_floating_point() else x for x in inputs]):
            wanted, got = model(*case), result(*case)
            assert torch.allclose(got, wanted, rtol=0, atol=tolerance * float(wanted.abs().max())), "differs"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return result


def shapes(result: PrunedModule) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in result.named_parameters()}


def routes(result: PrunedModule) -> dict[str, int]:
    return {} if result.report.dead is None else {k: v for k, v in result.report.dead.routes.items() if v}


def image(batch: int = 2, channels: int = 3, side: int = 9) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def vectors(batch: int = 3, width: int = 12) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(1))


def sequence() -> Tensor:
    return torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(1))
