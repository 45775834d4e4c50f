"""Every condition of an entry check: calls that meet it are let in, and one that breaks it alone is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fxprune.capture.entry import EntryCheck, TensorInput
from fxprune.errors import InputError

ON_CPU = TensorInput(torch.float32, torch.device("cpu"), ("s0", 16))
ONLY_CONTIGUOUS = TensorInput(torch.float32, torch.device("cpu"), ("s0", 16), contiguous=True)
ONLY_STRIDED = TensorInput(torch.float32, torch.device("cpu"), ("s0", 16), contiguous=False)
X, TURNED = torch.ones(4, 16), torch.ones(16, 4).t()

# What is broken -> what an input must be like, inputs that are, and one that is not.
CONDITIONS: dict[str, tuple[Any, list[Any], Any]] = {
    "a tensor": (ON_CPU, [X, TURNED], "x"),
    "its dtype": (ON_CPU, [X], X.double()),
    "its device": (ON_CPU, [X], X.to("meta")),
    "its last size": (ON_CPU, [X, X[:2]], torch.ones(4, 15)),
    "its first size": (TensorInput(torch.float32, torch.device("cpu"), (4, "s0")), [X, X[:, :3]], X[:3]),
    "one dimension more": (ON_CPU, [X], torch.ones(4, 16, 2)),
    "one dimension less": (TensorInput(torch.float32, torch.device("cpu"), ("s0", "s1")), [X], torch.ones(16)),
    "contiguous": (ONLY_CONTIGUOUS, [X], TURNED),
    "not contiguous": (ONLY_STRIDED, [TURNED], X),
    "a number's type": (("type", int), [3, 4], True),
    "a number's type, a float": (("type", float), [3.0, 0.5], 3),
    "a constant's value": (("constant", 3), [3], 4),
    "a constant's type": (("constant", True), [True], 1),
    "a constant NaN": (("constant", math.nan), [math.nan], 0.0),
    "a constant None": (("constant", None), [None], 0),
}
GUARDS = [("a[0].size()[0] % 2 == 0", "x is even"), ("a[0].size()[0] <= 8", "x is at most 8")]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", CONDITIONS)
def test_each_condition_is_asked(kind: str, place: int) -> None:
    want, good, bad = CONDITIONS[kind]
    # Whether it is the first that is asked or the last.
    wants = (want, ON_CPU) if place == 0 else (ON_CPU, want)
    check = EntryCheck(("x", "y"), ("x", "y"), wants, ())
    for value in good:
        assert len(check.check((value, X) if place == 0 else (X, value), {})) == 2
    with pytest.raises(InputError) as error:
        check.check((bad, X) if place == 0 else (X, bad), {})
    assert "please report" not in error.value.why and error.value.do


def test_each_guard_is_asked() -> None:
    check = EntryCheck(("x",), ("x",), (ON_CPU,), tuple(GUARDS))
    for size in (2, 8):
        check.check((torch.ones(size, 16),), {})
    for size, words in ((3, "x is even"), (10, "x is at most 8")):
        with pytest.raises(InputError, match=words):
            check.check((torch.ones(size, 16),), {})


def test_a_size_that_is_allowed_changes_no_other_condition() -> None:
    guards = (("a[0].size()[0] != 1", "x is not 1"), ("a[0].size()[0] <= 8", "x is at most 8"))
    check = EntryCheck(("x",), ("x",), (ON_CPU,), guards).allowing(["s0"], 1, (torch.ones(1, 16),), {})
    assert [check.takes((torch.ones(size, 16),), {}) for size in (1, 2, 8, 9)] == [True, True, True, False]
    assert not check.takes((torch.ones(1, 15),), {}) and not check.has_least("s0")
    above = check.above("s0", 3)
    assert [above.takes((torch.ones(size, 16),), {}) for size in (1, 3, 4, 9)] == [False, False, True, False]
    assert EntryCheck(("x",), ("x",), (ON_CPU,), (("a[0].size()[0] >= 3", ""),)).has_least("s0")


def test_sizes_that_are_one_together_or_alone() -> None:
    other = TensorInput(torch.float32, torch.device("cpu"), ("s1", 16))
    guards = (("a[0].size()[0] != 1", ""), ("a[1].size()[0] != 1", ""))
    check, one = EntryCheck(("x", "y"), ("x", "y"), (ON_CPU, other), guards), torch.ones(1, 16)
    sizes = [(1, 1), (1, 2), (2, 1), (2, 2)]

    def taken(check: EntryCheck) -> list[bool]:
        return [check.takes((torch.ones(a, 16), torch.ones(b, 16)), {}) for a, b in sizes]

    assert taken(check) == [False, False, False, True]
    both = check.allowing(["s0", "s1"], 1, (one, one), {})
    assert taken(both) == [True, False, False, True]
    first = both.allowing(["s0"], 1, (one, torch.ones(2, 16)), {})
    assert taken(first) == [True, True, False, True]
    assert taken(first.above("s0", 1, ["s0", "s1"])) == [True, False, False, True]
    assert taken(first.above("s0", 1)) == [False, False, False, True]
