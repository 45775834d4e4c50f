"""Every rule: permuting an axis permutes the output alike, and taking indices away equals writing zeros there.

The golden text is what every rule says. To write it anew after a change that is meant: FXPRUNE_WRITE_GOLDEN=1 pytest
tests/couple/test_rules.py, and read the difference.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.couple.axis import Axis
from fxprune.couple.rules import RULES, Dims
from tests.couple import rule_cases, rule_cases_layout
from tests.couple.rule_case import CASES, Case
from tests.couple.rule_run import Call, Shape, atom_of, flat, permuted, removed, shapes

GOLDEN = Path(__file__).parents[1] / "golden" / "rules.txt"
OPS = list(RULES)
BY_OP: dict[str, list[Case]] = {op: [case for case in CASES if case.op == op] for op in OPS}
CALLED = [op for op in OPS if BY_OP[op]]
NOT_FOUND = [op for op in OPS if not hasattr(torch.ops.aten, op) and not hasattr(torch.ops.aten, f"{op}_")]

assert rule_cases.__doc__ and rule_cases_layout.__doc__


def test_every_rule_is_of_an_op_that_there_is() -> None:
    """So that no name is misspelt: all but one are of the torch that is pinned, and that one is of transformers."""
    assert NOT_FOUND == ["transformers::grouped_mm_fallback"]


def test_every_rule_has_a_case() -> None:
    assert [op for op in OPS if not BY_OP[op] and op not in NOT_FOUND] == []


def test_what_the_rules_say() -> None:
    lines = [f"{op}: {rule.says}" + ("; sizes follow" if rule.resize else "") for op, rule in sorted(RULES.items())]
    if os.environ.get("FXPRUNE_WRITE_GOLDEN"):
        GOLDEN.write_text("\n".join(lines) + "\n")
    assert lines == GOLDEN.read_text().splitlines()


def _met(op: str) -> Iterator[tuple[Case, str, Shape]]:
    """Every call of an op, with each way in which earlier ops may have split its axes."""
    for case, (name, shape) in itertools.product(BY_OP[op], shapes()):
        if shape is atom_of or not case.aligned:
            yield case, name, shape


def _same(got: Any, want: Any, what: str) -> None:
    torch.set_printoptions(precision=3)
    for a, b in zip(flat(got), flat(want), strict=True):
        # The longest sum of any case has fewer than 1,000 terms of order one.
        eps = torch.finfo(a.dtype).eps if a.is_floating_point() or a.is_complex() else 0.0
        torch.testing.assert_close(a, b, rtol=1e4 * eps, atol=1e4 * eps, equal_nan=True, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("op", CALLED)
def test_permuting_an_axis_permutes_the_output(op: str) -> None:
    for case, name, shape in _met(op):
        call = Call(case, shape)
        for atom in call.atoms():
            order = {atom: torch.arange(atom.size.number).roll(1)}
            got = call.run(call.change(lambda x, dims: permuted(x, dims, order)))  # noqa: B023
            want = [permuted(x, dims, order) for x, dims in call.outputs(call.result)]
            if not case.random:
                _same(got, want, f"{case} of {name}, axis of {atom.size}")


def _subsets(count: int) -> Iterator[frozenset[int]]:
    """Which operands are zero where the removed indices are: all sets of a few, or those that differ little."""
    every = frozenset(range(count))
    if count <= 3:
        for size in range(count + 1):
            yield from map(frozenset, itertools.combinations(range(count), size))
        return
    yield from (every, frozenset())
    for i in range(count):
        yield from (every - {i}, frozenset({i}))


def _zeroed(case: Case, shape: Shape, operands: frozenset[int]) -> tuple[Call, set[Axis]]:
    """The call with these operands zero at removed indices, and where its rule says that the output is."""
    call = Call(case, shape)
    for index, (value, dims) in enumerate(call.inputs()):
        if index in operands and (value.is_floating_point() or value.is_complex()):
            dims.zero = dims.atoms()
    return call, call.rule.zero(call.here, call.out, **call.dims)


def _keep(atom: Axis) -> Tensor:
    size = atom.size.number
    # Grouped products want rows of 16 bytes.
    return (
        torch.arange(size // 4, size - size // 4) if size % 8 == 0 else torch.arange(1, size - 1 if size > 3 else size)
    )


def _check_removal(call: Call, zero: set[Axis], keep: Mapping[Axis, Tensor], what: str) -> None:
    """Hold the op on slices against the op on zeros, and the rule's claim of zeros against both."""

    def erase(x: Tensor, dims: Dims) -> Tensor:
        own = {atom: kept for atom, kept in keep.items() if atom in dims.zero}
        return x.masked_fill(removed(x, dims, own), 0)

    want = call.run(call.change(erase))
    got = call.run_shrunk(call.change(lambda x, dims: permuted(x, dims, keep)), keep)
    _same(got, [permuted(x, dims, keep) for x, dims in call.outputs(want)], what)
    for atom, kept in keep.items():
        for x, dims in call.outputs(want):
            if atom in zero and atom in dims.atoms():
                gone = x[removed(x, dims, {atom: kept})]
                assert not gone.any(), f"{what}: said to be zero along an axis of {atom.size}, is {gone[:4]}"


@pytest.mark.parametrize("op", CALLED)
def test_taking_indices_away_equals_zeros(op: str) -> None:
    for case, name, shape in _met(op):
        if case.random:
            continue
        count = len(Call(case, shape).inputs())
        for operands in _subsets(count) if shape is atom_of else (frozenset(range(count)), frozenset[int]()):
            call, zero = _zeroed(case, shape, operands)
            what = f"{case} of {name}, zeros in operands {sorted(operands)}"
            free = call.atoms(mixed=False)
            for atom in free:
                _check_removal(call, zero, {atom: _keep(atom)}, f"{what}, without some of {atom.size}")
            if len(free) > 1 and len(operands) == count:
                _check_removal(call, zero, {atom: _keep(atom) for atom in free}, f"{what}, without some of all")
