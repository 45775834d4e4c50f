"""The CPU benchmark's models that read text: encoders, and a decoder's step of one token."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cpu_model import CpuModel
from benchmarks.zoo_vision import define_operators

PAST = 128


def language_models() -> list[CpuModel]:
    """MiniLM at three lengths, BERT-base and GPT-2 small: their shapes, with weights drawn."""
    minilm = [_bert(f"minilm-{length}", length, 384, 6) for length in (32, 128, 512)]
    return [*minilm, _bert("bert-base", 128, 768, 12), CpuModel("gpt2-decode", Gpt2, _step)]


def _bert(name: str, length: int, width: int, layers: int) -> CpuModel:
    """An encoder of BERT's kind with 12 heads; MiniLM's shape is that of all-MiniLM-L6-v2."""

    def build() -> nn.Module:
        define_operators()
        transformers = importlib.import_module("transformers")
        config = transformers.BertConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=12
        )
        return _LastHidden(transformers.BertModel(config, add_pooling_layer=False))

    return CpuModel(name, build, lambda: (torch.randint(0, 30000, (1, length)),))


class _LastHidden(nn.Module):
    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(ids).last_hidden_state


class Gpt2(nn.Module):
    """GPT-2 small (Radford et al., 2019) for one token a call; the head has a weight of its own.

    In the released model the head is the embedding. That costs a call nothing, for it reads one row there, but whoever
    prunes the head alone would prune both.
    """

    def __init__(self, width: int = 768, heads: int = 12, layers: int = 12, words: int = 50257) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Logits [b, 1, words] for ids [b, 1], and each layer's key and value [b, heads, 1, width / heads].

        `past` has keys and values [b, heads, s, width / heads] of s tokens before, layer by layer.
        """
        x = self.words(ids) + self.places.weight[past[0].shape[2]]
        present: list[Tensor] = []
        for block, key, value in zip(self.blocks, past[::2], past[1::2], strict=True):
            x, *new = block(x, key, value)
            present += new
        return self.head(self.norm(x)), *present


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The token x [b, 1, width] with what it attends to, itself last: one query needs no mask."""
        split = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split[0], split[1], split[2]
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        seen = functional.scaled_dot_product_attention(query, keys, values)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x)), approximate="tanh")), key, value


def _step() -> tuple[Tensor, ...]:
    """One token, and keys and values of PAST tokens for each layer."""
    return (torch.randint(0, 50000, (1, 1)), *(torch.randn(1, 12, PAST, 64) for _ in range(2 * 12)))
