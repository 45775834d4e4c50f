"""What torch does otherwise than it should, or than other versions do, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.graph.compat import GroupNormGoesBackward

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]

NORMS: dict[str, Norm] = {
    "functional": lambda x, w, b: F.group_norm(x, 2, w, b),
    "by keyword": lambda x, w, b: F.group_norm(input=x, num_groups=2, weight=w, bias=b),
    "torch": lambda x, w, b: torch.group_norm(x, 2, w, b),
    "aten": lambda x, w, b: torch.ops.aten.group_norm.default(x, 2, w, b),
    "native": lambda x, w, b: torch.ops.aten.native_group_norm.default(x, w, b, 3, 4, x[0, 0].numel(), 2, 1e-5)[0],
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((3, 4, 5, 6), torch.channels_last), ((3, 4, 2, 3, 4), torch.channels_last_3d), ((3, 4), torch.contiguous_format)],
)
def test_group_norm_goes_backward(
    name: str, needs_gradient: bool, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    """Without the mode this ends the process, which pytest tells of as a crash."""

    def gradients(x: Tensor) -> list[Tensor]:
        weight, bias = (torch.ones(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        y = NORMS[name](x, weight, bias)
        cotangent = torch.arange(y.numel(), dtype=torch.float64).reshape(y.shape)
        wanted = [weight, bias, x] if x.requires_grad else [weight, bias]
        return list(torch.autograd.grad(y, wanted, cotangent))

    plain = torch.randn(shape, dtype=torch.float64).requires_grad_(needs_gradient)
    with GroupNormGoesBackward():
        found = gradients(plain.detach().to(memory_format=memory_format).requires_grad_(needs_gradient))
    torch.testing.assert_close(found, gradients(plain), check_stride=False)
