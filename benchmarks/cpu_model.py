"""What a model of the CPU benchmark is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class CpuModel:
    """A model in eval mode, and the inputs of one call, by position."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
