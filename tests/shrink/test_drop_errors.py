"""What the errors of drop say: paths that name no block, blocks that have to stay, and what could go instead."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from fxprune.errors import PlanError
from tests.shrink.drop_models import TEXT, D, Pre, bert, captured, find_block, ids, refusal, refused, resnet


def test_paths_that_name_no_block() -> None:
    _, program = captured(bert)
    for path, why, do in [
        ("encoder.layer.7", "no op that the output depends on", "encoder.layer."),
        ("encoder.layer", "only holds modules", "encoder.layer.0, encoder.layer.1"),
        ("", "the whole model", "Name a module"),
        ("zzz", "no op that the output depends on", "named_modules"),
    ]:
        with pytest.raises(PlanError) as caught:
            find_block(program, path)
        error = caught.value
        assert error.what == "cannot drop this block" and error.where == f'"{path}"'
        assert why in error.why and do in error.do


def test_errors_name_what_could_go_instead() -> None:
    _, program = captured(resnet)
    error = refusal(program, "layer2")
    assert error.why.startswith("its shape changes from relu__4 [s") and error.do.endswith("go: layer2.1.")
    assert ", 8, 16, 16] float32 on cpu to relu__8 [s" in error.why
    assert "its shape changes" in refusal(program, "layer2.0").why
    # The batch-norm after it, without which the block hands its input on, or the whole block.
    assert refusal(program, "layer1.1.conv2").do.endswith("go: layer1.1.bn2, layer1.1.")
    assert "its shape changes" in refusal(program, "head").why


def test_a_cache_that_leaves_is_named() -> None:
    config = hf.LlamaConfig(**TEXT | {"num_hidden_layers": 2}, num_key_value_heads=2)
    error = refused(hf.LlamaForCausalLM(config), "model.layers.1", ids(2))
    assert "3 tensors leave it" in error.why and "read by the model's output" in error.why
    assert "use_cache=False" in error.do


def test_a_block_that_nobody_reads() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.linear = Pre(), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            self.block(x)
            return self.linear(x)

    assert "no op that the output depends on" in refused(Idle(), "block", torch.randn(3, D)).why
