"""Small random models of transformers by name: calls and plans of them, what their configs say, and their oracle."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune import Channels, Drop, Rule
from tests.structured_oracle import zeroed

HALF = Channels(0.5)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
TOKENS = {"vocab_size": 90, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = SIZES | TOKENS
GROUPED = TEXT | {"num_key_value_heads": 2}
IMAGE = SIZES | {"image_size": 16, "patch_size": 4}
DISTILBERT = {"dim": 64, "hidden_dim": 128, "n_heads": 4, "n_layers": 3}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 3, "vocab_size": 90, "n_positions": 32, "bos_token_id": 1}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 3}
MODERNBERT = TEXT | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4, "num_hidden_layers": 4}
SPEECH = {
    "d_model": 64, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 96, "num_mel_bins": 16, "max_source_positions": 16,
    "max_target_positions": 32, "decoder_start_token_id": 1, "begin_suppress_tokens": None,
}  # fmt: skip
WHISPER = SPEECH | {name: TOKENS[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
GROUPED_SLIDING = GROUPED | {"use_sliding_window": True, "sliding_window": 4, "num_hidden_layers": 4}


@dataclasses.dataclass(frozen=True)
class Named:
    """A class and its config, what leaves, and exactly what its config says otherwise then."""

    kind: str
    config: dict[str, Any]
    plan: list[Any]
    says: dict[str, Any]


CASES: dict[str, Named] = {
    "bert": Named(
        "BertModel",
        TEXT,
        [Rule("*intermediate*", HALF), Drop("encoder.layer.1")],
        {"intermediate_size": 64, "num_hidden_layers": 2},
    ),
    "roberta": Named(
        "RobertaForMaskedLM",
        TEXT,
        [Rule("*intermediate*", HALF), Drop("roberta.encoder.layer.1")],
        {"intermediate_size": 64, "num_hidden_layers": 2},
    ),
    "distilbert": Named(
        "DistilBertModel",
        DISTILBERT | {"vocab_size": 90, "max_position_embeddings": 32},
        [Rule("*ffn*", HALF), Drop("transformer.layer.1")],
        {"hidden_dim": 64, "n_layers": 2},
    ),
    "gpt2": Named(
        "GPT2LMHeadModel",
        GPT2 | {"eos_token_id": 2},
        [Rule("*mlp*", HALF), Drop("transformer.h.0")],
        {"n_inner": 128, "n_layer": 2},
    ),
    "llama": Named(
        "LlamaForCausalLM",
        GROUPED,
        [Rule("*", HALF), Drop("model.layers.2")],
        {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2},
    ),
    "mistral": Named(
        "MistralForCausalLM",
        TEXT | {"num_key_value_heads": 4, "sliding_window": 4},
        [Rule("*attn*", Channels(0.25)), Rule("*mlp*", HALF), Drop("model.layers.1")],
        {"intermediate_size": 64, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 2},
    ),
    "qwen2": Named(
        "Qwen2ForCausalLM",
        GROUPED | {"tie_word_embeddings": True},
        [Rule("*", HALF), Drop("model.layers.0")],
        {
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention"] * 2,
        },
    ),
    "qwen3": Named(
        "Qwen3ForCausalLM",
        GROUPED_SLIDING | {"head_dim": 32, "max_window_layers": 2},
        [Rule("*", HALF), Drop("model.layers.1"), Drop("model.layers.2")],
        {
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gemma": Named(
        "GemmaForCausalLM",
        TEXT | {"num_key_value_heads": 1, "head_dim": 32},
        [Rule("*q_proj*", HALF), Rule("*mlp*", HALF), Drop("model.layers.1")],
        {"intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
    ),
    "t5": Named(
        "T5ForConditionalGeneration",
        T5 | {"vocab_size": 90, "decoder_start_token_id": 0},
        [Rule("*", HALF), Drop("encoder.block.1"), Drop("decoder.block.1"), Drop("decoder.block.2")],
        {"num_heads": 2, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 1},
    ),
    "whisper": Named(
        "WhisperForConditionalGeneration",
        WHISPER,
        [
            Rule("*fc*", HALF),
            Drop("model.encoder.layers.1"),
            Drop("model.decoder.layers.0"),
            Drop("model.decoder.layers.1"),
        ],
        {"encoder_ffn_dim": 64, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 1},
    ),
    "vit": Named(
        "ViTForImageClassification",
        IMAGE,
        [Rule("*layers*", HALF), Drop("vit.layers.1")],
        {"intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16, "num_hidden_layers": 2},
    ),
    "clip": Named(
        "CLIPModel",
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 64},
        [
            Rule("text*mlp*", HALF),
            Rule("vision*mlp*", Channels(0.25)),
            Drop("text_model.encoder.layers.1"),
            Drop("vision_model.encoder.layers.0"),
            Drop("vision_model.encoder.layers.1"),
        ],
        {
            "text_config.intermediate_size": 64,
            "text_config.num_hidden_layers": 2,
            "vision_config.intermediate_size": 96,
            "vision_config.num_hidden_layers": 1,
        },
    ),
    "modernbert": Named(
        "ModernBertForMaskedLM",
        MODERNBERT,
        [Rule("*mlp*", HALF), Drop("model.layers.1")],
        {
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}
GENERATING = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "t5", "whisper")
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")


def make(name: str, **config: Any) -> tuple[Any, dict[str, Any]]:
    """A small random model, with other values in its config where they are given, and a call of it."""
    model_class = getattr(transformers, CASES[name].kind)
    model = model_class(model_class.config_class(**CASES[name].config | config)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, call_of(name)


def call_of(name: str, length: int = 9) -> dict[str, Any]:
    """A call of two sequences of tokens, of two images or of two spectrograms."""
    ids = torch.randint(3, 90, (2, length))
    image = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "vit":
        return image
    if name == "clip":
        return image | {"input_ids": ids}
    if name == "whisper":
        return {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": ids, "use_cache": False}
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :-3], "use_cache": False}
    if name in ENCODERS:
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": ids, "use_cache": False}


def leaves(model: Any, call: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call answers."""
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(**call)) if isinstance(leaf, Tensor)]


