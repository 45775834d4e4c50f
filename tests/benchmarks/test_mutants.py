"""The list of mutants is of code and tests that there are, and the machinery tells a killed one from all others."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.mutant import Mutant
from benchmarks.mutants import ROOT, copy_tree, main, mutated, run_all
from benchmarks.mutants_list import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_line_that_there_is_and_names_a_test_that_there_is(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, "its text stands exactly once in its file"
    assert mutant.old != mutant.new and "\n" not in mutant.old + mutant.new
    if mutant.file.endswith(".py"):
        changed = ast.parse(source.replace(mutant.old, mutant.new))
        assert ast.dump(changed) != ast.dump(ast.parse(source)), "more than a comment changes"
    file, _, name = mutant.test.partition("::")
    tests = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    functions = {node.name for node in tests if isinstance(node, ast.FunctionDef)}
    assert name.partition("[")[0] in functions if name else any(f.startswith("test_") for f in functions)


def test_no_two_mutants_are_one() -> None:
    assert max(Counter((m.file, m.old, m.new) for m in MUTANTS).values()) == 1
    assert max(Counter(m.name for m in MUTANTS).values()) == 1


CODE = "def double(x):\n    return 2 * x\n"
TEST = "from fxprune import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
LATE = "def test_late():\n    from fxprune import double\n\n    assert double(3) == 6\n"
GOOD = Mutant("fxprune/__init__.py", "2 * x", "3 * x", "a factor", "test_it.py::test_double")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package of this one's name, so that it shows whether the copy is what is imported."""
    (tmp_path / "fxprune").mkdir()
    (tmp_path / "fxprune/__init__.py").write_text(CODE)
    (tmp_path / "test_it.py").write_text(TEST)
    (tmp_path / "test_late.py").write_text(LATE)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def test_a_mutant_is_killed_where_its_test_fails_and_by_nothing_else(tree: Path) -> None:
    renamed = dataclasses.replace(GOOD, old="def double", new="def doubled", breaks="an import")
    tried = [
        ("killed", GOOD),
        ("survived", dataclasses.replace(GOOD, new="x + x", breaks="nothing")),
        ("broken", renamed),
        ("broken", dataclasses.replace(renamed, test="test_late.py::test_late")),
        ("its test does not pass by itself (broken)", dataclasses.replace(GOOD, test="test_it.py::test_that_is_not")),
    ]
    rows = run_all([mutant for _, mutant in tried], tree)
    assert [(row.outcome, row.mutant) for row in rows] == tried
    assert (tree / "fxprune/__init__.py").read_text() == CODE


def test_a_mutant_that_does_not_end_is_not_killed(tree: Path) -> None:
    (row,) = run_all(
        [dataclasses.replace(GOOD, new="__import__('time').sleep(600)", breaks="an end")], tree, seconds=6.0
    )
    assert row.outcome == "time limit"


def test_a_test_that_fails_by_itself_kills_nothing(tree: Path) -> None:
    (tree / "test_it.py").write_text(TEST.replace("6", "7"))
    (row,) = run_all([GOOD], tree)
    assert row.outcome == "its test does not pass by itself (fails)"


def test_a_text_that_stands_twice_is_refused_and_the_file_is_put_back(
    tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copied = tmp_path_factory.mktemp("copy")
    copy_tree(tree, copied)
    with pytest.raises(ValueError, match="2 times"), mutated(copied, dataclasses.replace(GOOD, old="x")):
        pass
    with pytest.raises(KeyError), mutated(copied, GOOD):
        assert "3 * x" in (copied / GOOD.file).read_text() and (tree / GOOD.file).read_text() == CODE
        raise KeyError
    assert (copied / GOOD.file).read_text() == CODE


def test_a_name_that_no_mutant_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "there is no such mutant"]) == 2
    assert "no mutant" in capsys.readouterr().err
