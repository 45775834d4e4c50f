"""Results that train: the gradients of one backward pass, and a call in training mode, against the zeroed model's."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.fuzz_case import Case
from benchmarks.fuzz_oracle import FLOOR, Told, zeroed
from benchmarks.fuzz_pool import OWN
from fxprune.errors import FxPruneError

LARGER = 1e3  # Gradients add up over a whole model: how many times an output's rounding theirs may be.


def compare_gradients(case: Case, result: nn.Module, told: Told, say: Callable[[str], None]) -> dict[str, Any]:
    """What is wrong with the gradients of a result that trains; nothing where they are right or the model has none."""
    for training in (False, True):
        model = zeroed(case.model(), told)
        if training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
            continue
        if training and "dropout" in case.sketch.code().lower():
            continue
        if training and any(type(m).__name__ in ("TransformerEncoderLayer", "Counter") for m in model.modules()):
            continue
        say(OWN)
        try:
            expected = _gradients(model.train(training), case)
        except RuntimeError:
            continue
        say("gradients")
        try:
            got = _gradients(result.train(training), case)
        except FxPruneError as error:
            return {"outcome": "needless", "why": f"training: {error}"[:200]}
        except Exception as error:
            said = f"backward: {type(error).__name__}: {error}".splitlines()[0][:200]
            return {"outcome": "crash", "why": said, "traceback": traceback.format_exc()[-5000:]}
        if wrong := _differ(case, got, expected, _named_alike(model, told)):
            mode = "training" if training else "eval"
            return {"outcome": "wrong", "why": f"gradients in {mode} mode", "raw": wrong}
    return {}


def _gradients(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """Gradients by name of the sum of squares of all float outputs, with that sum."""
    model.zero_grad()
    inputs = case.inputs(max(case.batch, 2), 3)
    args, kwargs = case.split(inputs, case.form)
    leaves = [v for v in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(v, Tensor) and v.is_floating_point()]
    torch.manual_seed(5)
    loss = sum((v * torch.randn(v.shape, dtype=torch.float64).to(v.dtype)).sum() for v in leaves if v.requires_grad)
    if not isinstance(loss, Tensor):
        raise RuntimeError("nothing to differentiate")
    loss.backward()
    # A parameter that the loss does not reach has a gradient of zero.
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"the loss": loss.detach(), **found}


def _named_alike(model: nn.Module, told: Told) -> Told:
    """What was told under the first name of each tensor: a tied weight has several."""
    first = {id(p): name for name, p in model.named_parameters()}
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    masks = {names.get(name, name): mask for name, mask in told.masks.items()}
    removed = {names.get(name, name): cuts for name, cuts in told.removed.items()}
    return dataclasses.replace(told, masks=masks, removed=removed)


def _differ(case: Case, got: dict[str, Tensor], expected: dict[str, Tensor], told: Told) -> str:
    """The first gradient that differs, of those that both have."""
    scale = max(float(g.abs().max()) for g in expected.values() if g.numel())
    limit = FLOOR[case.dtype] * LARGER * scale if case.dtype == torch.float64 else 0.02 * scale
    if case.dtype in (torch.float16, torch.bfloat16) or not scale < 1e12:
        return ""
    for name, gradient in expected.items():
        if name not in got:
            continue
        for dim, gone in told.removed.get(name, []):
            stays = torch.ones(gradient.shape[dim], dtype=torch.bool)
            stays[gone] = False
            gradient = gradient.index_select(dim, stays.nonzero().flatten())
        if name in told.masks:
            mask = told.masks[name]
            if mask.shape != gradient.shape:
                continue
            gradient = gradient.masked_fill(~mask, 0.0)
        if got[name].shape != gradient.shape:
            continue
        error = float((got[name] - gradient).abs().max()) if gradient.numel() else 0.0
        if not error <= limit:
            return f"{name}: gradients differ by {error:.1e}, the largest is {scale:.1e}"
    return ""
