"""What a measurement was taken on: the processor, its instruction sets, the software and the day."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve")


def cpu_fields() -> dict[str, str]:
    """Return what Linux tells about the first processor; empty on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def describe_machine() -> dict[str, Any]:
    """Return the facts that a figure needs beside it, as plain JSON values."""
    fields = cpu_fields()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_family": fields.get("cpu family", ""),
        "cpu_model": fields.get("model", ""),
        "cores": os.cpu_count(),
        "isa": [name for name in INSTRUCTION_SETS if name in flags],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def slug(name: str) -> str:
    """`AMD EPYC 7B13 64-Core Processor` -> `amd-epyc-7b13-64-core`."""
    words = re.sub(r"\((R|TM|r|tm)\)|@.*|\b(CPU|Processor)\b", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
