"""The environment variables: one table in the code, the same in the README, and no other variable anywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fxprune.graph.environment import VARIABLES, check_level, hidden, variable, words_of

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
