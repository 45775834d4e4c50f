"""A plan knows the names of scores, select their arithmetic: the two lists are one."""

from __future__ import annotations

import pytest
import torch

from fxprune.plan.channels import Channels
from fxprune.plan.patterns import Unstructured
from fxprune.plan.scores import SCORE_NAMES, UNIT_SCORE_NAMES
from fxprune.select.score import PIECEWISE, SCORES
from fxprune.select.unit_score import RELATIVE, UNIT_SCORES, Slices


def test_every_name_has_its_arithmetic() -> None:
    assert tuple(SCORES) == SCORE_NAMES and tuple(UNIT_SCORES) == UNIT_SCORE_NAMES
    assert set(SCORES) >= PIECEWISE and set(UNIT_SCORES) >= set(RELATIVE)


@pytest.mark.parametrize("name", SCORE_NAMES)
def test_every_name_of_an_element_score_can_be_planned_and_computed(name: str) -> None:
    assert Unstructured(0.5, score=name).score == name
    scored = SCORES[name](torch.randn(3, 4))
    assert scored.shape == (3, 4) and bool((scored >= 0).all())


@pytest.mark.parametrize("name", UNIT_SCORE_NAMES)
def test_every_name_of_a_unit_score_can_be_planned_and_computed(name: str) -> None:
    how = Channels(0.5, score=name)
    assert how.score == name
    scored = UNIT_SCORES[name]([Slices("w", torch.randn(3, 4), 0, torch.arange(3))], how)
    assert scored.shape == (3,) and bool((scored >= 0).all())
