"""write_back by the names of architectures: configs follow, from_pretrained loads, generate answers as it should."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune import Channels, FxPruneWarning, Plan, Rule
from fxprune.own_class.attributes import numbers
from tests.own_class.own_models import FAST, count, same, snapshot

transformers = pytest.importorskip("transformers")

from tests.own_class.by_name_models import (  # noqa: E402
    CASES,
    GENERATING,
    HALF,
    IMAGE,
    TEXT,
    call_of,
    close,
    generates_like,
    make,
    oracle_of,
)

# What a config says of where it was loaded from, and not of its model.
WHENCE = ("_name_or_path", "architectures", "dtype", "transformers_version")

# Where heads are pruned alone, the config computes their width from how many there are.
NO_CONFIG_SAYS: dict[str, tuple[dict[str, Any], str, str]] = {
    "roberta": ({"num_hidden_layers": 1}, "*attention*", r"roberta\.encoder\.layer\.0\.attention\.self"),
    "distilbert": ({"n_layers": 1}, "*attention*", r"transformer\.layer\.0\.attention\.q_lin"),
    "gpt2": ({"n_layer": 2}, "*attn*", r"transformer\.h\.0\.attn\.c_attn"),
    "whisper": ({"encoder_layers": 1, "decoder_layers": 1}, "*attn*", r"model\.encoder\.layers\.0\.self_attn"),
    "clip": (
        {"text_config": TEXT | {"num_hidden_layers": 1}, "vision_config": IMAGE | {"num_hidden_layers": 1}},
        "*attn*",
        r"text_model\.encoder\.layers\.0\.self_attn",
    ),
    "modernbert": ({"num_hidden_layers": 2}, "*attn*", r"model\.layers\.0\.attn\.Wqkv"),
}
# Half of the residual width with half of the heads leaves the width of a head.
THINNER: dict[str, tuple[dict[str, Any], list[Any], dict[str, Any]]] = {
    # Its FFN stays as wide as it was, which was 4 * n_embd.
    "gpt2": (
        {"n_layer": 2},
        [Rule("*wte*", Channels(0.5, unit="mixed")), Rule("*attn*", HALF)],
        {"n_embd": 32, "n_head": 2, "n_inner": 256},
    ),
    "modernbert": (
        {"num_hidden_layers": 2},
        [Rule("*tok_embeddings*", Channels(0.5, unit="mixed")), Rule("*attn*", HALF)],
        {"hidden_size": 32, "num_attention_heads": 2},
    ),
}


@dataclasses.dataclass(frozen=True)
class Written:
    """A model, what transform and write_back made of it, and a call of it."""

    model: Any
    fast: Any
    own: Any
    call: dict[str, Any]


def write(name: str, plan: Plan, **config: Any) -> Written:
    """A smaller model, of which there is nothing to tell."""
    torch.manual_seed(0)
    model, call = make(name, **config)
    before = snapshot(model)
    fast = fxprune.transform(model, plan, kwargs=call, options=FAST, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxPruneWarning)
        own = fxprune.write_back(model, fast.selection, kwargs=call, progress=False)
    assert same(snapshot(model), before)
    return Written(model, fast, own, call)


@functools.cache
def written(name: str) -> Written:
    """The smaller model of a name, by its plan."""
    return write(name, Plan(CASES[name].plan))


def said(config: dict[str, Any], around: str = "") -> Iterator[tuple[str, Any]]:
    """What a config says of its model, by name, and what the configs in it say."""
    for name, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from said(value, f"{around}{name}.")
        elif name not in WHENCE:
            yield around + name, value


def says(config: Any) -> dict[str, Any]:
    """What a config says of its model."""
    return dict(said(config.to_dict()))


def changed(one: Written) -> dict[str, Any]:
    """What the config of the smaller model says otherwise than that of the model."""
    before = says(one.model.config)
    return {name: value for name, value in says(one.own.config).items() if before.get(name) != value}


def loads_alike(own: Any, call: dict[str, Any], folder: Path) -> None:
    """Asserts that from_pretrained makes the same model of what save_pretrained writes."""
    own.save_pretrained(folder)
    again = type(own).from_pretrained(folder).eval()
    close(again, own, call)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in own.named_parameters()}
    assert says(transformers.AutoConfig.from_pretrained(folder)) == says(own.config) == says(again.config)
    modules = dict(again.named_modules())
    for path, module in own.named_modules():
        assert dict(remembered(module)) == dict(remembered(modules[path])), path


def remembered(module: Any) -> Iterator[tuple[Any, int]]:
    """The whole numbers that a module holds itself, and those that its config holds."""
    yield from (((name, item), value) for name, item, value in numbers(module))
    if isinstance(getattr(module, "config", None), transformers.PreTrainedConfig):
        yield from ((("config", name, item), value) for name, item, value in numbers(module.config))


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_shrunk_graph_computes(name: str) -> None:
    one = written(name)
    assert type(one.own) is type(one.model) and count(one.own) == one.fast.report.parameters[1] < count(one.model)
    close(one.own, one.fast, one.call)
    # Other lengths, where the graph does not go.
    close(one.own, oracle_of(one.model, one.fast), call_of(name, 12))


@pytest.mark.parametrize("name", CASES)
def test_the_config_says_its_numbers_and_no_others(name: str) -> None:
    one = written(name)
    assert changed(one) == CASES[name].says


@pytest.mark.parametrize("name", CASES)
def test_from_pretrained_loads_what_save_pretrained_writes(name: str, tmp_path: Path) -> None:
    one = written(name)
    loads_alike(one.own, one.call, tmp_path)


@pytest.mark.parametrize("name", GENERATING)
def test_generate_with_a_cache_is_greedy_search_over_the_oracle(name: str) -> None:
    one = written(name)
    generates_like(one.own, oracle_of(one.model, one.fast), one.call)


@pytest.mark.parametrize("name", NO_CONFIG_SAYS)
def test_heads_that_no_config_says_leave_and_are_told(name: str) -> None:
    config, pattern, layers = NO_CONFIG_SAYS[name]
    model, call = make(name, **config)
    fast: Any = fxprune.transform(model, Plan([Rule(pattern, HALF)]), kwargs=call, options=FAST, progress=False)
    what = rf"no {type(model.config).__name__} gives {type(model).__name__} the widths of {layers}"
    with pytest.warns(FxPruneWarning, match=what) as told:
        own = fxprune.write_back(model, fast.selection, kwargs=call, progress=False)
    assert ["from_pretrained will not load" in str(one.message) for one in told] == [True]
    assert count(own) == fast.report.parameters[1] < count(model)
    close(own, fast, call)
    if name in GENERATING:
        generates_like(own, oracle_of(model, fast), call)


@pytest.mark.parametrize("name", THINNER)
def test_a_config_says_how_many_heads_a_smaller_width_is_split_in(name: str, tmp_path: Path) -> None:
    """No tensor is of another shape with more heads, each of them narrower."""
    config, rules, expected = THINNER[name]
    one = write(name, Plan(rules), **config)
    close(one.own, one.fast, one.call)
    assert changed(one) == expected
    loads_alike(one.own, one.call, tmp_path)
