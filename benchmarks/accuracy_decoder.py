"""The accuracy benchmark's causal decoder: a Llama of two million parameters, trained here for minutes on BBC stories.

Its tokens are MiniLM's word pieces, the most frequent of them; its score is the perplexity on stories it never saw.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.accuracy_case import Batch, Plans, check_count, check_split, endless, shuffled, trained
from benchmarks.accuracy_text import Stories, split_stories
from fxprune.cli.demo_data import Document, Tokenizer, load_documents, load_minilm, mean_cosine
from fxprune.plan.patterns import Unstructured
from fxprune.plan.plan import Plan, Rule

UNKNOWN = 0


@dataclass(frozen=True)
class Size:
    """The decoder's sizes; it is trained for `steps` steps of `rows` windows of `tokens` tokens."""

    vocabulary: int = 4096
    width: int = 192
    layers: int = 4
    heads: int = 6
    hidden: int = 512
    tokens: int = 128
    steps: int = 600
    rows: int = 16
    rate: float = 3e-3


class Norm(nn.Module):
    """Root mean square normalisation over the last axis (Zhang and Sennrich 2019): x [..., d] -> [..., d]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return x over its root mean square, scaled."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Causal attention with rotary positions (Su et al. 2021) and no biases: x [b, s, d] -> [b, s, d]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return what each position gathers from itself and those before it; cosine and sine are [s, d / heads]."""
        b, s, d = x.shape
        q, k, v = (
            project(x).view(b, s, self.heads, -1).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        gathered = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(gathered.transpose(1, 2).reshape(b, s, d))


class Layer(nn.Module):
    """Attention and a gated feed-forward part (SwiGLU, Shazeer 2020), each around its norm: x [b, s, d] alike."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = Norm(width), Norm(width)
        self.attention = Attention(width, heads)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return the layer's output."""
        x = x + self.attention(self.attention_norm(x), cosine, sine)
        fed = self.feed_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(fed)) * self.up_proj(fed))


