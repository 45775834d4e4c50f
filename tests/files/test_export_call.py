"""Calls made from an entry check: smallest sizes that its conditions allow, and values that are legal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from fxprune.capture.entry import EntryCheck, TensorInput
from fxprune.errors import InputError
from fxprune.files.export_call import made_call

CPU = torch.device("cpu")


def tensor(*sizes: int | str, dtype: torch.dtype = torch.float32, contiguous: bool | None = None) -> TensorInput:
    return TensorInput(dtype, CPU, sizes, contiguous)


def entry(*inputs: Any, guards: tuple[str, ...] = (), example: Any = None) -> EntryCheck:
    names = tuple("abcd"[: len(inputs)])
    spec = pytree.tree_structure(example if example is not None else ((0,) * len(inputs), {}))
    return EntryCheck(names, names, inputs, tuple((guard, guard) for guard in guards), spec, names)


@pytest.mark.parametrize(
    ("check", "shapes"),
    [
        (entry(tensor(4, 5)), [(4, 5)]),
        (entry(tensor("s0", 5)), [(2, 5)]),
        (entry(tensor("s0", "s1"), tensor("s1", "s0")), [(2, 3), (3, 2)]),
        (entry(tensor("s0", "2*s0")), [(2, 4)]),
        (entry(tensor("s0"), guards=("a[0].size()[0] >= 7",)), [(7,)]),
        (entry(tensor("s0"), guards=("a[0].size()[0] % 32 == 0", "a[0].size()[0] > 40")), [(64,)]),
        (entry(tensor("s0"), tensor("s1"), guards=("a[1].size()[0] == a[0].size()[0]",)), [(2,), (2,)]),
        (entry(tensor("s0"), tensor("s1"), guards=("a[1].size()[0] == 3*a[0].size()[0]",)), [(2,), (6,)]),
        (entry(tensor("s0"), guards=("8 // (a[0].size()[0] - 2) == 8",)), [(3,)]),
    ],
)
def test_sizes_meet_the_conditions(check: EntryCheck, shapes: list[tuple[int, ...]]) -> None:
    call = made_call(check)
    assert [tuple(t.shape) for t in call.args] == shapes and not call.kwargs
    check.check(call.args, call.kwargs)


def test_values_are_legal() -> None:
    check = entry(tensor(3, dtype=torch.int64), tensor(3, dtype=torch.bool), ("constant", "mean"), tensor(3, 2))
    ids, flags, constant, floats = made_call(check).args
    assert ids.tolist() == [0, 0, 0] and flags.all() and constant == "mean"
    assert floats.std() > 0 and torch.equal(floats, made_call(check).args[3])


def test_strides_and_names_are_as_captured() -> None:
    check = entry(tensor(3, "s0", contiguous=False), tensor("s0"), example=((0,), {"b": 0}))
    call = made_call(check)
    assert not call.args[0].is_contiguous() and list(call.kwargs) == ["b"]
    check.check(call.args, call.kwargs)


def test_conditions_that_nothing_meets_are_told() -> None:
    with pytest.raises(InputError, match=r"meet its conditions \(a\[0\].size\(\)\[0\] < 0\).*example_inputs"):
        made_call(entry(tensor("s0"), guards=("a[0].size()[0] < 0",)))
