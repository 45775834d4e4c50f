"""Sparsity patterns: the settings they accept, what they count, and how they are said in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxprune.errors import PlanError
from fxprune.plan.patterns import SPARSITIES, Blocks, Channels, Existing, SemiStructured, Sparsity, Unstructured

sizes = st.integers(0, 5000)
multiples = st.integers(1, 70)
least = st.integers(1, 70)
fractions = st.floats(0.0, 1.0, exclude_max=True)
amounts = st.one_of(fractions, st.integers(0, 6000))


def refused(make: Callable[[], object], *words: str) -> None:
    """`make` raises a PlanError that has all four parts and these words."""
    with pytest.raises(PlanError) as error:
        make()
    assert error.value.what and error.value.where and error.value.why and error.value.do
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize("pattern", [Unstructured, Channels])
@pytest.mark.parametrize("amount", [float("nan"), -0.1, 1.0001, float("inf"), -1, True, "0.5", None, 1j])
def test_bad_amounts(pattern: type, amount: Any) -> None:
    refused(lambda: pattern(amount), "amount", repr(amount), f"{pattern.__name__}(amount=...)")


@pytest.mark.parametrize("pattern", [Unstructured, Channels])
@pytest.mark.parametrize("amount", [0, 0.0, 0.999, 7, np.int64(7), np.float32(0.25)])
def test_good_amounts(pattern: type, amount: Any) -> None:
    kept = pattern(amount).amount
    assert kept == amount and type(kept) is (int if isinstance(amount, (int, np.integer)) else float)


@pytest.mark.parametrize("amount", [1.0, np.float32(1.0)])
def test_only_elements_may_all_go(amount: Any) -> None:
    assert Unstructured(amount).count(10) == 10
    refused(lambda: Channels(amount, min_keep=3), "asks for all", "min_keep=3", "Drop")
    assert Channels(1).count(10) == 1


def test_bad_scores() -> None:
    anything: Any = None
    refused(lambda: Unstructured(0.5, "l7"), "l7", "l1")
    refused(lambda: Unstructured(0.5, anything), "NoneType")


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("norm", [0, 0.0, -1, -math.inf, math.nan, True, "2", None, 1j, 10**400]),
        ("dim", [0.0, True, "0", 1j, torch.tensor(0)]),
        ("unit", ["head", "", None, 1, ["outer"]]),
        ("reduce", ["prod", "", None, 1, ["sum"]]),
        ("align", [0, -8, 8.0, True, "8", None]),
        ("min_keep", [0, -1, 1.0, True, "1", None]),
    ],
)
def test_bad_settings_of_channels(setting: str, values: list[Any]) -> None:
    for value in values:
        refused(lambda value=value: Channels(0.5, **{setting: value}), repr(value), f"Channels({setting}=...)")


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("norm", [1, 2, 0.5, 3.5, math.inf, np.float32(2), np.int64(1)]),
        ("dim", [None, 0, -1, 5, np.int64(1)]),
        ("unit", ["outer", "inner", "mixed"]),
        ("reduce", ["sum", "mean", "max"]),
        ("align", [1, 8, np.int64(16)]),
        ("min_keep", [1, 5, np.int64(2)]),
    ],
)
def test_good_settings_of_channels(setting: str, values: list[Any]) -> None:
    kept = [getattr(Channels(0.5, **{setting: value}), setting) for value in values]
    assert kept == values
    assert not any(isinstance(value, np.generic) for value in kept)


def test_patterns_are_values() -> None:
    assert Channels(0.5, 1) == Channels(0.5, 1.0) != Channels(0.5)
    assert hash(Channels(0.5, 1)) == hash(Channels(0.5, 1.0))
    channels = Channels(0.5)
    with pytest.raises(AttributeError):
        channels.amount = 0.4  # pyright: ignore[reportAttributeAccessIssue]


def test_kinds_are_unlike() -> None:
    names = ["unstructured", "semistructured", "blocks", "existing", "channels"]
    assert dict(zip(names, [Unstructured, SemiStructured, Blocks, Existing, Channels], strict=True)) == SPARSITIES


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        (Channels(0.3), "30% of channels by L2 norm"),
        (Channels(0.29, norm=1), "29% of channels by L1 norm"),
        (Channels(1, norm=math.inf), "1 channel by Linf norm"),
        (Channels(3, dim=0, unit="inner"), "3 channels by L2 norm, dim 0, unit inner"),
        (
            Channels(0.5, 0.5, -1, "mixed", "mean", 4, 2),
            "50% of channels by L0.5 norm, dim -1, unit mixed, reduce mean, align 4, min_keep 2",
        ),
    ],
)
def test_channels_in_words(channels: Channels, words: str) -> None:
    assert channels.describe() == words


@pytest.mark.parametrize(
    ("amount", "size", "multiple", "kept"),
    [
        (0.5, 64, 8, 32),
        (0.3, 64, 8, 48),  # 45 is nearer to 48 than to 40
        (0.25, 16, 8, 16),  # 12 is as near to 8 as to 16
        (0.1, 14, 8, 14),  # 13 is nearest to 16, which is more than there are
        (0.5, 12, 8, 8),
        (0.99, 64, 8, 8),
        (0.99, 64, 1, 1),
        (0.25, 4, 8, 3),  # four units cannot be aligned to 8
        (0.05, 10, 1, 10),  # 0.5 rounds to 0, as in torch
        (0.15, 10, 1, 8),  # 1.5 rounds to 2
        (0.04, 10, 8, 10),  # nothing to remove: 10 is not aligned to 8
        (5, 64, 8, 56),  # 59 is nearer to 56
        (64, 64, 8, 8),
        (1000, 64, 1, 1),
        (0.5, 0, 8, 0),
        (0.5, 1, 8, 1),
        (0.9, 1, 8, 1),
    ],
)
def test_keep_count(amount: float, size: int, multiple: int, kept: int) -> None:
    assert Channels(amount).keep_count(size, multiple) == kept


def test_min_keep() -> None:
    assert Channels(0.9, min_keep=10).keep_count(64) == 10
    assert Channels(0.9, min_keep=10).keep_count(64, 8) == 16  # aligned, and no fewer than asked
    assert Channels(0.9, min_keep=10).keep_count(6) == 6
    assert Channels(0.9, min_keep=3).keep_count(6, 8) == 3


@given(amounts, sizes, multiples, least)
def test_keep_count_is_the_nearest_that_is_allowed(
    amount: int | float, size: int, multiple: int, min_keep: int
) -> None:
    """Against the definition, spelled out as a search over every count that is allowed."""
    how = Channels(amount, min_keep=min_keep)
    removed = amount if isinstance(amount, int) else round(amount * size)
    step = multiple if multiple <= size else 1
    allowed = [k for k in range(step, size + min_keep + 2 * step, step) if k >= min_keep]
    nearest = min(allowed, key=lambda k: (abs(k - (size - removed)), -k))
    assert how.keep_count(size, multiple) == (min(nearest, size) if removed else size)


@given(amounts, sizes, multiples, least)
def test_keep_count_stays_in_its_bounds(amount: int | float, size: int, multiple: int, min_keep: int) -> None:
    kept = Channels(amount, min_keep=min_keep).keep_count(size, multiple)
    floor = max(min_keep, multiple if size >= multiple else min_keep)
    assert type(kept) is int and min(size, floor) <= kept <= size
    assert kept == size or size < multiple or kept % multiple == 0


@given(st.one_of(st.tuples(fractions, fractions), st.tuples(st.integers(0), st.integers(0))), sizes, multiples, least)
def test_more_asked_never_keeps_more(
    pair: tuple[int | float, int | float], size: int, multiple: int, min_keep: int
) -> None:
    less, more = (Channels(amount, min_keep=min_keep).keep_count(size, multiple) for amount in sorted(pair))
    assert more <= less


@given(st.sampled_from([0, 0.0]), sizes, multiples, least)
def test_amount_zero_keeps_everything(amount: int | float, size: int, multiple: int, min_keep: int) -> None:
    assert Channels(amount, min_keep=min_keep).keep_count(size, multiple) == size


@given(fractions, sizes)
def test_fractions_count_as_in_torch(amount: float, size: int) -> None:
    count = Channels(amount).count(size)
    assert count == Unstructured(amount).count(size) == torch.nn.utils.prune._compute_nparams_toprune(amount, size)
    exact = Fraction(amount * size)
    assert abs(count - exact) <= Fraction(1, 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda a: Unstructured(0.5, per_row=a), [1, "yes", None]),
        (lambda a: Channels(0.5, uniform=a), [1, "yes", None]),
        (lambda a: SemiStructured(a, 4), [0, -1, 4, 5, True, 2.0, "2", None]),
        (lambda a: SemiStructured(1, a), [0, 1, 17, True, 4.0, None]),
        (lambda a: SemiStructured(score=a), ["l7", None]),
        (lambda a: Blocks(a), [-0.1, 1.1, -1, True, "0.5", None, math.nan]),
        (lambda a: Blocks(0.5, a), [32, "32", (32,), (1, 2, 3), (0, 4), (4, -1), (4.0, 4), (True, 4), None]),
        (lambda a: Blocks(0.5, norm=a), [0, -1, math.nan, "2", None, True, 10**400]),
        (lambda a: Blocks(0.5, score=a), ["l7", None]),
    ],
)
def test_bad_settings_of_groups_and_tiles(make: Callable[[Any], object], words: list[Any]) -> None:
    for value in words:
        refused(lambda value=value: make(value))


def test_what_messages_name() -> None:
    anything: Any = "yes"
    refused(lambda: Unstructured(0.5, per_row=anything), "Unstructured(per_row=...)", "'yes'")
    refused(lambda: SemiStructured(4, 4), "n 4", "m=4", "everything", "1 to 3")
    refused(lambda: SemiStructured(2, 32), "SemiStructured(m=...)", "32", "2 to 16")
    refused(lambda: Blocks(0.5, (16, 0)), "Blocks(shape=...)", "0", "1 or more")
    refused(lambda: Blocks(1.5), "Blocks(amount=...)", "tiles")
    refused(lambda: Blocks(0.5, norm=0), "Blocks(norm=...)")


def test_groups_and_tiles_are_values() -> None:
    shape: Any = [8, 4]
    assert Blocks(0.5, shape) == Blocks(0.5, (8, 4)) != Blocks(0.5)
    assert hash(Blocks(0.5, shape)) == hash(Blocks(0.5, (8, 4)))
    assert SemiStructured() == SemiStructured(2, 4) != SemiStructured(4, 8)
    assert Unstructured(0.5) == Unstructured(0.5, per_row=False) != Unstructured(0.5, per_row=True)
    assert Blocks(0.5).count(5) == 2 and Blocks(1.0).count(5) == 5 and Blocks(7).count(5) == 7


@pytest.mark.parametrize(
    ("sparsity", "words"),
    [
        (Unstructured(0.5, per_row=True), "50% by l1, every row alike"),
        (Unstructured(3, per_row=True), "3 elements by l1, every row alike"),
        (Channels(0.5, uniform=True), "50% of channels by L2 norm, uniform"),
        (SemiStructured(), "2:4 by l1"),
        (SemiStructured(3, 16, "random"), "3:16 by random"),
        (Blocks(0.9), "90% of 32x32 tiles by L2 norm"),
        (Blocks(3, (1, 8), math.inf, "random"), "3 1x8 tiles by Linf norm of random"),
    ],
)
def test_groups_and_tiles_in_words(sparsity: Sparsity, words: str) -> None:
    assert sparsity.describe() == words


@pytest.mark.parametrize(
    ("sparsity", "shape", "inputs", "words"),
    [
        (SemiStructured(), (3, 8), 1, ""),
        (SemiStructured(), (3, 8), 0, "its 3 inputs are no multiple of 4"),
        (SemiStructured(), (8, 3), 0, ""),
        (SemiStructured(), (3, 2, 2, 1), 1, "its 2 inputs are no multiple of 4"),
        (SemiStructured(), (3, 0), 1, ""),
        (Blocks(0.5, (3, 4)), (3, 8), 1, ""),
        (Blocks(0.5, (3, 4)), (8, 6), 0, ""),
        (Blocks(0.5, (3, 4)), (8, 6), 1, "its 8 outputs are no multiple of 3"),
        (Blocks(0.5, (3, 4)), (6, 6, 2), 1, "its 6 inputs are no multiple of 4"),
        (Unstructured(0.5, per_row=True), (7, 5, 3), 1, ""),
    ],
)
def test_what_does_not_fit(sparsity: Any, shape: tuple[int, ...], inputs: int, words: str) -> None:
    assert sparsity.misfit(shape, inputs) == words