class Decoder(nn.Module):
    """Tokens `ids [b, s]` -> logits `[b, s, vocabulary]`, in the shape of Llama (Touvron et al. 2023).

    The classifier is the embedding, transposed. `s` is at most `size.tokens`.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.layers = nn.ModuleList([Layer(size.width, size.heads, size.hidden) for _ in range(size.layers)])
        self.norm = Norm(size.width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        half = size.width // size.heads // 2
        angles = torch.outer(torch.arange(size.tokens), 10000.0 ** (-torch.arange(half) / half)).repeat(1, 2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of each position's next token."""
        s = ids.shape[1]
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, self.cosine[:s], self.sine[:s])
        return F.linear(self.norm(x), self.embedding.weight)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs (n, n + d/2) of `x [b, h, s, d]` by their position's angles, given as cosine and sine [s, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def train(model: nn.Module, windows: Tensor, size: Size) -> None:
    """Train in place on `windows [n, s]` by AdamW (Loshchilov and Hutter 2019), warmed up and then falling linearly."""
    optimizer = torch.optim.AdamW(model.parameters(), size.rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, size.steps // 20)
    rate = lambda step: min((step + 1) / warm, max(0.05, 1 - step / size.steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    batches = endless(len(windows), size.rows, seed=0)
    bar = tqdm(range(size.steps), desc="train the decoder", unit="step", disable=None)
    for _ in bar:
        ids = windows[next(batches)]
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(perplexity=f"{math.exp(loss.item()):.0f}", refresh=False)


def unstructured(amount: float) -> Callable[[], Plan]:
    """Each linear layer of the decoder loses this share of its weights; the embedding, its classifier, stays."""
    return lambda: Plan([Rule("layers.*_proj.weight", Unstructured(amount))])


PLANS: Plans = {f"{amount:.0%}": unstructured(amount) for amount in (0.5, 0.7, 0.8)}


@dataclass(frozen=True)
class Causal:
    """The decoder on BBC News: 120 stories to evaluate, 60 to develop on, the others to train and calibrate on."""

    cache: Path
    documents: Sequence[Document] | None = None
    tokenizer: Callable[[], Tokenizer] = lambda: load_minilm()[1]
    size: Size = field(default_factory=Size)
    evaluation: int = 120
    development: int = 60
    name: str = "decoder"
    metric: str = "perplexity"
    lower_is_better: bool = True
    loss: Callable[[Any, Any], Tensor] | None = None

    @property
    def plans(self) -> Plans:
        """50%, 70% and 80% of every linear layer's weights."""
        return PLANS

    @property
    def sample(self) -> str:
        """On what a figure was calibrated and scored."""
        tokens, held = self.size.tokens, self.evaluation
        return f"calibrated on 128 windows of {tokens} tokens of BBC stories it was trained on, scored on {held} others"

    @cached_property
    def windows(self) -> dict[str, Tensor]:
        """Part -> its stories one after the other, cut into windows `[n, tokens]`."""
        stories: Stories = split_stories(
            load_documents() if self.documents is None else self.documents, self.evaluation, self.development
        )
        tokenizer = self.tokenizer()
        parts = {"training": stories.rest, "development": stories.development, "evaluation": stories.evaluation}
        texts = {
            part: [
                token for ids in tokenizer([f"{d.title}\n{d.body}" for d in documents])["input_ids"] for token in ids
            ]
            for part, documents in parts.items()
        }
        frequent = Counter(texts["training"]).most_common(self.size.vocabulary - 1)
        index = {token: n + 1 for n, (token, _) in enumerate(frequent)}
        found = {}
        for part, tokens in texts.items():
            kept = torch.tensor([index.get(token, UNKNOWN) for token in tokens])
            windows = len(kept) // self.size.tokens
            found[part] = kept[: windows * self.size.tokens].view(windows, self.size.tokens)
        return found

    @cached_property
    def dense(self) -> nn.Module:
        """The trained decoder."""
        windows = self.windows["training"]
        recipe = f"{self.size} on {len(windows)} windows"
        build, fit = (lambda: Decoder(self.size)), (lambda model: train(model, windows, self.size))
        return trained(self.cache / "decoder.pt", recipe, build, fit)

    @cached_property
    def dense_logits(self) -> dict[str, Tensor]:
        """Split -> the dense decoder's logits on its first windows, filled as splits are scored."""
        return {}

    def model(self) -> nn.Module:
        """Return the trained decoder in eval mode."""
        return self.dense

    def calibration(self, seed: int, count: int | None = None) -> list[Batch]:
        """Return `count` windows (128 if not given) of the training stories, 16 a batch `[16, tokens]`."""
        windows = self.windows["training"]
        count = check_count(128 if count is None else count, len(windows), "windows")
        return list(windows[shuffled(len(windows), seed)[:count]].split(self.size.rows))

    def recovery(self, seed: int) -> Iterator[Batch]:
        """Yield windows of the training stories, 16 a batch."""
        windows = self.windows["training"]
        for chosen in endless(len(windows), self.size.rows, seed):
            yield windows[chosen]

    def score(self, model: Callable[..., Any], split: str) -> dict[str, float]:
        """Return the perplexity of each next token, and the mean cosine of the logits and the dense decoder's.

        The cosine is that of the first 16 windows, so that the logits of all need not be kept.
        """
        parts = self.windows[check_split(split)].split(self.size.rows)
        with torch.no_grad():
            if split not in self.dense_logits:
                self.dense_logits[split] = self.dense(parts[0])
            total, count = 0.0, 0
            for ids in parts:
                given = model(ids)
                wanted = ids[:, 1:].flatten()
                total += F.cross_entropy(given[:, :-1].flatten(0, 1), wanted, reduction="sum").item()
                count += len(wanted)
            cosine = mean_cosine(model(parts[0]).flatten(0, 1), self.dense_logits[split].flatten(0, 1))
        return {"perplexity": math.exp(total / count), "cos": cosine}
