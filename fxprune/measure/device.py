"""device: what a call runs on, and what of it the processor can do in half precision."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree


def device_of(inputs: Any = (), kwargs: Any = None) -> torch.device | None:
    """The GPU that the first tensor on one is on; None for the CPU."""
    leaves = pytree.tree_leaves((inputs, kwargs))
    return next((t.device for t in leaves if isinstance(t, torch.Tensor) and t.device.type == "cuda"), None)


def device_name(inputs: Any = (), kwargs: Any = None) -> str:
    """The name of the device that the tensors are on."""
    device = device_of(inputs, kwargs)
    return cpu_name() if device is None else torch.cuda.get_device_name(device)


@cache
def _cpu_info() -> dict[str, str]:
    """What the system tells of the first processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def has_bfloat16_units(device: torch.device | None) -> bool:
    """Whether products in bfloat16 have units of their own, which makes them faster than in float32."""
    if device is not None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(
        {"amx_bf16", "avx512_bf16", "bf16"} & {*_cpu_info().get("flags", _cpu_info().get("Features", "")).split()}
    )


@cache
def cache_bytes() -> int:
    """Bytes of the cache that each core of the CPU has to itself (its L2)."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    text = size.read_text().strip() if size.exists() else "1024K"
    return int(text.rstrip("KM")) << (20 if text.endswith("M") else 10)
