"""NarrowAttention: torch's multi-head attention computes the same where nothing left, and follows where heads leave."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune import Channels, Plan, Rule
from fxprune.own_class.narrow_attention import NarrowAttention, settle_attention
from tests.own_class.own_models import count, pruned, written

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 12, "vdim": 20, "batch_first": True},
    "all of it": {"kdim": 12, "vdim": 20, "add_bias_kv": True, "add_zero_attn": True, "bias": False},
}


def narrowed(attention: nn.MultiheadAttention) -> Any:
    """The same weights in the class that reads its widths off them."""
    own = copy.deepcopy(attention)
    own.__class__ = NarrowAttention
    own.scale = own.head_dim**-0.5
    return own


@pytest.mark.parametrize("weights", [False, True, "each"])
@pytest.mark.parametrize("masks", ["none", "padding", "2-D", "3-D", "floats and padding"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_it_computes_what_torchs_own_does(setting: str, masks: str, weights: Any) -> None:
    torch.manual_seed(0)
    how = SETTINGS[setting]
    attention: Any = nn.MultiheadAttention(16, 4, **how).eval()
    inputs = [torch.randn(3, 5, 16), torch.randn(3, 7, how.get("kdim", 16)), torch.randn(3, 7, how.get("vdim", 16))]
    if not how.get("batch_first"):
        inputs = [x.transpose(0, 1) for x in inputs]
    given: dict[str, Any] = {"need_weights": bool(weights), "average_attn_weights": weights != "each"}
    if "padding" in masks:
        given["key_padding_mask"] = torch.arange(7).expand(3, 7) > torch.tensor([[6], [4], [2]])
    if masks == "2-D":
        given["attn_mask"] = torch.ones(5, 7).triu(3).bool()
    if masks == "3-D":
        given["attn_mask"] = torch.rand(12, 5, 7) > 0.9
    if masks == "floats and padding":
        given["attn_mask"] = torch.randn(5, 7)
        given["key_padding_mask"] = torch.zeros(3, 7).masked_fill(given["key_padding_mask"], float("-inf"))
    expected, found = attention(*inputs, **given), narrowed(attention)(*inputs, **given)
    torch.testing.assert_close(found, expected)


def test_one_sequence_without_a_batch() -> None:
    attention: Any = nn.MultiheadAttention(16, 4).eval()
    x, hidden = torch.randn(5, 16), torch.tensor([False, False, True, False, True])
    expected = attention(x, x, x, key_padding_mask=hidden)
    torch.testing.assert_close(narrowed(attention)(x, x, x, key_padding_mask=hidden), expected)


def test_a_causal_hint_needs_its_mask() -> None:
    x = torch.randn(5, 2, 16)
    with pytest.raises(RuntimeError, match="is_causal"):
        narrowed(nn.MultiheadAttention(16, 4))(x, x, x, is_causal=True)


def test_what_fits_stays_torchs_own() -> None:
    attention = nn.MultiheadAttention(16, 4, kdim=12, vdim=20)
    settle_attention(attention)
    assert type(attention) is nn.MultiheadAttention


class Cross(nn.Module):
    """Attention to a memory of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, kdim=12, vdim=20, batch_first=True)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return x + self.attention(x, keys, values)[0]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


CASES: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "encoder": (encoder, [(2, 5, 32)]),
    "decoder": (lambda: nn.TransformerDecoderLayer(32, 4, 64, batch_first=True).eval(), [(2, 5, 32), (2, 6, 32)]),
    "cross": (lambda: Cross().eval(), [(2, 5, 32), (2, 6, 12), (2, 6, 20)]),
}


@pytest.mark.parametrize("unit", ["outer", "inner"])
@pytest.mark.parametrize("name", CASES)
def test_heads_leave_torchs_own_attention(name: str, unit: str) -> None:
    torch.manual_seed(0)
    make, shapes = CASES[name]
    model, inputs = make(), tuple(map(torch.randn, shapes))
    fast = pruned(model, inputs, Plan([Rule("*", Channels(0.5, unit=unit, align=1))]))
    own = written(model, fast.selection, *inputs)
    assert type(own) is type(model) and count(own) == fast.report.parameters[1] < count(model)
    inside = [module for module in own.modules() if isinstance(module, nn.MultiheadAttention)]
    assert {(type(m), m.num_heads) for m in inside} == {(NarrowAttention, 2 if unit == "outer" else 4)}
    others = tuple(torch.randn(3, *shape[1:]) for shape in shapes)
    with torch.no_grad():
        wanted = fast(*others)
        torch.testing.assert_close(own(*others), wanted, rtol=1e-4, atol=1e-5)
        again = pickle.loads(pickle.dumps(own))
        torch.testing.assert_close(again(*others), wanted, rtol=1e-4, atol=1e-5)


def test_it_trains() -> None:
    model, x = encoder(), torch.randn(2, 5, 32)
    own = written(model, pruned(model, (x,)).selection, x).train()
    own(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in own.parameters())
