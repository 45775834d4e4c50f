"""The accuracy benchmark's sentence encoder: MiniLM-L6 with its real weights, which finds a BBC story by its headline.

The score is that of the demo: each of 800 headlines is searched among the first 64 tokens of 800 stories.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy_case import Batch, Plans, call, check_count, check_split, endless, shuffled
from benchmarks.accuracy_text import Stories, split_stories
from fxprune.cli.demo_data import (
    BODY_TOKENS,
    TITLE_TOKENS,
    Document,
    Tokenizer,
    load_documents,
    load_minilm,
    mean_cosine,
    recall_at_1,
)
from fxprune.plan.patterns import Channels, Unstructured
from fxprune.plan.plan import Plan, Rule

ROWS = 32
SHORT_ROWS = 64  # short texts in a batch of `recovery`, beside WINDOW_ROWS windows
WINDOW_ROWS = 24
SHORT_TOKENS = 16

Embeddings = dict[str, Tensor]


def unstructured(amount: float) -> Callable[[], Plan]:
    """Each of the 36 linear layers of the encoder loses this share of its weights."""
    return lambda: Plan([Rule("encoder.*.weight", Unstructured(amount))])


def two_of_four() -> Plan:
    """Each of the 36 linear layers keeps two of every four weights along its inputs."""
    from fxprune.plan.patterns import SemiStructured

    return Plan([Rule("encoder.*.weight", SemiStructured(2, 4))])


def structured(neurons: float, heads: float = 0.0) -> Callable[[], Plan]:
    """Each layer loses this share of its feed-forward neurons and of its 12 attention heads."""
    rules = [Rule("encoder.layer.*.intermediate.dense.weight", Channels(neurons))]
    if heads:
        rules.append(Rule("encoder.layer.*.attention.self.*.weight", Channels(heads, unit="outer")))
    return lambda: Plan(rules)


PLANS: Plans = {
    "50%": unstructured(0.5),
    "2:4": two_of_four,
    **{f"{amount:.0%}": unstructured(amount) for amount in (0.6, 0.7, 0.8, 0.9)},
    "half FFN": structured(0.5),
    "75% FFN": structured(0.75),
    "half FFN + half heads": structured(0.5, 0.5),
    "75% FFN + half heads": structured(0.75, 0.5),
}


# Of the 886 that there are; on the development split 80% zeros keep a cosine of .87 with so many, and .845 with 256.
CALIBRATION = 640


@dataclass(frozen=True)
class MiniLm:
    """MiniLM on BBC News. Batches are `{"input_ids": [b, s], "attention_mask": [b, s]}`.

    `width` is that of the headlines' batches: 64 gives every calibration batch one shape; 32, the smallest, takes less
    time. The mask says what is padding. `score` runs texts of equal length together, without padding, unless `padded`,
    which pads them all to 64 tokens: for a model that was captured at that width.
    """

    width: int = TITLE_TOKENS
    padded: bool = False
    documents: Sequence[Document] | None = None
    loader: Callable[[], tuple[nn.Module, Tokenizer]] = load_minilm
    evaluation: int = 800
    development: int = 400
    name: str = "minilm"
    metric: str = "R@1"
    lower_is_better: bool = False

    @property
    def loss(self) -> Callable[[Any, Any], Tensor]:
        """The distance of the embeddings that the score reads off the hidden states."""
        return embedding_loss

    @property
    def plans(self) -> Plans:
        """Unstructured from 50% to 90%, 2:4, and neurons and heads that leave."""
        return PLANS

    @property
    def sample(self) -> str:
        """On what a figure was calibrated and scored."""
        return f"calibrated on {CALIBRATION} BBC stories and their headlines, scored on {self.evaluation} others"

    @cached_property
    def loaded(self) -> tuple[nn.Module, Tokenizer]:
        """The encoder and its tokenizer."""
        return self.loader()

    @cached_property
    def stories(self) -> Stories:
        """The stories of each part."""
        documents = load_documents() if self.documents is None else self.documents
        return split_stories(documents, self.evaluation, self.development)

    @cached_property
    def dense_embeddings(self) -> dict[str, Embeddings]:
        """Split -> the dense model's embeddings, filled as splits are scored."""
        return {}

    def model(self) -> nn.Module:
        """Return the encoder without its pooler, in eval mode."""
        return self.loaded[0]

    def calibration(self, seed: int, count: int | None = None) -> list[Batch]:
        """Return the bodies and the headlines of `count` stories (640 if not given), 32 texts a batch."""
        rest = self.stories.rest
        count = check_count(CALIBRATION if count is None else count, rest, "stories")
        chosen = [rest[n] for n in shuffled(len(rest), seed)[:count]]
        bodies = self.tokens([story.body for story in chosen], BODY_TOKENS)
        titles = self.tokens([story.title for story in chosen], TITLE_TOKENS)
        return [*in_batches(bodies, ROWS, BODY_TOKENS), *in_batches(titles, ROWS, self.width)]

    def recovery(self, seed: int) -> Iterator[Batch]:
        """Yield 24 windows of 64 tokens, then 64 short texts of one length, and so on, without padding: every window of
        the other stories, their headlines and the beginnings of their sentences."""
        windows, short = self.recovery_texts
        of_windows = endless(len(windows), min(WINDOW_ROWS, len(windows)), seed)
        of_short = of_one_length(short, SHORT_ROWS, seed + 1)
        while True:
            for texts in ([windows[n] for n in next(of_windows)], next(of_short)):
                yield padded(texts, len(texts[0]))

    @cached_property
    def recovery_texts(self) -> tuple[list[list[int]], list[list[int]]]:
        """The windows of 64 tokens and the short texts of all stories that are in no split."""
        tokenizer = self.loaded[1]
        rest = self.stories.rest
        inner = BODY_TOKENS - 2
        windows = []
        for ids in tokenizer([story.body for story in rest])["input_ids"]:
            first, *body, last = ids
            whole = range(0, len(body) - inner + 1, inner)
            windows += [[first, *body[start : start + inner], last] for start in whole]
        sentences = [line.split(". ")[0] for story in rest for line in story.body.split("\n") if line.strip()]
        beginnings = [ids for ids in self.tokens(sentences, SHORT_TOKENS) if len(ids) >= 6]
        return windows, self.tokens([story.title for story in rest], TITLE_TOKENS) + beginnings

    def tokens(self, texts: Sequence[str], most: int) -> list[list[int]]:
        """Return each text's tokens, cut to `most`, with the marks of its beginning and end."""
        return self.loaded[1](list(texts), truncation=True, max_length=most)["input_ids"]

    @cached_property
    def scored_tokens(self) -> Mapping[str, tuple[list[list[int]], list[list[int]]]]:
        """Split -> the tokens of its headlines and of its bodies."""
        parts = {"evaluation": self.stories.evaluation, "development": self.stories.development}
        return {
            split: (
                self.tokens([s.title for s in part], TITLE_TOKENS),
                self.tokens([s.body for s in part], BODY_TOKENS),
            )
            for split, part in parts.items()
        }

    def embeddings(self, model: Callable[..., Any], split: str) -> Embeddings:
        """Return the embeddings `[n, d]`, at length 1, of the headlines and bodies of a split."""
        titles, bodies = self.scored_tokens[check_split(split)]
        width = BODY_TOKENS if self.padded else None
        return {"titles": embed(model, titles, width), "bodies": embed(model, bodies, width)}

    def score(self, model: Callable[..., Any], split: str) -> dict[str, float]:
        """Return R@1, and the mean cosine between the embeddings and the dense model's, over bodies and headlines."""
        if check_split(split) not in self.dense_embeddings:
            self.dense_embeddings[split] = self.embeddings(self.model(), split)
        dense, found = self.dense_embeddings[split], self.embeddings(model, split)
        cosines = {f"cos {part}": mean_cosine(found[part], dense[part]) for part in found}
        recall = recall_at_1(found["titles"], found["bodies"])
        return {"R@1": recall, "cos": sum(cosines.values()) / len(cosines), **cosines}


