"""A slice of the changed files, and whether the judge sees what is planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from benchmarks import fuzz_files, fuzz_files_change
from benchmarks.fuzz_files_child import one
from fxprune.files.container import read


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    fuzz_files.make_originals(folder)
    return folder


def test_a_slice_has_no_faults(tmp_path: Path) -> None:
    given = ["--cases", "160", "--jobs", "1", "--first-seed", "50000", "--results", str(tmp_path), "--no-progress"]
    assert fuzz_files.main(given) == 0
    figures = json.loads((tmp_path / "fuzz_files.json").read_text())
    assert figures["cases"] == 160 and not figures["faults"] and figures["outcomes"]["refused"] > 40


def test_a_change_can_be_made_again(originals: Path, tmp_path: Path) -> None:
    original = originals / "nonzeros.safetensors" if (originals / "nonzeros.safetensors").exists() else None
    original = original or originals / "dense.safetensors"
    for seed in range(20):
        first, second = tmp_path / "first", tmp_path / "second"
        torch.manual_seed(0)
        told = fuzz_files_change.changed(original, first, seed)
        torch.manual_seed(0)
        assert fuzz_files_change.changed(original, second, seed) == told
        if told[0].startswith("bytes"):
            assert first.read_bytes() == second.read_bytes()
        else:  # The library writes the header's texts in any order.
            (document, tensors), (other, others) = read(first), read(second)
            assert document == other and tensors.keys() == others.keys()
            assert all(torch.equal(tensor.nan_to_num(), others[name].nan_to_num()) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "plant, outcome", [("another answer", "wrong answer"), ("an error", "wrong error"), ("a refusal", "refused")]
)
def test_the_judge_sees_what_is_planted(
    plant: str, outcome: str, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = originals / "dense.safetensors"
    call = torch.load(originals / "dense.pt")
    result: Any = fxprune.load(original, progress=False)

    def load(*_: Any, **__: Any) -> Any:
        if plant == "an error":
            raise KeyError("x")
        if plant == "a refusal":
            raise fxprune.errors.FileError("cannot load")
        result.get_parameter("0.weight").data.add_(1.0)
        return result

    monkeypatch.setattr(fxprune, "load", load)
    seed = next(seed for seed in range(99) if fuzz_files_change.changed(original, tmp_path / "x", seed)[1])
    assert one(original, tmp_path / "changed", seed, call, lambda _: None)["outcome"] == outcome
