"""write_back on models of transformers: they generate, their configs follow, and from_pretrained loads them."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Channels, FxPruneWarning, Plan, Rule
from tests.own_class.own_models import FAST, count, same, snapshot

transformers = pytest.importorskip("transformers")

from tests.own_class.named_models import NAMED, close  # noqa: E402


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """A model of the list and a call of it."""
    return NAMED[name].build(), NAMED[name].call()


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of the list, what transform makes of it, and the smaller model of its own class."""

    name: str
    model: Any
    call: dict[str, Any]
    fast: Any
    own: Any


@pytest.fixture(scope="module", params=NAMED)
def case(request: pytest.FixtureRequest) -> Case:
    """A model of the list, with any number of tokens where it has tokens."""
    torch.manual_seed(0)
    named = NAMED[request.param]
    model, calls = named.build(), [named.call(9), named.call(7)]
    before = snapshot(model)
    fast = fxprune.transform(model, Plan(named.plan), calls, options=FAST, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxPruneWarning)
        own = fxprune.write_back(model, fast.selection, calls, progress=False)
    assert same(snapshot(model), before)
    return Case(request.param, model, calls[0], fast, own)


def test_it_computes_what_the_shrunk_graph_computes(case: Case) -> None:
    assert type(case.own) is type(case.model) and count(case.own) == case.fast.report.parameters[1] < count(case.model)
    close(case.own, case.fast, case.call)
    if NAMED[case.name].kind != "image":
        close(case.own, case.fast, NAMED[case.name].call(12))


def test_the_config_says_its_widths(case: Case) -> None:
    after = NAMED[case.name].after
    assert {key: functools.reduce(getattr, key.split("."), case.own.config) for key in after} == after
    assert case.model.config.to_dict() != case.own.config.to_dict()


def test_from_pretrained_loads_what_save_pretrained_writes(case: Case, tmp_path: Path) -> None:
    case.own.save_pretrained(tmp_path)
    again = type(case.own).from_pretrained(tmp_path).eval()
    close(again, case.own, case.call)
    assert [p.shape for p in again.parameters()] == [p.shape for p in case.own.parameters()]
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(case.own.config)
    # Nothing but the config is needed, nor anything beside it.
    fxprune.save_pretrained(case.own, tmp_path / "again")
    assert not (tmp_path / "again" / "fxprune.json").exists()


@pytest.mark.parametrize("case", [name for name, named in NAMED.items() if named.generates], indirect=True)
def test_generate_is_greedy_by_the_logits_of_the_shrunk_graph(case: Case) -> None:
    """The graph, which is proved against the model with zeros, computes all anew for each token, without a cache."""
    kind, step = NAMED[case.name].kind, 8
    given = {name: value for name, value in case.call.items() if name not in ("use_cache", "decoder_input_ids")}
    found = case.own.generate(**given, max_new_tokens=step, do_sample=False, eos_token_id=None, pad_token_id=0)
    start = case.own.config.decoder_start_token_id if kind != "decoder" else None
    tokens = given["input_ids"] if kind == "decoder" else torch.full((2, 1), start)
    with torch.no_grad():
        for _ in range(step):
            now = {"input_ids": tokens} if kind == "decoder" else {**given, "decoder_input_ids": tokens}
            tokens = torch.cat([tokens, _logits(case, now)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found[:, -step:], tokens[:, -step:])


def _logits(case: Case, given: dict[str, Any]) -> torch.Tensor:
    return case.fast(**given, use_cache=False).logits


def test_what_a_config_cannot_say_is_told_and_runs() -> None:
    model, call = made("bert")
    plan = Plan([Rule("*.0.intermediate*", Channels(0.5)), Rule("*.1.intermediate*", Channels(0.25))])
    fast = fxprune.transform(model, plan, kwargs=call, options=FAST, progress=False)
    with pytest.warns(FxPruneWarning, match=r"no BertConfig gives BertModel the widths of encoder\.layer\.0") as told:
        own = fxprune.write_back(model, fast.selection, kwargs=call, progress=False)
    assert any("from_pretrained will not load" in str(one.message) for one in told)
    close(own, fast, call)


def test_heads_of_bert_leave_its_class_and_not_its_config() -> None:
    model, call = made("bert")
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

    bert, call = made("bert")
    model = Classifier(bert).eval()
    plan = Plan([Rule("*intermediate*", Channels(0.5))])
    fast = fxprune.transform(model, plan, kwargs=call, options=FAST, progress=False)
    own: Any = fxprune.write_back(model, fast.selection, kwargs=call, progress=False)
    assert own.bert.config.intermediate_size == 64 and bert.config.intermediate_size == 128
    close(own, fast, call)


def test_a_pool_with_uniform_widths_is_one_that_a_config_can_say(tmp_path: Path) -> None:
    model, call = made("llama of narrow heads")
    plan = Plan([Rule("*", Channels(0.5, uniform=True), scope="global")])
    fast = fxprune.transform(model, plan, kwargs=call, options=FAST, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxPruneWarning)
        own: Any = fxprune.write_back(model, fast.selection, kwargs=call, progress=False)
    own.save_pretrained(tmp_path)
    close(type(own).from_pretrained(tmp_path).eval(), fast, call)


def test_it_trains() -> None:
    model, call = made("llama")
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