def padded(texts: Sequence[Sequence[int]], width: int) -> dict[str, Tensor]:
    """Return texts of up to `width` tokens as one batch `[n, width]` and the mask that says what is no padding."""
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def of_one_length(texts: Sequence[list[int]], rows: int, seed: int) -> Iterator[list[list[int]]]:
    """Yield up to `rows` texts of one length at a time, each length as often as it is there."""
    waiting: dict[int, list[list[int]]] = {}
    counts = Counter(len(text) for text in texts)
    for (index,) in endless(len(texts), 1, seed):
        length = len(texts[index])
        mine = waiting.setdefault(length, [])
        mine.append(texts[index])
        if len(mine) == min(rows, counts[length]):
            yield waiting.pop(length)


def embedding_loss(found: Any, wanted: Any) -> Tensor:
    """The mean squared difference of the embeddings of texts without padding, over the variance of the dense ones.

    Both are what a model returns, hidden states `[n, s, d]` first.
    """
    pruned, dense = (nn.functional.normalize(side[0].mean(1), dim=-1) for side in (found, wanted))
    return (pruned - dense).square().mean() / dense.var(correction=0)


def in_batches(texts: Sequence[Sequence[int]], rows: int, width: int) -> list[Batch]:
    """Return texts as batches `[rows, width]`; the last one may have fewer rows."""
    return [padded(texts[start : start + rows], width) for start in range(0, len(texts), rows)]


def embed(model: Callable[..., Any], texts: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
    """Return embeddings `[n, d]` at length 1: hidden states averaged over a text's tokens.

    Texts of equal length run together; with `width` they run in the order given, padded to it.
    """
    lengths = sorted({len(text) for text in texts}) if width is None else [width]
    found: list[tuple[int, Tensor]] = []
    with torch.no_grad():
        for length in lengths:
            members = [n for n, text in enumerate(texts) if width is not None or len(text) == length]
            rows = ROWS if width is not None else max(ROWS, ROWS * BODY_TOKENS // length)
            for start in range(0, len(members), rows):
                chosen = members[start : start + rows]
                batch = padded([texts[n] for n in chosen], length)
                hidden = call(model, batch)[0]
                weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                found += zip(chosen, (hidden * weight).sum(1) / weight.sum(1))
    rows_in_order = [row for _, row in sorted(found, key=lambda pair: pair[0])]
    return nn.functional.normalize(torch.stack(rows_in_order), dim=-1)
