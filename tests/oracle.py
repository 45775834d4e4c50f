"""What the tests of the pipeline share: the right answer, how near is right, and whether a model was touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune import Plan, Rule, Unstructured

TOLERANCE = 1e-4
HALF = Plan([Rule("*", Unstructured(0.5))])
# Forces packing, so that results do not hang on timing, and leaves the compiler out, which takes seconds.
QUICK: dict[str, Any] = {"layout": "nonzeros", "compile": False}
COMPILED: dict[str, Any] = {"layout": "nonzeros"}


class Apply(nn.Module):
    """One linear and a function of (linear, *args, **kwargs) as its forward."""

    def __init__(self, function: Callable[..., Any], i: int = 16, o: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(i, o)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.linear, *args, **kwargs)


def quick(model: nn.Module, *args: Any, plan: Plan | None = HALF, **more: Any) -> Any:
    """transform with QUICK options and no progress bar."""
    return fxprune.transform(model, plan, args, options=QUICK, progress=False, **more)


def zeroed(model: nn.Module, result: Any) -> nn.Module:
    """The user's eager model with the result's zeros in its weights, and nothing else changed."""
    oracle = copy.deepcopy(model)
    parameters = dict(oracle.named_parameters())
    with torch.no_grad():
        for name in result.selection.mask:
            keep = result.selection.mask[name].unpack()
            parameters[name].masked_fill_(~keep, 0)
    return oracle


def assert_close(got: Any, expected: Any) -> None:
    """Same structure; floats within TOLERANCE of the largest element of their tensor, everything else equal."""
    flat, spec = pytree.tree_flatten(expected)
    flat_got, spec_got = pytree.tree_flatten(got)
    assert spec_got == spec
    for a, b in zip(flat_got, flat, strict=True):
        if not isinstance(b, Tensor):
            assert type(a) is type(b) and a == b
            continue
        assert a.shape == b.shape and a.dtype == b.dtype
        if not b.is_floating_point():
            assert torch.equal(a, b)
        elif b.numel():
            scale = b.double().abs().nan_to_num(0, 0, 0).max().item() or 1.0
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * scale, equal_nan=True)


def assert_right(result: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The result computes what the model with the result's zeros computes."""
    with torch.no_grad():
        expected = zeroed(model, result)(*args, **kwargs)
    assert_close(result(*args, **kwargs), expected)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a transform must leave as it was; compare with ==."""
    seen: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        seen[name] = (id(value), value.requires_grad, value.dtype, value.detach().numpy(force=True).tobytes())
    for path, module in model.named_modules():
        hooks = [list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())]
        plain = {k: id(v) for k, v in vars(module).items() if not isinstance(v, (dict, bool, int, float, str))}
        small = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
        seen[f"module {path}"] = (type(module), hooks, plain, small, module.training, list(vars(module)))
    return seen
