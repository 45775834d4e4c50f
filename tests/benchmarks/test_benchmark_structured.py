"""The networks written by hand are the published ones, and what fxprune leaves of them is them at smaller widths."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks import structured
from benchmarks.by_hand import BERT_BASE, RESNET50, VIT_B16, Bert, LayerWidths, ResNet, ResNetWidths, ViT
from benchmarks.zoo_randomise import randomise
from fxprune.errors import CheckError

EAGER = {"compile": False, "measure": False}

# As given with the published weights: torchvision's ResNet-50 and ViT-B/16, Google's BERT-base (uncased).
PUBLISHED = [(ResNet, RESNET50, 25_557_032), (ViT, VIT_B16, 86_567_656), (Bert, BERT_BASE, 109_482_240)]

RESNET_NAMES = {
    "embedder.embedder.convolution": "conv",
    "embedder.embedder.normalization": "norm",
    r"encoder.stages.(\d+).layers.(\d+)": lambda found: f"stage{1 + int(found[1])}.{found[2]}",
    "shortcut.convolution": "shortcut.0",
    "shortcut.normalization": "shortcut.1",
    r"layer.(\d+).convolution": lambda found: f"conv{1 + int(found[1])}",
    r"layer.(\d+).normalization": lambda found: f"norm{1 + int(found[1])}",
    "classifier.1": "classifier",
}
VIT_NAMES = {
    "embeddings.cls_token": "token",
    "embeddings.position_embeddings": "positions",
    "embeddings.patch_embeddings.projection": "patches",
    "attention.o_proj": "attention.out",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
    "^layernorm": "norm",
}
BERT_NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "kinds",
    "embeddings.LayerNorm": "norm",
    "encoder.layer": "layers",
    "attention.self": "attention",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "up",
    "output.LayerNorm": "norm2",
    "output.dense": "down",
    "pooler.dense": "pooler",
}


def rename(state: dict[str, Tensor], names: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors under our names: each pattern found in a name makes way for what stands beside it."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^(resnet|vit)\.", "", name)
        for theirs, ours in names.items():
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    return renamed


def reference_resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[64, 128], depths=[2, 2], num_labels=10)
    model = transformers.ResNetForImageClassification(config).eval()
    randomise(model, 1)
    return model, rename(model.state_dict(), RESNET_NAMES)


def reference_vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
        num_labels=10,
    )
    model = transformers.ViTForImageClassification(config).eval()
    randomise(model, 1)
    state = rename(model.state_dict(), VIT_NAMES)
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"layers.{layer}.attention.{part}_proj.{kind}") for part in "qkv"]
            state[f"layers.{layer}.attention.qkv.{kind}"] = torch.cat(parts)
    return model, state


def reference_bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = transformers.BertModel(config).eval()
    randomise(model, 1)
    return model, rename(model.state_dict(), BERT_NAMES)


REFERENCES = {"resnet50": reference_resnet, "vit-b16": reference_vit, "bert-base": reference_bert}


def row(**changes: Any) -> structured.Row:
    measured: structured.Row = {
        "model": "resnet50",
        "threads": 1,
        "parameters": 7_000_000,
        "dense_parameters": 25_000_000,
        "macs": 1_000,
        "dense_macs": 4_000,
        "hand_ms": 10.0,
        "pruned_ms_beside_hand": 10.1,
        "hand_way": "torch.compile",
        "over_hand": 0.99,
        "over_hand_low": 0.985,
        "over_hand_high": 0.995,
        "dense_ms": 30.0,
        "dense_way": "eager",
        "over_dense": 2.97,
        "over_dense_low": 2.9,
        "over_dense_high": 3.0,
        "difference": 1e-6,
    }
    return measured | changes


@pytest.mark.parametrize(("build", "widths", "count"), PUBLISHED)
def test_the_whole_networks_have_the_published_sizes(build: Any, widths: Any, count: int) -> None:
    with torch.device("meta"):
        model = build(widths)
    assert structured.parameters(model) == count
    assert widths.read(model.state_dict()) == widths


@pytest.mark.parametrize("name", structured.QUICK)
@torch.no_grad()
def test_the_networks_compute_what_the_published_ones_do(name: str) -> None:
    case = structured.QUICK[name]
    reference, state = REFERENCES[name]()
    model = case.build(case.widths).eval()
    model.load_state_dict(state)
    torch.manual_seed(2)
    inputs = case.inputs()
    if name == "bert-base":
        inputs[1][:, 9:] = 0
    expected, got = tuple(reference(*inputs).values()), model(*inputs)
    for right, answer in zip(expected, got if isinstance(got, tuple) else (got,), strict=True):
        assert answer.shape == right.shape
        torch.testing.assert_close(answer, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


def test_multiplications_are_counted() -> None:
    layers, inputs = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 5)), structured.image(4)
    assert structured.multiplications(layers, inputs) == 16 * 3 * 9 * 8 + 128 * 5
    case = structured.QUICK["vit-b16"]
    per_layer = 17 * 32 * 96 + 2 * 17 * 17 * 32 + 17 * 32 * 32 + 2 * 17 * 32 * 64
    whole = 16 * 3 * 64 * 32 + 2 * per_layer + 32 * 10
    assert structured.multiplications(case.build(case.widths).eval(), case.inputs()) == whole


HALVES = {
    "resnet50": ResNetWidths(8, (32, 64), (((8, 8),) * 2, ((16, 16),) * 2), 10),
    "vit-b16": (LayerWidths(2, 8, 32),) * 2,
    "bert-base": (LayerWidths(2, 8, 32),) * 2,
}


@pytest.mark.parametrize("name", structured.QUICK)
def test_what_is_left_is_the_network_by_hand_at_half_the_widths(name: str) -> None:
    case = structured.QUICK[name]
    nets = structured.prepare(case, EAGER)
    widths = case.widths.read(nets.hand.state_dict())
    assert (widths if name == "resnet50" else widths.layers) == HALVES[name]
    assert nets.small.report.parameters == (structured.parameters(nets.dense), structured.parameters(nets.hand))
    assert max(nets.difference, nets.hand_difference) < structured.TOLERANCE


def test_removed_indices_are_zeroed_and_cut() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    removed = {
        "0.weight": [(0, torch.tensor([1, 3]))],
        "0.bias": [(0, torch.tensor([1, 3]))],
        "1.weight": [(1, torch.tensor([1, 3]))],
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zeroed, state = structured.zero(model, removed).state_dict(), structured.cut(model, removed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(state["0.weight"], before["0.weight"][[0, 2]]) and torch.equal(state["1.bias"], before["1.bias"])
    assert torch.equal(zeroed["1.weight"][:, [0, 2]], state["1.weight"]) and not zeroed["1.weight"][:, [1, 3]].any()
    assert not zeroed["0.bias"][[1, 3]].any() and torch.equal(zeroed["0.bias"][[0, 2]], state["0.bias"])


class Gives(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.tensor([2.0, self.value])


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_wrong_result_gives_no_figure(error: float) -> None:
    inputs = (torch.ones(2),)
    assert structured.check(Gives(1.0), Gives(1.0), inputs, "right") == 0.0
    with pytest.raises(CheckError, match="no figure: wrong"):
        structured.check(Gives(1.0), Gives(1.0 + error), inputs, "wrong")


def test_nothing_removed_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "AMOUNT", 0.0)
    with pytest.raises(CheckError, match="nothing was removed"):
        structured.prepare(structured.QUICK["vit-b16"], EAGER)


def test_rows_are_judged_and_shown() -> None:
    rows = [row(), row(threads=2, over_hand=0.969)]
    assert [met for _, met in structured.judge(rows)] == [True, False]
    table = structured.format_table(rows)
    assert "0.990x [0.985, 0.995]" in table and "2.97x [2.90, 3.00]" in table and "7.0 of 25.0" in table
    assert "25%" in table
