"""Models with branches of residual sums, and the oracle: the eager model whose branches answer zeros."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tests.shrink.drop_models import TEXT, ids
from tests.structured_oracle import net, randomised

W = 16
GPT2: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 99, "n_positions": 40}


@dataclasses.dataclass(frozen=True)
class Branches:
    """A model with branches at `paths`: `gone` begin the names of the parameters that leave with them.

    `make` makes the model, `call` the arguments of a call with so many samples.
    """

    make: Callable[[], Any]
    call: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    paths: tuple[str, ...]
    gone: tuple[str, ...]


def forced_to_zero(model: nn.Module, paths: Sequence[str]) -> Any:
    """A copy of the model in which hooks put zeros in place of what these modules answer, first of a tuple."""

    def zeros(_: nn.Module, __: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    result = copy.deepcopy(model)
    for path in paths:
        result.get_submodule(path).register_forward_hook(zeros)
    return result


def first_leaf(output: Any) -> Tensor:
    """The first tensor that a model answers."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


class Attention(nn.Module):
    """Fused qkv; answers its outputs and its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 2, nn.Linear(W, 3 * W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * 0.3).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class LayerScale(nn.Module):
    """A block of a vision transformer: x + gamma * attention(norm(x)), and the same with an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.gamma1 = nn.LayerNorm(W), Attention(), nn.Parameter(torch.ones(W))
        self.norm2, self.mlp, self.gamma2 = nn.LayerNorm(W), ffn(), nn.Parameter(torch.ones(W))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attn(self.norm1(x))[0]
        return x + self.gamma2 * self.mlp(self.norm2(x))


class Vision(nn.Module):
    """Patches, blocks with layer scales, and a head over the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, W, 4, 4), nn.ModuleList(LayerScale() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(W), nn.Linear(W, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class InPlace(nn.Module):
    """x += dropout(branch(norm(x))), twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.drop = nn.LayerNorm(W), nn.LayerNorm(W), nn.Dropout(0.2)
        self.attn, self.mlp = Attention(), ffn()

    def forward(self, x: Tensor) -> Tensor:
        x += self.drop(self.attn(self.norm1(x))[0])
        x += self.drop(self.mlp(self.norm2(x)))
        return x


class Rms(nn.Module):
    """A norm written by hand and a linear. The cast of a float32 input is that input, which the sum then reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.ones(W)), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.linear(self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype))


def ffn() -> nn.Module:
    return nn.Sequential(nn.Linear(W, 24), nn.GELU(), nn.Linear(24, W))


def llama() -> Any:
    return randomised(hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False)))


def gpt2() -> Any:
    return randomised(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2, use_cache=False)))


def bert() -> Any:
    return randomised(hf.BertModel(hf.BertConfig(**TEXT), add_pooling_layer=False))


def between(function: Callable[..., Any], **parts: nn.Module) -> Any:
    """A stem, a function of (net, stream) that adds branches, and a head."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(function(m, m.stem(x)))

    return net(forward, stem=nn.Linear(W, W), head=nn.Linear(W, 4), **parts)


def tokens(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"input_ids": ids(batch), "use_cache": False}


def text(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"input_ids": ids(batch)}


def images(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(batch, 3, 16, 16),), {}


def floats(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(batch, 6, W),), {}


def conv() -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.branch(x)
        return m.head(x + m.other(x)).mean((2, 3))

    def branch() -> nn.Module:
        return nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    return net(forward, stem=nn.Conv2d(3, 8, 3), branch=branch(), other=branch(), head=nn.Conv2d(8, 4, 1))