def close(a: Any, b: Any, call: dict[str, Any]) -> None:
    """Asserts that two models answer alike."""
    for x, y in zip(leaves(a, call), leaves(b, call), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def oracle_of(model: Any, fast: Any) -> Any:
    """The eager model with zeros in place of what left, and with dropped blocks that hand on what they are given."""
    oracle = copy.deepcopy(zeroed(model, fast))
    for path in fast.selection.drop:
        block = oracle.get_submodule(path)
        block.forward = _t5_identity if type(block).__name__ == "T5Block" else _identity
    return oracle


def _identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _t5_identity(x: Tensor, mask: Any, bias: Any, states: Any, states_mask: Any, cross_bias: Any, **_: Any) -> Any:
    return x, bias, cross_bias


@torch.no_grad()
def greedy(model: Any, call: dict[str, Any], steps: int) -> tuple[Tensor, list[Tensor]]:
    """Token ids and logits of each step of greedy search without a cache: the whole sequence, again at every step."""
    given = prompt(call)
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    ids = given.pop("input_ids") if key in given else torch.full((2, 1), model.config.decoder_start_token_id)
    logits = []
    for _ in range(steps):
        logits.append(model(**given, **{key: ids}, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return ids, logits


def prompt(call: dict[str, Any]) -> dict[str, Any]:
    """What of a call `generate` is given."""
    return {name: value for name, value in call.items() if name in ("input_ids", "input_features")}


def generates_like(own: Any, oracle: Any, call: dict[str, Any], steps: int = 6) -> None:
    """Asserts that `generate`, with a cache, gives the tokens and the logits of the oracle's greedy search without."""
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": steps}
    found = own.generate(**prompt(call), **how, return_dict_in_generate=True, output_logits=True)
    ids, logits = greedy(oracle, call, steps)
    assert found.past_key_values is not None and torch.equal(found.sequences, ids)
    for mine, right in zip(found.logits, logits, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))
