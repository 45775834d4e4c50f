"""write_back on models of transformers: what configs can say and cannot, models inside others, and training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Channels, FxPruneWarning, Plan, Rule
from tests.own_class.own_models import FAST

transformers = pytest.importorskip("transformers")

from tests.own_class.by_name_models import close, make  # noqa: E402

# Half as many heads, and heads half as wide, have the same shapes.
NARROW = {"num_attention_heads": 8, "num_key_value_heads": 4}


def test_what_a_config_cannot_say_is_told_and_runs() -> None:
    model, call = make("bert")
    plan = Plan([Rule("*.0.intermediate*", Channels(0.5)), Rule("*.1.intermediate*", Channels(0.25))])
    fast = fxprune.transform(model, plan, kwargs=call, options=FAST, progress=False)
    with pytest.warns(FxPruneWarning, match=r"no BertConfig gives BertModel the widths of encoder\.layer\.0") as told:
        own = fxprune.write_back(model, fast.selection, kwargs=call, progress=False)
    assert any("from_pretrained will not load" in str(one.message) for one in told)
    close(own, fast, call)


def test_heads_of_bert_leave_its_class_and_not_its_config() -> None:
    model, call = make("bert")
    plan = Plan([Rule("*attention*", Channels(0.5)), Rule("*intermediate*", Channels(0.5))])
    fast = fxprune.transform(model, plan, kwargs=call, options=FAST, progress=False)
    with pytest.warns(FxPruneWarning, match="the widths of encoder.layer.0.attention"):
        own = fxprune.write_back(model, fast.selection, kwargs=call, progress=False)
    attention = own.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (2, 32)
    # What the config can say it says.
    assert (own.config.intermediate_size, own.config.num_attention_heads) == (64, 4)
    close(own, fast, call)


def test_a_model_inside_ones_own_module() -> None:
    class Classifier(nn.Module):
        def __init__(self, bert: nn.Module) -> None:
            super().__init__()
            self.bert, self.head = bert, nn.Linear(64, 3)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.bert(input_ids, attention_mask).last_hidden_state[:, 0])

    bert, call = make("bert")
    model = Classifier(bert).eval()
    plan = Plan([Rule("*intermediate*", Channels(0.5))])
    fast = fxprune.transform(model, plan, kwargs=call, options=FAST, progress=False)
    own: Any = fxprune.write_back(model, fast.selection, kwargs=call, progress=False)
    assert own.bert.config.intermediate_size == 64 and bert.config.intermediate_size == 128
    close(own, fast, call)


@pytest.mark.parametrize(
    "rule",
    [Rule("*", Channels(0.5)), Rule("*", Channels(0.5, uniform=True), scope="global")],
    ids=["each by itself", "a pool with uniform widths"],
)
def test_of_two_configs_with_the_same_shapes_the_right_one_is_found(rule: Rule, tmp_path: Path) -> None:
    model, call = make("llama", **NARROW)
    fast = fxprune.transform(model, Plan([rule]), kwargs=call, options=FAST, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxPruneWarning)
        own: Any = fxprune.write_back(model, fast.selection, kwargs=call, progress=False)
    assert own.config.head_dim == 8 and own.config.num_attention_heads < 8
    own.save_pretrained(tmp_path)
    close(type(own).from_pretrained(tmp_path).eval(), fast, call)


def test_it_trains() -> None:
    model, call = make("llama")
    fast = fxprune.transform(model, Plan([Rule("*", Channels(0.5))]), kwargs=call, options=FAST, progress=False)
    own: Any = fxprune.write_back(model, fast.selection, kwargs=call, progress=False).train()
    optimiser = torch.optim.SGD(own.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = own(**call, labels=call["input_ids"]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
