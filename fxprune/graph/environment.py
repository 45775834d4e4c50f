"""environment: every variable that fxprune reads, and what a failure becomes when the stages are checked."""

from __future__ import annotations

import os

# README has this table for users.
VARIABLES = {
    "FXPRUNE_TRACE": "a folder: every stage writes the program as it left it, and what it changed",
    "FXPRUNE_STOP": "a stage, such as shrink: transform ends after it and hands out the graph as it then is",
    "FXPRUNE_CHECK": "1 verifies the program after every stage and hides no error; 2 also holds it against the oracle",
    "FXPRUNE_NATIVE": "0 leaves the C++ kernels out: plain torch takes their place",
    "FXPRUNE_CACHE_DIR": "a folder for compiled kernels and measured choices, in place of the user's cache",
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
