"""environment: the variables that fxprune reads, what a failure becomes when the stages are checked, and threads."""

from __future__ import annotations

import os

import torch

from fxprune.errors import warn_once

# pyproject.toml has it as well.
VERSION = "0.1.0"
# README has this table for users.
VARIABLES = {
    "FXPRUNE_TRACE": "a folder: every stage writes the program as it left it, and what it changed",
    "FXPRUNE_STOP": "a stage, such as shrink: transform ends after it and hands out the graph as it then is",
    "FXPRUNE_CHECK": "1 verifies the program after every stage and hides no error; 2 also holds it against the oracle",
    "FXPRUNE_MEASURE": "0 leaves out the timing of whole models, as options={'measure': False} does",
    "FXPRUNE_NATIVE": "0 leaves the C++ kernels out: plain torch takes their place",
    "FXPRUNE_CACHE_DIR": "a folder for compiled kernels and measured choices, in place of the user's cache",
    "FXPRUNE_REMEMBER": "0 leaves measured choices out of the cache: every process measures for itself",
    "FXPRUNE_NATIVE_FLAGS": "more flags for the C++ compiler, such as -mno-avx512f",
}


def variable(name: str) -> str:
    """The value of one of VARIABLES; empty where it is not set."""
    if name not in VARIABLES:
        raise KeyError(name)
    return os.environ.get(name, "").strip()


def check_level() -> int:
    """FXPRUNE_CHECK as a number: 0 without it, and 1 for whatever is none."""
    value = variable("FXPRUNE_CHECK")
    return int(value) if value.isdecimal() else int(bool(value))


def words_of(error: BaseException) -> str:
    """The type of an error, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def hidden(error: Exception) -> str:
    """What a note says of an error that is answered by doing less. Under FXPRUNE_CHECK it is raised instead."""
    if check_level():
        raise error
    return words_of(error)


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def warn_of_one_thread() -> None:
    """Warns once where torch computes on one thread, the machine has more, and the user did not ask for it."""
    # torchrun sets the variable itself.
    is_asked = "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if torch.get_num_threads() == 1 < cores() and not is_asked:
        warn_once(
            f"torch computes on 1 thread of {cores()} cores: what fxprune measures and chooses is for one thread. "
            f"Call torch.set_num_threads({cores()}), or set OMP_NUM_THREADS=1 to say that it is meant."
        )
