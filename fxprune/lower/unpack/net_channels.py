"""net_channels: how many channels the values of a net have."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.kernels.native import net
from fxprune.kernels.native.net import Step


def channels_of(steps: Sequence[Step]) -> list[int | None]:
    """The channels of each step's value; None where neither what made it nor what reads it says how many."""
    found: list[int | None] = [None] * len(steps)
    for step in steps:
        if isinstance(step, (net.Conv, net.Product, net.Depthwise)):
            found[step.x] = step.channels
            if step.residual >= 0:
                found[step.residual] = step.channels if isinstance(step, net.Depthwise) else step.rows
    for number, step in enumerate(steps):
        made = _made(step, found)
        found[number] = found[number] if made is None else made
    return found


def _made(step: Step, found: Sequence[int | None]) -> int | None:
    match step:
        case net.Enter():
            return None
        case net.Conv() | net.Product():
            return step.rows
        case net.Depthwise():
            return step.channels
        case net.Attention():
            return step.heads * step.v_size
        case net.Add() | net.Multiply():
            return found[step.other] if found[step.x] is None else found[step.x]
        case net.Concat():
            parts = [found[part] for part in step.parts]
            known = [part for part in parts if part is not None]
            return sum(known) if len(known) == len(parts) else None
        case net.Shuffle():
            channels = found[step.x]
            return None if channels is None else channels // (step.times[0] * step.times[1])
        case _:
            return found[step.x]
