"""What a call of a pruned model has to do, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

CALLS = 5


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    """The linears and convolutions by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def work_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Multiply-adds of linears and convolutions in a call: of all their weights (`dense`), of the nonzeros (`nonzero`).

    Of a zero that padding adds they count too.
    """
    work = {"dense": 0.0, "nonzero": 0.0}

    def count(module: Any, _: Any, result: Tensor) -> None:
        weight = module.weight
        times = result.numel() // weight.shape[0]
        work["dense"] += times * weight.numel()
        work["nonzero"] += times * int(torch.count_nonzero(weight))

    hooks = [module.register_forward_hook(count) for module in weighted(model).values()]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return work


def outside(call: Callable[[], Any]) -> float:
    """The share of a call's time that is not in fxprune's own ops."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        whole = time.perf_counter() - start
    ours = sum(event.cpu_time_total for event in seen.key_averages() if event.key.startswith("fxprune::"))
    return max(0.0, 1 - ours / 1e6 / whole)
