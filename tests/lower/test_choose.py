"""The choice of a layout by what was measured. Times here are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fxprune.lower.layouts import LAYOUTS, choose
from fxprune.lower.layouts.choose import MARGIN, Chooser
from fxprune.lower.layouts.site import Choice, Site
from fxprune.measure.timing import Samples

WEIGHT = torch.randn(64, 64) * (torch.rand(64, 64) < 0.1)


def site(*tokens: int) -> Site:
    return Site("weight", "node", WEIGHT, None, tokens, "")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Choice]:
    """What is chosen by these seconds for each number of tokens: of two dense forms, and packed."""
    monkeypatch.setattr(choose, "LAYOUTS", {"nonzeros": LAYOUTS["nonzeros"]})
    monkeypatch.setattr(choose, "best_dense", lambda site, x: [lambda: x, lambda: x])

    def choice(*seconds: Sequence[float]) -> Choice:
        taken = iter(seconds)
        monkeypatch.setattr(choose, "_times", lambda *_: list(next(taken)))
        return Chooser().choose(site(*range(1, 1 + len(seconds))))[0]

    return choice


def test_a_layout_that_clearly_wins_is_taken(chosen: Callable[..., Choice]) -> None:
    choice = chosen((3.0, 3.0, 1.0), (3.0, 3.0, 2.0))
    assert choice.layout == "nonzeros" and "2.12x dense at 1/2 tokens" in choice.why


def test_a_layout_that_hardly_wins_is_refused(chosen: Callable[..., Choice]) -> None:
    assert MARGIN > 1.0 and chosen((1.0, 1.0, 1.0)).layout == "dense"
    choice = chosen((1.02, 1.02, 1.0))
    assert choice.layout == "dense" and "1.02x dense" in choice.refused["nonzeros"]


def test_a_layout_that_loses_at_one_size_is_refused(chosen: Callable[..., Choice]) -> None:
    """However much it wins at the others."""
    assert chosen((9.0, 9.0, 1.0), (1.0, 1.0, 1.1)).layout == "dense"
    assert chosen((1.0, 1.0, 1.1), (9.0, 9.0, 1.0)).layout == "dense"


def test_the_faster_dense_form_is_what_a_layout_must_beat(chosen: Callable[..., Choice]) -> None:
    for dense in ((4.0, 1.0), (1.0, 4.0)):
        assert chosen((*dense, 2.0)).layout == "dense"
        assert chosen((*dense, 0.5)).layout == "nonzeros"


def test_what_was_measured_at_other_sizes_is_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "LAYOUTS", {"nonzeros": LAYOUTS["nonzeros"]})
    monkeypatch.setattr(choose, "_times", lambda functions, *_: [2.0] * (len(functions) - 1) + [1.0])
    chooser = Chooser()
    assert [chooser.choose(site(*tokens))[0].reused for tokens in ((1,), (8,), (1, 8), (8,))] == [False] * 3 + [True]


@pytest.mark.parametrize(("model_bytes", "layout"), [(1000, "nonzeros"), (1001, "dense")])
def test_a_layer_is_timed_with_its_weights_in_the_cache_where_the_whole_model_fits(
    model_bytes: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interleave(functions: Sequence[Callable[[], Tensor]], **_: object) -> list[Samples]:
        dense = [Samples([2.0], [1.0]) for _ in functions[:-1]]
        return [*dense, Samples([1.0], [2.0])]

    monkeypatch.setattr(choose, "LAYOUTS", {"nonzeros": LAYOUTS["nonzeros"]})
    monkeypatch.setattr(choose, "interleave", interleave)
    monkeypatch.setattr(choose, "cache_bytes", lambda: 1000)
    assert Chooser(model_bytes=model_bytes).choose(site(4))[0].layout == layout
