"""write_back on models of transformers: they generate, their configs follow, and from_pretrained loads them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune import Channels, Drop, FxPruneWarning, Plan, Rule
from tests.own_class.own_models import FAST, count, same, snapshot

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
TOKENS = {"vocab_size": 90, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 3, "vocab_size": 90, "n_positions": 32, "bos_token_id": 1}

# model, config, plan, what the config says afterwards
CASES: dict[str, tuple[str, Any, list[Any], dict[str, Any]]] = {
    "bert": (
        "BertModel",
        SIZES | TOKENS,
        [Rule("*intermediate*", Channels(0.5)), Drop("encoder.layer.1")],
        {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        GPT2 | {"eos_token_id": 2},
        [Rule("*mlp*", Channels(0.5)), Drop("transformer.h.0")],
        {"n_inner": 128, "n_layer": 2, "n_head": 4},
    ),
    "llama": (
        "LlamaForCausalLM",
        SIZES | TOKENS | {"num_key_value_heads": 2},
        [Rule("*", Channels(0.5)), Drop("model.layers.2")],
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        SIZES | TOKENS | {"num_key_value_heads": 2, "tie_word_embeddings": True},
        [Rule("*", Channels(0.5)), Drop("model.layers.0")],
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "layer_types": ["full_attention"] * 2},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        T5 | {"vocab_size": 90, "decoder_start_token_id": 0},
        [Rule("*", Channels(0.5)), Drop("encoder.block.1")],
        {"num_heads": 2, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2},
    ),
}


def make(name: str) -> tuple[Any, dict[str, Any]]:
    """A small random model, and a call of it."""
    kind, sizes, *_ = CASES[name]
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    call = {"input_ids": torch.randint(3, 90, (2, 9))}
    if name != "bert":
        call["use_cache"] = False
    if name == "t5":
        call["decoder_input_ids"] = torch.randint(3, 90, (2, 5))
    return model, call


def leaves(model: Any, call: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a call answers."""
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(**call)) if isinstance(leaf, torch.Tensor)]


def close(a: Any, b: Any, call: dict[str, Any]) -> None:
    """Asserts that two models answer alike."""
    for x, y in zip(leaves(a, call), leaves(b, call), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Any, Any, Any, dict[str, Any]]:
    """Name, model, result of transform, smaller model, call."""
    torch.manual_seed(0)
    model, call = make(request.param)
    before = snapshot(model)
    plan = Plan(CASES[request.param][2])
    fast = fxprune.transform(model, plan, kwargs=call, options=FAST, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxPruneWarning)
        own = fxprune.write_back(model, fast.selection, kwargs=call, progress=False)
    assert same(snapshot(model), before)
    return request.param, model, fast, own, call


def test_it_computes_what_the_shrunk_graph_computes(case: Any) -> None:
    _, model, fast, own, call = case
    assert type(own) is type(model) and count(own) == fast.report.parameters[1]
    longer = {name: value[:, :4] if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    close(own, fast, call)
    # Another length: the class goes where the graph, captured at one length, does not.
    assert all(torch.isfinite(leaf).all() for leaf in leaves(own, longer))


def test_the_config_says_its_widths(case: Any) -> None:
    name, model, _, own, _ = case
    assert {key: getattr(own.config, key) for key in CASES[name][3]} == CASES[name][3]
    assert model.config.to_dict() != own.config.to_dict()


def test_from_pretrained_loads_what_save_pretrained_writes(case: Any, tmp_path: Path) -> None:
    _, _, _, own, call = case
    own.save_pretrained(tmp_path)
    again = type(own).from_pretrained(tmp_path).eval()
    close(again, own, call)
    assert [p.shape for p in again.parameters()] == [p.shape for p in own.parameters()]


def test_generate_is_greedy_step_by_step(case: Any) -> None:
    name, _, _, own, call = case
    if name == "bert":
        pytest.skip("an encoder generates nothing")
    ids, step = call["input_ids"], 5
    found = own.generate(ids, max_new_tokens=step, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = torch.zeros(2, 1, dtype=torch.long) if name == "t5" else ids
    with torch.no_grad():
        for _ in range(step):
            given = {"input_ids": ids, "decoder_input_ids": expected} if name == "t5" else {"input_ids": expected}
            expected = torch.cat([expected, own(**given, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)


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

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.bert(input_ids).last_hidden_state[:, 0])

    bert, call = make("bert")
    model = Classifier(bert).eval()
    plan = Plan([Rule("*intermediate*", Channels(0.5))])
    fast = fxprune.transform(model, plan, kwargs=call, options=FAST, progress=False)
    own: Any = fxprune.write_back(model, fast.selection, kwargs=call, progress=False)
    assert own.bert.config.intermediate_size == 64 and bert.config.intermediate_size == 128
    close(own, fast, call)


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
