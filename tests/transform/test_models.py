"""Whole models at 80% on every prunable weight equal the pruned model: transformers' architectures and plain CNNs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune import Plan, Rule, Unstructured
from tests.oracle import COMPILED, QUICK, TOLERANCE, assert_right, zeroed

PLAN = Plan([Rule("*", Unstructured(0.8))])
Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
    "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 99, (batch, length))


def padded() -> dict[str, Any]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {"attention_mask": mask}


def images(size: int) -> tuple[Tensor]:
    return (torch.randn(2, 3, size, size),)


def bert() -> Case:
    return hf.BertModel(hf.BertConfig(**TEXT)), (ids(),), padded()


def roberta() -> Case:
    return hf.RobertaModel(hf.RobertaConfig(**TEXT)), (ids(),), padded()


def distilbert() -> Case:
    sizes: dict[str, Any] = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    return hf.DistilBertModel(hf.DistilBertConfig(**sizes)), (ids(),), padded()


def gpt2() -> Case:
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 40}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)), (ids(),), {}


def llama() -> Case:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2)), (ids(),), padded()


def mistral() -> Case:
    config = hf.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=8)
    return hf.MistralForCausalLM(config), (ids(),), {}


def qwen2() -> Case:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT, num_key_value_heads=2)), (ids(),), {}


def t5() -> Case:
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)
    return hf.T5ForConditionalGeneration(config), (), {"input_ids": ids(), "decoder_input_ids": ids(2, 7)}


def whisper() -> Case:
    config = hf.WhisperConfig(
        **SPEECH, vocab_size=99, num_mel_bins=16, max_source_positions=20, max_target_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    kwargs = {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids(2, 7)}
    return hf.WhisperForConditionalGeneration(config), (), kwargs


def vit() -> Case:
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    return hf.ViTModel(config), images(16), {}


def swin() -> Case:
    config = hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    return hf.SwinModel(config), images(32), {}


def convnext() -> Case:
    config = hf.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=4)
    return hf.ConvNextModel(config), images(32), {}


def detr() -> Case:
    backbone: dict[str, Any] = {
        "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic",
        "out_features": ["stage2"],
    }  # fmt: skip
    # Without a backbone of its own it would load one from the network.
    offline: dict[str, Any] = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    sizes: dict[str, Any] = {**SPEECH, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
    config = hf.DetrConfig(**sizes, **offline, backbone_config=hf.ResNetConfig(**backbone))
    return hf.DetrModel(config), images(64), {}


def mobilenet_v2() -> Case:
    return hf.MobileNetV2Model(hf.MobileNetV2Config(image_size=32, depth_multiplier=0.35)), images(32), {}


def unit(i: int, o: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(i, o, 3, stride=stride, padding=1, groups=groups, bias=groups > 1)
    return nn.Sequential(convolution, nn.BatchNorm2d(o, eps=1e-3), nn.ReLU())


def plain_cnn() -> Case:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)]
    return nn.Sequential(unit(3, 8), unit(8, 16, 2), nn.MaxPool2d(2), unit(16, 24), *head), images(16), {}


class Residual(nn.Module):
    """Residual, depthwise and grouped units, and a batch-norm that reads a convolution with a second reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = unit(3, 16), nn.Sequential(unit(16, 16), nn.Conv2d(16, 16, 3, padding=1))
        self.depthwise, self.grouped = unit(16, 16, groups=16), unit(16, 32, groups=4)
        self.shared, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16, affine=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        x = self.depthwise(x) + x
        y = self.shared(x)
        x = self.norm(y) + y
        x = self.norm(self.shared(x))
        return self.head(self.grouped(x).mean((2, 3)))


def residual_cnn() -> Case:
    return Residual(), images(16), {}


def cnn_1d_and_transposed() -> Case:
    layers = [
        nn.Conv1d(4, 8, 5, padding="same"), nn.BatchNorm1d(8), nn.GELU(), nn.Conv1d(8, 8, 3, dilation=2),
        nn.BatchNorm1d(8), nn.ConvTranspose1d(8, 6, 4, stride=2), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(240, 5),
    ]  # fmt: skip
    return nn.Sequential(*layers), (torch.randn(2, 4, 23),), {}


MODELS: list[Callable[[], Case]] = [
    bert, roberta, distilbert, gpt2, llama, mistral, qwen2, t5, whisper, vit, swin, convnext, detr, mobilenet_v2,
    plain_cnn, residual_cnn, cnn_1d_and_transposed,
]  # fmt: skip


def unit_scale(model: nn.Module) -> nn.Module:
    """Random values under which every weight matters: the models' own initial values hide most of them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                buffer.normal_(0, 0.2)
    return model.eval()


def first_float(output: Any) -> Tensor:
    leaves = pytree.tree_leaves(output)
    return next(t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())


def doubled(value: Any) -> Any:
    return torch.cat([value, value.flip(0)]) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_at_80_percent_equals_the_pruned_model(make: Callable[[], Case]) -> None:
    model, args, kwargs = make()
    unit_scale(model)
    result = fxprune.transform(model, PLAN, args, kwargs, options=QUICK, progress=False)
    assert_right(result, model, *args, **kwargs)
    twice = tuple(map(doubled, args)), {k: doubled(v) for k, v in kwargs.items()}
    assert_right(result, model, *twice[0], **twice[1])
    dense, oracle = (first_float(m(*args, **kwargs)) for m in (model, zeroed(model, result)))
    assert (dense - oracle).abs().max() > 100 * TOLERANCE * oracle.abs().max()
    assert len(result.report.weights) >= 2
    # The report counts zeros in what is left: rows that are zero throughout may have left.
    assert all(result.selection.reached(w.name) == pytest.approx(0.8, abs=0.05) for w in result.report.weights)
    linears = [w for w in result.report.weights if w.layout == "nonzeros"]
    assert linears or make is mobilenet_v2


SLOW = [pytest.param(make, marks=pytest.mark.slow) for make in (llama, t5)]


@pytest.mark.parametrize("make", [bert, residual_cnn, *SLOW], ids=lambda make: make.__name__)
def test_compiled(make: Callable[[], Case]) -> None:
    model, args, kwargs = make()
    unit_scale(model)
    result = fxprune.transform(model, PLAN, args, kwargs, options=COMPILED, progress=False)
    assert "torch.compile" in result.report.compiled and "failed" not in result.report.compiled
    assert_right(result, model, *args, **kwargs)
    torch._dynamo.reset()


def test_a_decoder_that_hands_out_its_cache_is_the_first_that_a_process_transforms() -> None:
    """Its cache is told apart by its tensors from the first call on."""
    script = """
import torch, transformers as hf, fxprune
config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99, n_positions=40)
model, ids = hf.GPT2LMHeadModel(config).eval(), torch.randint(99, (2, 7))
result = fxprune.transform(model, None, {"input_ids": ids}, options={"compile": False}, progress=False)
got, expected = result(input_ids=ids), model(input_ids=ids)
torch.testing.assert_close(got.logits, expected.logits)
torch.testing.assert_close(got.past_key_values.layers[0].keys, expected.past_key_values.layers[0].keys)
"""
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
