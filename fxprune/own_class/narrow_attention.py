"""narrow_attention: torch's multi-head attention, for heads that do not add up to the width of the model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NarrowAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` that has lost heads, or places within its heads.

    torch's own takes the width of a head for `embed_dim / num_heads`, and the widths of queries, keys and values for
    `embed_dim`. Here they are those of the weights. Called, trained and saved as torch's own is.
    """

    scale: float

    @staticmethod
    def take_over(module: nn.MultiheadAttention, scale: float) -> None:
        """Makes one of torch's own, in place."""
        own: Any = module
        del own.head_dim
        own.scale = scale
        own.__class__ = NarrowAttention
        # torch's fused encoder layer takes the widths from `embed_dim`, and passes by modules that say this.
        module._qkv_same_embed_dim = False

    @property
    def head_dim(self) -> int:
        """The width of a head's values."""
        return self.out_proj.weight.shape[1] // self.num_heads

    @property
    def possible_heads(self) -> list[int]:
        """How many heads its values may be of, the likeliest first: as wide as they were, or as many."""
        width, was = self.out_proj.weight.shape[1], round(self.scale**-2)
        return list(dict.fromkeys([width // was if width % was == 0 else self.num_heads, self.num_heads]))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: (outputs, attention weights or None)."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        given = (query, key, value)
        batched = query.dim() == 3
        if not batched:
            given = tuple(tensor.unsqueeze(0) for tensor in given)
        elif not self.batch_first:
            given = tuple(tensor.transpose(0, 1) for tensor in given)
        q, k, v = self._heads(*given)
        mask = self._mask(q, k, attn_mask, key_padding_mask if batched else _batch_of_one(key_padding_mask))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-1, -2)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values [n, heads, length, width], with the keys and values that the module adds."""
        v_width = self.out_proj.weight.shape[1]
        if self.in_proj_weight is not None:
            width = (len(self.in_proj_weight) - v_width) // 2
            weights = self.in_proj_weight.split((width, width, v_width))
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None)
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.split([len(weight) for weight in weights])
        made = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
        for place, more in ((1, self.bias_k), (2, self.bias_v)):
            if more is not None:
                made[place] = torch.cat([made[place], more.expand(len(query), 1, -1)], 1)
        split = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in made]
        if self.add_zero_attn:
            split[1:] = [torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[-1])], 2) for x in split[1:]]
        return split

    def _mask(self, q: Tensor, k: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """What is added to the scores [n, heads, targets, sources], or None."""
        total = None
        if mask is not None:
            total = _added(mask, q.dtype)
            total = total.view(len(q), self.num_heads, *total.shape[1:]) if total.dim() == 3 else total
        if padding is not None:
            hidden = _added(padding, q.dtype)[:, None, None]
            total = hidden if total is None else total + hidden
        return total if total is None else F.pad(total, (0, k.shape[2] - total.shape[-1]))


def settle_attention(module: nn.MultiheadAttention) -> None:
    """Makes torch's own attention a `NarrowAttention`, in place, where its weights are not what `embed_dim` says."""
    packed = module.in_proj_weight
    rows = [module.out_proj.weight.shape[1]]
    rows += [len(w) for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if w is not None]
    rows += [] if packed is None else [len(packed) / 3, packed.shape[1]]
    if {*rows, module.out_proj.weight.shape[0]} == {module.embed_dim}:
        return
    if type(module) is nn.MultiheadAttention:
        # What is left of a head is scaled as the head was.
        NarrowAttention.take_over(module, module.head_dim**-0.5)
    module.embed_dim = module.out_proj.weight.shape[0]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _batch_of_one(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.unsqueeze(0)
