"""The environment variables: one table in the code, the same in the README, and no other variable anywhere."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import pytest
import torch

from fxprune import FxPruneWarning, errors
from fxprune.errors import warn_once
from fxprune.graph.environment import VARIABLES, check_level, hidden, variable, warn_of_one_thread, words_of

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `(FXPRUNE_\w+)` \| (.+) \|$", re.MULTILINE)
# Read by the tests alone; their modules say what it does.
OF_TESTS = {"FXPRUNE_WRITE_GOLDEN"}


def test_the_readme_has_the_table() -> None:
    assert dict(ROW.findall((ROOT / "README.md").read_text(encoding="utf-8"))) == VARIABLES


def test_the_code_names_no_other_variable() -> None:
    files = [p for top in ("fxprune", "triton_kernels", "benchmarks") for p in (ROOT / top).rglob("*.py")]
    named = {name for p in files for name in re.findall(r"\bFXPRUNE_[A-Z_]*[A-Z]\b", p.read_text(encoding="utf-8"))}
    assert named - OF_TESTS == set(VARIABLES)


def test_a_variable_that_is_not_in_the_table_cannot_be_read() -> None:
    with pytest.raises(KeyError, match="FXPRUNE_ANYTHING"):
        variable("FXPRUNE_ANYTHING")


@pytest.mark.parametrize(("value", "level"), [("", 0), ("0", 0), ("1", 1), ("2", 2), (" 1 ", 1), ("yes", 1)])
def test_check_level(value: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_CHECK", value)
    assert check_level() == level


def test_an_error_is_hidden_from_users_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ValueError("two\nlines")
    monkeypatch.delenv("FXPRUNE_CHECK", raising=False)
    assert hidden(error) == words_of(error) == "ValueError: two"
    monkeypatch.setenv("FXPRUNE_CHECK", "1")
    with pytest.raises(ValueError, match="two"):
        hidden(error)
    assert words_of(KeyError()) == "KeyError: "


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())


@pytest.mark.usefixtures("nothing_said")
def test_a_warning_is_given_once() -> None:
    with pytest.warns(FxPruneWarning) as told:
        for text in ("slow", "slow", "slower", "slow"):
            warn_once(text)
    assert [str(w.message) for w in told] == ["slow", "slower"]
    assert told[0].filename == __file__


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize(
    ("threads", "cores", "environment", "is_told"),
    [
        (1, 8, {}, True),
        (1, 8, {"OMP_NUM_THREADS": "1"}, False),
        # torchrun sets it without having been asked.
        (1, 8, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, True),
        (1, 1, {}, False),
        (2, 8, {}, False),
    ],
)
def test_one_thread_that_nobody_asked_for_is_told(
    threads: int, cores: int, environment: dict[str, str], is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_one_thread()
    assert [w.category for w in told] == [FxPruneWarning] * is_told
