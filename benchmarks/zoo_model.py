"""ZooModel: a model of the zoo, what it is called with, and the share of its parameters that must leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

SHARE = 0.15
SOURCES = ("torchvision", "timm", "pytorchcv", "transformers")

CallInputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """One model: `build()` returns it in eval mode, `inputs()` one call of it, `share` of its parameters must leave."""

    name: str
    source: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], CallInputs]
    share: float = SHARE
    why: str = ""

    @property
    def label(self) -> str:
        """`source/name`, which is unique."""
        return f"{self.source}/{self.name}"