def conditioned() -> Any:
    """The branch is multiplied with a gate that another input makes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        gate, x = m.gate(x[:, 0]), m.stem(x)
        return m.head(x + gate[:, None] * m.branch(m.norm(x)))

    parts = dict(stem=nn.Linear(W, W), gate=nn.Linear(W, W), norm=nn.LayerNorm(W), branch=ffn(), head=nn.Linear(W, 4))
    return net(forward, **parts)


def parallel() -> Any:
    """One norm for both branches, which are added to one another first."""

    def function(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return (m.attn(y)[0] + m.mlp(y)) + x

    return between(function, norm=nn.LayerNorm(W), attn=Attention(), mlp=ffn())


def added_to_the_branch(m: Any, x: Tensor) -> Tensor:
    y = m.branch(x)
    y += x
    return y


def mixer(m: Any, x: Tensor) -> Tensor:
    return x + m.branch(m.norm(x).transpose(1, 2)).transpose(1, 2).contiguous().view(x.shape)


def scaled(m: Any, x: Tensor) -> Tensor:
    return torch.add(-(2 * m.branch(x).double() / 3).float().mul_(0.5), x)


def self_attention(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return x + m.branch(y, y, y)[0]


def mixing() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))


LAYER = "model.layers.1"
CASES: dict[str, Branches] = {
    "llama's attention": Branches(llama, tokens, (f"{LAYER}.self_attn",), (f"{LAYER}.input_layernorm",)),
    "llama's mlp": Branches(llama, tokens, (f"{LAYER}.mlp",), (f"{LAYER}.post_attention_layernorm",)),
    "llama, one of each": Branches(
        llama, tokens, (f"{LAYER}.self_attn", "model.layers.2.mlp"),
        (f"{LAYER}.input_layernorm", "model.layers.2.post_attention_layernorm"),
    ),
    "llama, both of a layer": Branches(llama, tokens, (f"{LAYER}.self_attn", f"{LAYER}.mlp"), (LAYER,)),
    "gpt2's attention": Branches(gpt2, tokens, ("transformer.h.1.attn",), ("transformer.h.1.ln_1",)),
    "gpt2's mlp": Branches(gpt2, tokens, ("transformer.h.1.mlp",), ("transformer.h.1.ln_2",)),
    "bert, after the norm": Branches(
        bert, text, ("encoder.layer.1.attention.output.dense", "encoder.layer.2.output.dense"),
        ("encoder.layer.1.attention.self", "encoder.layer.2.intermediate"),
    ),
    "layer scale": Branches(
        lambda: randomised(Vision()), images, ("blocks.0.attn", "blocks.1.mlp"),
        ("blocks.0.norm1", "blocks.0.gamma1", "blocks.1.norm2", "blocks.1.gamma2"),
    ),
    "in place": Branches(
        lambda: randomised(nn.Sequential(nn.Linear(W, W), InPlace(), InPlace())), floats, ("1.attn", "2.mlp"),
        ("1.norm1", "2.norm2"),
    ),
    "convolution": Branches(conv, images, ("branch",), ()),
    "conditioned": Branches(conditioned, floats, ("branch",), ("norm", "gate")),
    "parallel, one": Branches(parallel, floats, ("attn",), ()),
    "parallel, both": Branches(parallel, floats, ("attn", "mlp"), ("norm",)),
    "added to the branch": Branches(lambda: between(added_to_the_branch, branch=ffn()), floats, ("branch",), ()),
    "transposed": Branches(
        lambda: between(mixer, norm=nn.LayerNorm(W), branch=mixing()), floats, ("branch",), ("norm",)
    ),
    "scaled": Branches(lambda: between(scaled, branch=ffn()), floats, ("branch",), ()),
    "in the stream's type": Branches(
        lambda: between(lambda m, x: x + m.branch(x).double().type_as(x).reshape_as(x), branch=ffn()), floats,
        ("branch",), (),
    ),
    "alpha of the branch": Branches(
        lambda: between(lambda m, x: torch.add(x, m.branch(x), alpha=0.5), branch=ffn()), floats, ("branch",), ()
    ),
    "a sum in between": Branches(
        lambda: between(lambda m, x: x + m.branch(x) + m.other(x), branch=ffn(), other=ffn()), floats, ("branch",), ()
    ),
    "torch's attention": Branches(
        lambda: between(self_attention, norm=nn.LayerNorm(W), branch=nn.MultiheadAttention(W, 2, batch_first=True)),
        floats, ("branch",), ("norm",),
    ),
    "the stream passes by inside": Branches(
        lambda: between(lambda m, x: x + m.branch(x), branch=Rms()), floats, ("branch",), ()
    ),
    "called twice": Branches(
        lambda: between(lambda m, x: (lambda y: y + m.branch(m.norm(y)))(x + m.branch(F.relu(x))),
                        norm=nn.LayerNorm(W), branch=ffn()),
        floats, ("branch",), ("norm",),
    ),
    "the last linear": Branches(
        lambda: between(lambda m, x: x + m.down(F.relu(m.up(x))), up=nn.Linear(W, 24), down=nn.Linear(24, W)),
        floats, ("down",), ("up",),
    ),
}  # fmt: skip
