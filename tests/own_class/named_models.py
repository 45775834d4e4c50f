"""Models of transformers by name, small and random: how to call them, what leaves, and what their configs say then."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune import Channels, Drop, Rule

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
TOKENS = {"vocab_size": 90, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | TOKENS | {"num_key_value_heads": 2}
IMAGES = {"image_size": 32, "patch_size": 8}
WHISPER = {
    "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_layers": 3, "decoder_layers": 2, "num_mel_bins": 16,
    "max_source_positions": 20, "max_target_positions": 24, "decoder_start_token_id": 1,
}  # fmt: skip
HALF_OF_ALL = Rule("*", Channels(0.5))


def ffn(pattern: str) -> Rule:
    """Half of the feed-forward channels leave. Configs of these classes have no word for fewer heads of one width."""
    return Rule(pattern, Channels(0.5))


@dataclasses.dataclass(frozen=True)
class Named:
    """A model: its class, the numbers of its config, what leaves, and what the config says afterwards.

    kind  "encoder", "decoder", "seq2seq" (ids and decoder ids), "speech" (features and decoder ids), "image" or "both"
    """

    model_class: str
    kind: str
    sizes: dict[str, Any]
    plan: list[Any]
    after: dict[str, Any]

    @property
    def generates(self) -> bool:
        """Whether it has a `.generate()` worth the name."""
        return self.kind in ("decoder", "seq2seq", "speech")

    def build(self) -> Any:
        """The model, in eval mode; norms are not ones, nor biases zeros."""
        model_class = getattr(transformers, self.model_class)
        model = model_class(model_class.config_class(**self.sizes)).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model

    def call(self, length: int = 9) -> dict[str, Any]:
        """Keyword arguments of a call with so many tokens."""
        ids = torch.randint(3, 90, (2, length))
        found: dict[str, Any] = {}
        if self.kind in ("encoder", "decoder", "both", "seq2seq"):
            found["input_ids"] = ids
        if self.kind in ("image", "both"):
            found["pixel_values"] = torch.randn(2, 3, 32, 32)
        if self.kind == "speech":
            found["input_features"] = torch.randn(2, 16, 40)
        if self.kind in ("seq2seq", "speech"):
            found["decoder_input_ids"] = ids[:, : length - 2]
        return found | ({"use_cache": False} if self.generates else {})


NAMED: dict[str, Named] = {
    "bert": Named(
        "BertModel", "encoder", SIZES | TOKENS, [ffn("*intermediate*"), Drop("encoder.layer.1")],
        {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "roberta": Named(
        "RobertaModel", "encoder", SIZES | TOKENS, [ffn("*intermediate*"), Drop("encoder.layer.1")],
        {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "distilbert": Named(
        "DistilBertModel", "encoder", {"dim": 64, "hidden_dim": 128, "n_heads": 4, "n_layers": 3, "vocab_size": 90},
        [ffn("*ffn*"), Drop("transformer.layer.0")], {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "dim": 64},
    ),
    "modernbert": Named(
        "ModernBertModel", "encoder", SIZES | TOKENS | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
        [ffn("*mlp*"), Drop("layers.1")],
        {"intermediate_size": 64, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "gpt2": Named(
        "GPT2LMHeadModel", "decoder",
        {"n_embd": 64, "n_head": 4, "n_layer": 3, "vocab_size": 90, "n_positions": 32, "bos_token_id": 1},
        [ffn("*mlp*"), Drop("transformer.h.0")], {"n_inner": 128, "n_layer": 2, "n_head": 4},
    ),
    "llama": Named(
        "LlamaForCausalLM", "decoder", GROUPED, [HALF_OF_ALL, Drop("model.layers.2")],
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64},
    ),
    "llama of narrow heads": Named(
        # Half as many heads, and heads half as wide, have the same shapes.
        "LlamaForCausalLM", "decoder", GROUPED | {"num_attention_heads": 8, "num_key_value_heads": 4}, [HALF_OF_ALL],
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "mistral": Named(
        "MistralForCausalLM", "decoder", GROUPED, [HALF_OF_ALL, Drop("model.layers.1")],
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64},
    ),
    "qwen2": Named(
        "Qwen2ForCausalLM", "decoder", GROUPED | {"tie_word_embeddings": True},
        [HALF_OF_ALL, Drop("model.layers.0")],
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "layer_types": ["full_attention"] * 2},
    ),
    "qwen3": Named(
        "Qwen3ForCausalLM", "decoder", GROUPED | {"head_dim": 16}, [HALF_OF_ALL, Drop("model.layers.1")],
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2},
    ),
    "gemma": Named(
        "GemmaForCausalLM", "decoder", GROUPED | {"head_dim": 16}, [HALF_OF_ALL, Drop("model.layers.1")],
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64},
    ),
    "t5": Named(
        "T5ForConditionalGeneration", "seq2seq",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2}
        | {"vocab_size": 90, "decoder_start_token_id": 0},
        [HALF_OF_ALL, Drop("encoder.block.1")],
        {"num_heads": 2, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2},
    ),
    "whisper": Named(
        "WhisperForConditionalGeneration", "speech", WHISPER | {k: v for k, v in TOKENS.items() if "position" not in k},
        [ffn("*fc1*"), Drop("model.encoder.layers.1")],
        {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2},
    ),
    "vit": Named(
        "ViTModel", "image", SIZES | IMAGES, [ffn("*fc1*"), Drop("layers.1")],
        {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "clip": Named(
        "CLIPModel", "both",
        {"text_config": SIZES | TOKENS, "vision_config": SIZES | IMAGES, "projection_dim": 32},
        [ffn("text_model*fc1*"), Rule("vision_model*fc1*", Channels(0.25)), Drop("vision_model.encoder.layers.1")],
        {
            "text_config.intermediate_size": 64, "text_config.num_hidden_layers": 3,
            "vision_config.intermediate_size": 96, "vision_config.num_hidden_layers": 2,
        },
    ),
}  # fmt: skip


def leaves(model: Any, call: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call answers."""
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(**call)) if isinstance(leaf, Tensor)]


def close(a: Any, b: Any, call: dict[str, Any]) -> None:
    """Asserts that two models answer alike."""
    for x, y in zip(leaves(a, call), leaves(b, call), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
