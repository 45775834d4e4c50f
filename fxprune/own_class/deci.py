"""deci: decoders whose layers differ in width, in the form that serving engines read as `DeciLMForCausalLM`.

Its config has an entry for each layer, `block_configs`: how many query heads share one key/value head, how wide the
feed-forward layer is, and which of the two are no-ops. The number of query heads and their width are the model's, and
feed-forward widths are multiples of 256, so layers that lost more are filled up with zeros, which changes no answer.
As vLLM's `nemotron_nas.py` and the configs of NVIDIA's Llama-Nemotron models have it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.check.calls import Call
from fxprune.check.compare import compare
from fxprune.errors import FxPruneError, InputError, warn_once

from .trial import evaluating
from .without_blocks import NoBranch

ARCHITECTURE = "DeciLMForCausalLM"
MODEL_TYPE = "nemotron-nas"
# Engines build feed-forward layers of multiples of this.
FFN_MULTIPLE = 256
# The shapes that the format is for; others, such as Gemma, have the same names and compute something else.
_FAMILIES = ("llama", "mistral", "qwen2")
_NAMES = re.compile(
    r"model\.(embed_tokens|norm)\.weight|lm_head\.weight|model\.layers\.\d+\.((input|post_attention)_layernorm\.weight"
    r"|self_attn\.[qkvo]_proj\.(weight|bias)|mlp\.(gate|up|down)_proj\.(weight|bias))"
)


def check_format(format: str | None) -> None:
    """Raises InputError for a format that does not exist."""
    if format not in (None, "deci"):
        why, do = 'there is "deci"', "Use it, or leave format= out."
        raise InputError(f"there is no format {format!r}", why=why, do=do)


def to_deci(model: nn.Module) -> nn.Module:
    """A copy of a decoder, of its own class, filled up with zeros to widths that the format can say.

    Raises FxPruneError for a model of another shape, and for what the format has no word for.
    """
    _check(model)
    own = copy.deepcopy(model)
    layers = list(_layers(own))
    with torch.no_grad():
        _fill_heads([layer.self_attn for layer in layers if not isinstance(layer.self_attn, NoBranch)])
        for layer in layers:
            if not isinstance(layer.mlp, NoBranch):
                _fill_ffn(layer.mlp)
        _compare(model, own)
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, own))
    if after > before:
        warn_once(
            f"deci, {type(model).__name__}: widths are filled up with zeros to what the format can say, from "
            f"{before:,} to {after:,} parameters. Feed-forward widths of multiples of {FFN_MULTIPLE} need none: "
            f"Channels(..., align={FFN_MULTIPLE})"
        )
    return own


def deci_config(own: Any) -> dict[str, Any]:
    """The config of a model that `to_deci` made."""
    config = json.loads(own.config.to_json_string(use_diff=False))
    attentions = [layer.self_attn for layer in _layers(own) if not isinstance(layer.self_attn, NoBranch)]
    heads = next((_heads(attention)[0] for attention in attentions), config["num_attention_heads"])
    first = attentions[0] if attentions else None
    bias = first is not None and first.q_proj.bias is not None
    config |= {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "block_configs": [_block(layer, heads, config["hidden_size"]) for layer in _layers(own)],
        "num_hidden_layers": len(list(_layers(own))),
        "num_attention_heads": heads,
        "attention_bias": first is not None and first.o_proj.bias is not None,
        "qkv_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }
    if first is not None:
        config["head_dim"] = first.head_dim
    # Each layer has its own.
    config["num_key_value_heads"] = config["intermediate_size"] = None
    if isinstance(rope := config.get("rope_parameters"), dict):
        # Older readers look for these.
        plain = rope.get("rope_type", "default") == "default"
        config["rope_theta"] = rope.get("rope_theta")
        config["rope_scaling"] = None if plain else {name: v for name, v in rope.items() if name != "rope_theta"}
    return config


def left_out(own: nn.Module) -> set[str]:
    """The names of tensors that the format has no place for: the norms in front of no-ops."""
    names = set()
    for index, layer in enumerate(_layers(own)):
        for branch, norm in (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm")):
            if isinstance(getattr(layer, branch), NoBranch):
                names.add(f"model.layers.{index}.{norm}.weight")
    return names


def _layers(model: Any) -> Iterator[Any]:
    yield from model.model.layers


def _heads(attention: Any) -> tuple[int, int]:
    """How many query heads, and how many key/value heads."""
    width = attention.head_dim
    return attention.q_proj.weight.shape[0] // width, attention.k_proj.weight.shape[0] // width


def _block(layer: Any, heads: int, width: int) -> dict[str, Any]:
    """One entry of `block_configs`, with the words that public configs have."""
    attention, ffn = (isinstance(branch, NoBranch) for branch in (layer.self_attn, layer.mlp))
    shared = None if attention else heads // _heads(layer.self_attn)[1]
    # Read back as int(2 * ffn_mult * hidden_size / 3), at the next multiple of 256.
    wide = None if ffn else 3 * layer.mlp.gate_proj.weight.shape[0] / (2 * width)
    sinks = {"num_sink_tokens": None, "unshifted_sink": False, "use_prefill_window_in_sink_attention": False}
    neither = {"replace_with_linear": False, "sparsify": None}
    return {
        "attention": {"n_heads_in_group": shared, "no_op": attention, "window_length": None, **sinks, **neither},
        "ffn": {"ffn_mult": wide, "no_op": ffn, **neither},
    }


def _fill_heads(attentions: list[Any]) -> None:
    """Gives all attentions the same number of query heads, each in groups that the format can say."""
    found = [_heads(attention) for attention in attentions]
    heads = max((queries for queries, _ in found), default=0)
    while any(_groups(queries, shared, heads) is None for queries, shared in found):
        heads += 1
    for attention, (queries, shared) in zip(attentions, found):
        groups = _groups(queries, shared, heads)
        assert groups is not None
        if (queries, shared) != (heads, groups):
            _regroup(attention, (queries, shared), (heads, groups))


def _groups(queries: int, shared: int, heads: int) -> int | None:
    """The fewest key/value heads for `heads` query heads that have room for so many groups of so many."""
    each = queries // shared
    return next((n for n in range(shared, heads + 1) if heads % n == 0 and heads // n >= each), None)


def _regroup(attention: Any, old: tuple[int, int], new: tuple[int, int]) -> None:
    """Adds heads of zeros to groups, and groups of zeros after the last, in place."""
    width, shared = attention.head_dim, old[1]
    each, room = old[0] // shared, new[0] // new[1]

    def spread(tensor: Tensor, per_group: int, room: int, groups: int) -> Tensor:
        """[groups * heads * width, ...] with zeros for the heads and groups that are new."""
        rest = tensor.shape[1:]
        wide = tensor.new_zeros(groups, room, width, *rest)
        wide[:shared, :per_group] = tensor.reshape(shared, per_group, width, *rest)
        return wide.reshape(-1, *rest)

    for name, per_group, space in (("q_proj", each, room), ("k_proj", 1, 1), ("v_proj", 1, 1)):
        linear = getattr(attention, name)
        linear.weight = _parameter(linear.weight, spread(linear.weight, per_group, space, new[1]))
        if linear.bias is not None:
            linear.bias = _parameter(linear.bias, spread(linear.bias, per_group, space, new[1]))
        linear.out_features = len(linear.weight)
    out = attention.o_proj
    out.weight = _parameter(out.weight, spread(out.weight.T, each, room, new[1]).T.contiguous())
    out.in_features = out.weight.shape[1]
    counts = {"num_key_value_groups": room, "num_heads": new[0], "num_attention_heads": new[0]}
    for name, count in {**counts, "num_key_value_heads": new[1]}.items():
        if name in vars(attention):
            setattr(attention, name, count)


def _fill_ffn(mlp: Any) -> None:
    """Adds channels of zeros up to a multiple of 256, in place."""
    missing = -mlp.gate_proj.weight.shape[0] % FFN_MULTIPLE
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = _parameter(linear.weight, nn.functional.pad(linear.weight, (0, 0, 0, missing)))
        if linear.bias is not None:
            linear.bias = _parameter(linear.bias, nn.functional.pad(linear.bias, (0, missing)))
        linear.out_features += missing
    down = mlp.down_proj
    down.weight = _parameter(down.weight, nn.functional.pad(down.weight, (0, missing)))
    down.in_features += missing
    if "intermediate_size" in vars(mlp):
        mlp.intermediate_size = down.in_features


def _parameter(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=old.requires_grad)


def _compare(model: Any, own: Any) -> None:
    """Raises FxPruneError unless both answer alike to a few tokens."""
    ids = torch.arange(2 * 7, device=own.device).reshape(2, 7) % own.config.vocab_size
    call = Call("a few tokens", (), {"input_ids": ids, "use_cache": False})
    with evaluating(model), evaluating(own):
        wanted, found = ([each(**call.kwargs).logits] for each in (model, own))
    row = compare("filled up = model", call, wanted, found)
    if not row.ok:
        raise _cannot(model, f"filled up with zeros its logits are off by {row.off}")


def _check(model: Any) -> None:
    """Raises FxPruneError with the first thing that the format has no word for."""
    if why := _unsayable(model):
        raise _cannot(model, why)


def _cannot(model: nn.Module, why: str) -> FxPruneError:
    return FxPruneError(
        'cannot write this model in the format "deci"',
        where=type(model).__name__,
        why=why,
        do="Leave format= out: fxprune.save_pretrained writes a folder that fxprune.from_pretrained loads. One width "
        "for all layers, Channels(..., uniform=True), is what the model's own config can say.",
    )


def _unsayable(model: Any) -> str:
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in _FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
        return f"it is for decoders of the shape of {', '.join(_FAMILIES)}, ForCausalLM"
    if strange := [name for name in model.state_dict() if not _NAMES.fullmatch(name)]:
        return f'it has no place for "{strange[0]}"'
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its layers apply {config.hidden_act}, and the format knows silu"
    slides = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if slides is not None and slides < config.max_position_embeddings:
        return f"its attention slides over {slides} of {config.max_position_embeddings} positions"
    layers = list(_layers(model))
    if bypassed := [index for index, layer in enumerate(layers) if not hasattr(layer, "self_attn")]:
        return f"layer {bypassed[0]} is a {type(layers[bypassed[0]]).__name__}"
    if not layers or isinstance(layers[0].self_attn, NoBranch):
        return "the attention of its first layer left, and engines begin with it"
    width = layers[0].self_attn.head_dim
    for index, layer in enumerate(layers):
        attention = layer.self_attn
        if isinstance(attention, NoBranch):
            continue
        widths = {linear.weight.shape[0] for linear in (attention.k_proj, attention.v_proj)}
        if attention.head_dim != width or len(widths) > 1 or abs(attention.scaling - width**-0.5) > 1e-6:
            return f"heads of layer {index} lost some of their width, and the format has one for all"
    return ""
