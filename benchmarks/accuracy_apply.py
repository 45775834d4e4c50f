"""A pruned model in plain PyTorch: what a selection says, written into a copy of the dense model."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy_case import Batch, Case
from fxprune.calibration.batches import capture_for, read_calls
from fxprune.capture.capture import Capture
from fxprune.couple.couple import couple
from fxprune.couple.coupling import Coupling
from fxprune.couple.removal import removal
from fxprune.plan.patterns import Channels
from fxprune.plan.plan import Plan
from fxprune.select.decide import choose_selection
from fxprune.select.selection import Selection


class Pruner:
    """One case's dense model with its graph and groups, worked out once."""

    def __init__(self, case: Case) -> None:
        self.model = case.model()
        self.batch = first_samples(case.calibration(0)[0], 2)

    @cached_property
    def captured(self) -> Capture:
        """The model as a graph."""
        return capture_for(self.model, read_calls([self.batch]))

    @cached_property
    def coupling(self) -> Coupling:
        """The groups of the graph."""
        return couple(self.captured.program)

    def by_magnitude(self, plan: Plan) -> Selection:
        """What the plan alone selects, without data."""
        asks = any(isinstance(rule.sparsity, Channels) for rule in plan.rules)
        program, coupling = self.captured.program, self.coupling if asks else None
        return choose_selection(self.captured, program, plan, None, coupling).selection

    def zeroed(self, selection: Selection) -> nn.Module:
        """A copy of the dense model with the selection's values, and zeros where it masks or removes."""
        result = copy.deepcopy(self.model)
        tensors = {**dict(result.named_parameters()), **dict(result.named_buffers())}
        leaving = removal(self.coupling, selection.keep) if selection.keep else None
        if leaving is not None and leaving.statistics:
            raise ValueError("zeros in the parameters do not stand for channels under a statistic")
        with torch.no_grad():
            for name, tensor in tensors.items():
                value = selection.apply(name, tensor)
                tensor.copy_(value if leaving is None else leaving.apply(name, value))
        return result


def first_samples(batch: Batch, count: int) -> Any:
    """The first samples of a batch."""
    if isinstance(batch, dict):
        return {key: value[:count] for key, value in batch.items()}
    return tuple(value[:count] for value in batch) if isinstance(batch, tuple) else batch[:count]
