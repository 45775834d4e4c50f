"""A result in the place of the part of a model that it came from, called by the library's own code."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import fxprune
from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.errors import PlanError
from tests.oracle import assert_close
from tests.structured_oracle import zeroed

TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
    "max_position_embeddings": 40,
}  # fmt: skip
IMAGE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99}


def text(batch: int, tokens: int) -> dict[str, Any]:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, tokens - 2 :] = 0
    return {"input_ids": torch.randint(3, 99, (batch, tokens)), "attention_mask": mask}


def pixels(batch: int, _: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


Case = tuple[Callable[[], nn.Module], str, Callable[[int, int], dict[str, Any]]]

MODELS: dict[str, Case] = {
    "BERT": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)), "bert", text),
    "GPT-2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=40, use_cache=False)
        ), "transformer", text,
    ),
    "ViT": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)), "vit", pixels),
    "Llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, use_cache=False)), "model", text),
}  # fmt: skip

SLOW: dict[str, Case] = {
    "RoBERTa": (lambda: hf.RobertaForTokenClassification(hf.RobertaConfig(**TEXT, pad_token_id=1)), "roberta", text),
    "DistilBERT": (
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=99, max_position_embeddings=40
            )
        ), "distilbert", text,
    ),
    "ELECTRA": (
        lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**TEXT, embedding_size=32)), "electra", text
    ),
    "ALBERT": (lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**TEXT, embedding_size=16)), "albert", text),
    "MPNet": (lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**TEXT)), "mpnet", text),
    "DeBERTa": (lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**TEXT)), "deberta", text),
    "DeiT": (lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**IMAGE)), "deit", pixels),
    "ResNet": (
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
        ), "resnet", pixels,
    ),
    "Qwen2": (
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT, num_key_value_heads=2, use_cache=False)), "model", text
    ),
    "T5": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0, use_cache=False)),
        "encoder", text,
    ),
    "OPT": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=99,
                max_position_embeddings=40, word_embed_proj_dim=32, use_cache=False,
            )
        ), "model.decoder", text,
    ),
}  # fmt: skip


@pytest.mark.parametrize("plan", [Plan([Rule("*", Unstructured(0.5))]), Plan([Rule("*", Channels(0.5, align=1))])])
@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_part_that_was_pruned_takes_its_own_place(name: str, plan: Plan) -> None:
    make, part, draw = {**MODELS, **SLOW}[name]
    torch.manual_seed(0)
    model = make().eval()
    sub = model.get_submodule(part)
    calls = [draw(2, tokens) for tokens in (7, 9)]
    result = fxprune.transform(sub, plan, calls, options={"compile": False}, progress=False)
    pairs = [(batch, tokens) for batch in (1, 4) for tokens in (5, 12)]
    inputs = [draw(*pair) for pair in pairs]
    if name == "T5":
        inputs = [{**each, "decoder_input_ids": each["input_ids"][:, :1]} for each in inputs]
    above, _, leaf = part.rpartition(".")
    setattr(model.get_submodule(above), leaf, zeroed(sub, result))
    with torch.no_grad():
        expected = [model(**each).logits for each in inputs]
        setattr(model.get_submodule(above), leaf, result)
        for each, logits in zip(inputs, expected, strict=True):
            assert_close(model(**each).logits, logits)


def test_a_cache_that_keeps_channels_whole_is_named() -> None:
    config = hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=40, bos_token_id=1, eos_token_id=1
    )
    model, ids = hf.GPT2LMHeadModel(config).eval(), torch.randint(99, (2, 7))
    words = "graph output in a DynamicCache, which use_cache=False leaves out"
    more: dict[str, Any] = {"progress": False, "options": {"compile": False, "measure": False}}
    result = fxprune.transform(model, Plan([Rule("*", Channels(0.5))]), kwargs={"input_ids": ids}, **more)
    notes = [note for note in result.report.notes if re.search(words, note)]
    assert len(notes) == 1 and "h.0.attn.c_attn.weight" in notes[0] and "lm_head" not in notes[0]
    plan = Plan([Rule("transformer.h.1.attn.c_attn.weight", Channels(0.5))])
    with pytest.raises(PlanError, match=words):
        fxprune.transform(model, plan, kwargs={"input_ids": ids}, **more)
    given = {"input_ids": ids, "use_cache": False}
    result = fxprune.transform(model, plan, kwargs=given, **more)
    assert result.get_parameter("transformer.h.1.attn.c_attn.weight").shape == (32, 48)
