"""A small reader of the `DeciLMForCausalLM` format: logits from config.json and the safetensors beside it alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F


def logits_of(folder: Path, ids: Tensor) -> Tensor:
    """What the written model answers to ids [batch, tokens]: logits [batch, tokens, vocabulary]."""
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    tensors = load_file(folder / "model.safetensors")
    read: set[str] = set()

    def linear(name: str, x: Tensor, bias: bool) -> Tensor:
        read.update({f"{name}.weight"} | ({f"{name}.bias"} if bias else set()))
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"] if bias else None)

    def norm(name: str, x: Tensor) -> Tensor:
        read.add(f"{name}.weight")
        return F.rms_norm(x, (x.shape[-1],), tensors[f"{name}.weight"], config["rms_norm_eps"])

    x = tensors["model.embed_tokens.weight"][ids]
    read.add("model.embed_tokens.weight")
    for index, block in enumerate(config["block_configs"]):
        name = f"model.layers.{index}"
        if not block["attention"]["no_op"]:
            heads = config["num_attention_heads"]
            shared = heads // block["attention"]["n_heads_in_group"]
            h = norm(f"{name}.input_layernorm", x)
            qkv_bias = config.get("qkv_bias", config["attention_bias"])
            q, k, v = (linear(f"{name}.self_attn.{part}_proj", h, qkv_bias) for part in "qkv")
            assert q.shape[-1] == heads * config["head_dim"] and k.shape[-1] == shared * config["head_dim"]
            out = _attend(q, k, v, heads, shared, config)
            x = x + linear(f"{name}.self_attn.o_proj", out, config["attention_bias"])
        if not block["ffn"]["no_op"]:
            width = int(2 * round(block["ffn"]["ffn_mult"], 6) * config["hidden_size"] / 3)
            width += -width % 256
            h = norm(f"{name}.post_attention_layernorm", x)
            gate, up = (linear(f"{name}.mlp.{part}_proj", h, config["mlp_bias"]) for part in ("gate", "up"))
            assert gate.shape[-1] == width
            x = x + linear(f"{name}.mlp.down_proj", F.silu(gate) * up, config["mlp_bias"])
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    answer = linear(head, norm("model.norm", x), False)
    # An engine refuses names that it does not know.
    assert read == set(tensors)
    return answer


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, shared: int, config: dict[str, Any]) -> Tensor:
    batch, length, _ = q.shape
    width = config["head_dim"]
    q, k, v = (t.view(batch, length, -1, width).transpose(1, 2) for t in (q, k, v))
    angles = torch.arange(length)[:, None] * config["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    k, v = (t.repeat_interleave(heads // shared, 1) for t in (turn(k), v))
    out = F.scaled_dot_product_attention(turn(q), k, v, is_causal=True)
    return out.transpose(1, 2).reshape(batch, length, -1)
