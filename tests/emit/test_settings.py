"""mode= and options=: read once, refused in words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune.emit.settings import Settings
from fxprune.errors import InputError


def test_defaults_and_values() -> None:
    assert Settings.read(None, {"measure": True}) == Settings()
    read = Settings.read("max-autotune", {"tune_for": [1, 8], "layout": "dense", "freezing": False})
    assert read.tune_for == (1, 8) and read.layout == "dense" and read.mode == "max-autotune"
    options = read.inductor_options()
    assert options is not None and options["max_autotune"] is True
    assert "freezing" not in options and Settings().inductor_options() == {"freezing": True}
    assert Settings.read(None, {"compile": False}).inductor_options() is None


@pytest.mark.parametrize("trainable", [False, True])
def test_what_was_asked_for_in_vain_is_told(trainable: bool) -> None:
    options = {"dtype": "bfloat16", "tune_for": [1, 2], "masked_matmul": True, "compile": False, "measure": False}
    torch.manual_seed(0)
    model = nn.Linear(4, 4).eval()
    result = fxprune.transform(model, None, (torch.randn(2, 4),), trainable=trainable, options=options)
    names = "dtype, tune_for" if trainable else "masked_matmul"
    assert f"what was asked for by {names} does nothing for such a result" in result.report.notes
    plain = fxprune.transform(
        model, None, (torch.randn(2, 4),), trainable=trainable, options={"compile": False, "measure": False}
    )
    assert not any("asked for by" in note for note in plain.report.notes)


def test_a_variable_says_whether_whole_models_are_timed_and_options_have_the_last_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FXPRUNE_MEASURE", "0")
    assert not Settings.read(None, None).measure and Settings.read(None, {"measure": True}).measure
    monkeypatch.delenv("FXPRUNE_MEASURE")
    assert Settings.read(None, None).measure


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("max-autotun", None, "unknown mode 'max-autotun'. Did you mean 'max-autotune'"),
        (None, {"tunefor": 1}, "unknown option 'tunefor'. Did you mean 'tune_for'"),
        (None, {"layout": "nonzero"}, "unknown layout 'nonzero'. Did you mean 'nonzeros'"),
        (None, {"freezing": 1}, "it is not True or False"),
        (None, {"constant_weights": "no"}, "it is not True or False"),
        (None, {"tune_for": [0]}, "each at least 1"),
        (None, {"tune_for": [True]}, "each at least 1"),
        (None, {"tune_for": "8"}, "each at least 1"),
    ],
)
def test_what_is_unknown_is_refused(mode: str | None, options: dict[str, object] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings.read(mode, options)
