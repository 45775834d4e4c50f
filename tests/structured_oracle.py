"""What the tests of structured pruning share: unit-like weights, and the model with every removed slice set to zero.

The oracle is built from the user's eager model and the list of removed slices alone, with nothing of fxprune's graph.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune import Channels, Plan, Rule
from tests.oracle import TOLERANCE, assert_close, snapshot

# The compiler takes seconds and timing says nothing here: what is tested is the shrunk graph.
EAGER: dict[str, Any] = {"compile": False, "measure": False}
HALF = Plan([Rule("*", Channels(0.5, align=1))])


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> Any:
    """The model in eval mode, every parameter and batch-norm statistic drawn anew, so that nothing is 0, 1 or tiny.

    Matrices keep the scale of their inputs, vectors and statistics are of unit-like scale.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = math.prod(parameter.shape[1:]) ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.copy_(drawn * scale + (1.0 if parameter.dim() == 1 else 0.0))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


class Net(nn.Module):
    """Modules, parameters and buffers by name, and a function of (net, *inputs) as the forward."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def net(function: Callable[..., Any], **parts: nn.Module | Tensor) -> Any:
    """A Net with unit-like weights, in eval mode."""
    return randomised(Net(function, **parts))


def channels(amount: float = 0.5, pattern: str = "*", scope: str = "local", **more: Any) -> Plan:
    """A plan of one rule, not aligned unless it says so."""
    return Plan([Rule(pattern, Channels(amount, **{"align": 1, **more}), scope=scope)])


def shrunk(model: nn.Module, *args: Any, plan: Plan | None = HALF, **more: Any) -> Any:
    """transform without compiler, timing and progress bar."""
    more.setdefault("options", EAGER)
    return fxprune.transform(model, plan, args, progress=False, **more)


def zeroed(model: nn.Module, result: Any) -> Any:
    """A copy of the eager model with zeros in every removed slice of every floating parameter and buffer."""
    oracle = copy.deepcopy(model)
    tensors = {**dict(oracle.named_parameters(remove_duplicate=False)), **dict(oracle.named_buffers())}
    with torch.no_grad():
        for name, cuts in result.report.removed.items():
            for dim, removed in cuts:
                if tensors[name].is_floating_point():
                    tensors[name].index_fill_(dim, removed, 0.0)
        for name, mask in result.selection.mask.items():
            tensors[name].masked_fill_(~mask.unpack(), 0.0)
    return oracle


@torch.no_grad()
def relative(got: Any, expected: Any) -> float:
    """The largest max|a-b| / max|b| over the floating outputs."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True)
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in pairs
        if isinstance(b, Tensor) and b.is_floating_point() and b.numel()
    )


def assert_shrunk(result: Any, model: nn.Module, *calls: Any, oracle: Any = None) -> None:
    """The result answers every call as the zeroed model does, which is far from the whole one, and is smaller.

    A call is a tuple of arguments, or of one tensor that stands for itself. Also holds the counts and shapes of what is
    left against the slices that are said to be gone.
    """
    assert result.report.removed, str(result.report)
    assert not [n for n in result.report.notes if "keeps all its indices" in n or "nothing was shrunk" in n]
    oracle = zeroed(model, result) if oracle is None else oracle
    for call in calls:
        args = call if isinstance(call, tuple) else (call,)
        with torch.no_grad():
            expected, dense = oracle(*args), model(*args)
        assert_close(result(*args), expected)
        assert relative(dense, expected) > 100 * TOLERANCE
    before, after = result.report.parameters
    assert before == sum(p.numel() for p in model.parameters())
    left, named = 0, sizes(result)
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        for dim, gone in result.report.removed.get(name, []):
            shape[dim] -= len(gone)
        left += math.prod(shape)
        assert named.get(name, tuple(shape)) == tuple(shape), name
    assert after == left < before


def sizes(result: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters that the result still has under their names."""
    return {name: tuple(p.shape) for name, p in [*result.named_parameters(), *result.named_buffers()]}


def kept(result: Any) -> dict[str, int]:
    """Group -> indices that stay, for the groups that lost some."""
    return {group.name: group.kept for group in result.report.groups if group.kept < group.size}


def right(model: nn.Module, *args: Any, plan: Plan = HALF, other: Any = None, **more: Any) -> Any:
    """The shrunk model, held against the oracle on the call, on another of the same sizes and on `other`.

    The user's model must come out of it as it was.
    """
    before = snapshot(model)
    result = shrunk(model, *args, plan=plan, **more)
    assert snapshot(model) == before
    fresh = tuple(torch.randn_like(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    assert_shrunk(result, model, args, fresh, *([] if other is None else [other]))
    return result


def mlp(*widths: int) -> Any:
    """Linears named "0", "2", ... with ReLUs between them."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return randomised(nn.Sequential(*layers[:-1]))


def removed(result: Any, name: str, dim: int = 0) -> list[int]:
    """The indices that left a dimension of a tensor."""
    return dict(result.report.removed.get(name, [])).get(dim, torch.tensor([])).tolist()
