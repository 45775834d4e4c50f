"""write_back without branches: what stands in their place answers zeros, and transformers still generate."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune
from fxprune import Channels, Drop, FxPruneWarning, Plan, Rule
from fxprune.own_class.without_blocks import Bypass, NoBranch
from tests.oracle import assert_close
from tests.own_class.own_models import FAST, count, pruned, same, snapshot, written
from tests.shrink.branch_models import CASES, LAYER, Branches, forced_to_zero, llama
from tests.shrink.drop_models import TEXT, run
from tests.structured_oracle import net, randomised


def written_back(case: Branches, model: Any, *rules: Rule) -> tuple[Any, Any]:
    """What transform makes of a model without the case's branches, and the smaller model of its own class."""
    args, kwargs = case.call(2)
    plan = Plan([*map(Drop, case.paths), *rules])
    fast = fxprune.transform(model, plan, args, kwargs, options=FAST, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxPruneWarning)
        return fast, fxprune.write_back(model, fast.selection, args, kwargs, progress=False)


@pytest.mark.parametrize("name", CASES)
def test_the_copy_is_the_model_whose_branches_answer_zeros(name: str) -> None:
    case = CASES[name]
    model = case.make()
    before = snapshot(model)
    fast, own = written_back(case, model)
    assert type(own) is type(model) and same(snapshot(model), before)
    assert all(type(own.get_submodule(path)) is NoBranch for path in case.paths)
    args, kwargs = case.call(5)
    assert_close(run(own, *args, **kwargs), run(forced_to_zero(model, case.paths), *args, **kwargs))
    # A parameter that its class itself reads, such as a layer scale, stays.
    bare = sum(own.get_parameter(name).numel() for name in case.gone if name in dict(own.named_parameters()))
    assert count(own) == fast.report.parameters[1] + bare < count(model)


def test_what_only_the_branch_read_is_passed_by() -> None:
    _, own = written_back(CASES["llama's attention"], llama())
    assert type(own.get_submodule(f"{LAYER}.input_layernorm")) is Bypass
    assert type(own.get_submodule(f"{LAYER}.post_attention_layernorm")) is not Bypass


def test_channels_leave_beside_branches() -> None:
    case = CASES["llama, one of each"]
    fast, own = written_back(case, llama(), Rule("model.layers.*.weight", Channels(0.5, align=1)))
    assert count(own) == fast.report.parameters[1]
    assert own.get_submodule(f"{LAYER}.mlp.up_proj").out_features == 24
    args, kwargs = case.call(5)
    assert_close(run(own, *args, **kwargs), run(fast, *args, **kwargs))


def test_zeros_as_wide_as_the_stream_has_become() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + m.down(F.relu(m.up(x))))

    parts = dict(stem=nn.Linear(10, 16), up=nn.Linear(16, 24), down=nn.Linear(24, 16), head=nn.Linear(16, 4))
    model, x = net(forward, **parts), torch.randn(3, 10)
    fast = pruned(model, (x,), Plan([Drop("down"), Rule("stem.weight", Channels(0.5))]))
    own = written(model, fast.selection, x)
    assert own.down.sizes == (-1, 8) and own.stem.out_features == 8
    torch.testing.assert_close(own(x), fast(x), rtol=1e-4, atol=1e-5)


def test_a_branch_in_a_list_keeps_its_place() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for branch in self.branches:
                x = x + branch(x)
            return x

    model, x = randomised(Listed()), torch.randn(4, 8)
    fast = pruned(model, (x,), Plan([Drop("branches.1")]))
    own = written(model, fast.selection, x)
    assert len(own.branches) == 3 and type(own.branches[1]) is NoBranch
    torch.testing.assert_close(own(x), forced_to_zero(model, ["branches.1"])(x), rtol=1e-4, atol=1e-5)


def test_it_trains() -> None:
    case = CASES["layer scale"]
    model = case.make()
    _, own = written_back(case, model)
    (x,), _ = case.call(4)
    oracle = forced_to_zero(model, case.paths)
    for each in (own, oracle):
        each(x).square().sum().backward()
    for name, parameter in own.named_parameters():
        if name not in case.gone:
            assert_close(parameter.grad, oracle.get_parameter(name).grad)


def decoder(*paths: str) -> Any:
    """A small Llama without these branches, of its own class; it warns of what it warns of."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    call = {"input_ids": torch.randint(3, 99, (2, 9)), "use_cache": False}
    plan = Plan([Drop(path) for path in paths])
    selection = fxprune.transform(model, plan, kwargs=call, options=FAST, progress=False).selection
    return fxprune.write_back(model, selection, kwargs=call, progress=False)


def generated(own: Any, ids: Tensor, mask: Tensor, *, use_cache: bool) -> list[Tensor]:
    """The logits of each step."""
    more: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
    more |= {"output_logits": True, "return_dict_in_generate": True, "use_cache": use_cache}
    return own.generate(ids, attention_mask=mask, **more).logits


def padded() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 99, (2, 9))
    mask = torch.ones_like(ids)
    ids[0, :4] = mask[0, :4] = 0
    return ids, mask


def near(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two runs have the same logits at every step."""
    return all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in zip(a, b, strict=True))


def test_a_decoder_without_the_attention_of_a_middle_layer_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxprune.errors, "_warned", set())
    with pytest.warns(FxPruneWarning) as told:
        own = decoder(f"{LAYER}.self_attn", "model.layers.2.mlp")
    assert not any("cache" in str(one.message) for one in told)
    ids, mask = padded()
    cached = generated(own, ids, mask, use_cache=True)
    assert near(cached, generated(own, ids, mask, use_cache=False))
    # Without padding and by hand.
    cached, whole = generated(own, ids[1:], mask[1:], use_cache=True), ids[1:]
    with torch.no_grad():
        for logits in cached:
            step = own(input_ids=whole, use_cache=False).logits[:, -1]
            torch.testing.assert_close(logits, step, rtol=1e-3, atol=1e-4)
            whole = torch.cat([whole, step.argmax(-1, keepdim=True)], 1)


def test_a_decoder_without_its_first_attention_is_told_of_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxprune.errors, "_warned", set())
    with pytest.warns(FxPruneWarning) as told:
        own = decoder("model.layers.0.self_attn")
    (text,) = [str(one.message) for one in told if "cache" in str(one.message)]
    assert "counts 0 of 9 tokens" in text and "use_cache=False" in text and "keep the attention" in text
    ids, mask = padded()
    right = generated(own, ids, mask, use_cache=False)
    # What is told is true: with padding the cache goes wrong, and without it nothing is.
    assert not near(generated(own, ids, mask, use_cache=True), right)
    alone = generated(own, ids[:1, 4:], mask[:1, 4:], use_cache=False)
    assert near([step[:1] for step in right[:1]], alone[:1])
