"""model_timing: a whole model as pruned, against the best that its user has."""

from __future__ import annotations

import dataclasses

import torch

from .device import cpu_name
from .race import Fastest
from .timing import interleave
from .ways import Call


@dataclasses.dataclass(frozen=True)
class Half:
    """The dense model in bfloat16: seconds of a call, and how far its outputs are from those in float32 (relative)."""

    seconds: float
    error: float


@dataclasses.dataclass(frozen=True)
class ModelTiming:
    """Median seconds of a call in a loop: of the user's model in its fastest way, and as pruned.

    way     the user's fastest way, and `ways` what each of them took when it was raced; `failed` says what did not run
    cold    seconds of the two with caches that hold something else
    half    the dense model in bfloat16, where the machine has units for it
    """

    way: str
    dense: float
    pruned: float
    cold: tuple[float, float]
    threads: int
    device: str
    ways: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    half: Half | None = None

    @property
    def ratio(self) -> float:
        """How many times faster the result is."""
        return self.dense / self.pruned

    @property
    def cold_ratio(self) -> float:
        """The same with cold caches."""
        return self.cold[0] / self.cold[1]

    def __str__(self) -> str:
        differs = not 1 / 1.1 < self.cold_ratio / self.ratio < 1.1
        cold = f"; {self.cold_ratio:.2f}x with cold caches" if differs else ""
        return (
            f"{_ms(self.dense)} at your best ({self.way}), {_ms(self.pruned)} pruned: {self.ratio:.2f}x{cold} "
            f"({self.threads} threads, {self.device})"
        )


def time_against(user: Fastest, pruned: Call, device: torch.device | None, *, seconds: float = 1.0) -> ModelTiming:
    """Times a pruned model against the user's fastest way."""
    dense, own = interleave([user.call, pruned], device, seconds=seconds, min_rounds=7)
    name = cpu_name() if device is None else torch.cuda.get_device_name(device)
    return ModelTiming(
        user.name,
        dense.typical,
        own.typical,
        (dense.alone, own.alone),
        torch.get_num_threads(),
        name,
        user.seconds,
        user.failed,
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
