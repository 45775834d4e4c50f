"""A proof holds what is made from a capture on every call that the capture itself was held on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.check.calls import Call
from fxprune.check.capture_checked import capture_checked
from fxprune.check.proof import Expected
from fxprune.select.selection import Selection
from tests.oracle import Apply

LABELS = ["example", "second input", "flags turned", "second size", "size 1"]


@pytest.fixture(scope="module")
def expected() -> Expected:
    model = Apply(lambda linear, x, flag: linear(x) * flag).eval()
    example = Call("example", (torch.randn(4, 16), torch.ones(4, 1, dtype=torch.bool)), {})
    proof = capture_checked(model, example, None, check=True, fold_masks=True).proof
    assert proof is not None and [call.label.split(" [")[0] for call in proof.calls] == LABELS
    return proof.expect(Selection())


@pytest.mark.parametrize("place", range(len(LABELS)), ids=LABELS)
def test_what_shrank_is_judged_by_its_worst_call(expected: Expected, place: int) -> None:
    program = expected.proof.captured.program
    assert expected.shrunk(program, Selection()).ok
    wide = [[2 * y for y in ys] if at == place else ys for at, ys in enumerate(expected.wide)]
    row = dataclasses.replace(expected, wide=wide).shrunk(program, Selection())
    assert not row.ok and row.call == expected.proof.calls[place].label


@pytest.mark.parametrize("place", range(len(LABELS)), ids=LABELS)
def test_a_result_is_held_on_every_call(expected: Expected, place: int) -> None:
    calls = expected.proof.calls

    def result(x: Tensor, flag: Tensor) -> Any:
        y = expected.proof.captured.program(x, flag)
        at_fault = all(map(torch.equal, (x, flag), calls[place].args))
        return 2 * y if at_fault else y

    rows = [*expected.result(result), *expected.at_other_sizes(result)]
    assert [row.call for row in rows] == [call.label for call in calls]
    assert [row.ok for row in rows] == [at != place for at in range(len(calls))]
