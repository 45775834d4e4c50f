"""cache: whether a smaller decoder of transformers still counts the tokens in its key-value cache."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.capture import admit
from fxprune.check.calls import Call

from .trial import evaluating


def miscounted(own: nn.Module, model: nn.Module, example: Call) -> list[str]:
    """A note where the cache of the smaller model counts other tokens than that of the model, after the example."""
    if not hasattr(model, "generate") or (count := _tokens(model, example)) is None:
        return []
    mine = _tokens(own, example) or 0
    if mine == count:
        return []
    why = "transformers counts them in the first layer, whose attention left"
    goes_wrong = "generate() goes wrong with padding, and so does what is called step by step"
    do = "Call generate(..., use_cache=False), or keep the attention of the first layer"
    return [f"its key-value cache counts {mine} of {count} tokens, for {why}: {goes_wrong}. {do}"]


def _tokens(model: nn.Module, example: Call) -> int | None:
    """How many tokens the cache that the model hands out counts; None where it hands out none."""
    args, kwargs = example.copy()
    try:
        with evaluating(model), admit.untouched(model), torch.no_grad():
            return model(*args, **{**kwargs, "use_cache": True}).past_key_values.get_seq_length()
    except Exception:
        # What a class raises that knows no cache may be anything.
        return None
