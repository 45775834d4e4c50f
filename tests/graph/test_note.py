"""Note: a sentence with a level, which survives whatever a report goes through."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from fxprune.graph.note import Note, some
from fxprune.select.selection import Selection


def test_a_note_is_its_sentence() -> None:
    note = Note("every size is fixed", "fallback")
    assert note == "every size is fixed" and f"- {note}" == "- every size is fixed" and "fixed" in note
    assert note.level == "fallback" and Note("so it is").level == "info"


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda note: pickle.loads(pickle.dumps(note))])
def test_copies_keep_the_level(again: object) -> None:
    note = again(Note("it stays", "missed"))  # pyright: ignore[reportCallIssue]
    assert note == "it stays" and note.level == "missed"


def test_a_saved_selection_keeps_its_notes(tmp_path: Path) -> None:
    torch.save(Selection(notes=(Note("chosen by norm", "fallback"),)), tmp_path / "selection.pt")
    found = torch.load(tmp_path / "selection.pt", weights_only=True)
    assert found.notes == ("chosen by norm",) and found.notes[0].level == "fallback"


def test_the_first_names_stand_for_many() -> None:
    assert some(["a", "b", "c"]) == "a, b, c" and some(["a", "b", "c", "d", "e"]) == "a, b, c, ..." and some([]) == ""
