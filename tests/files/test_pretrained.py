"""save_pretrained and from_pretrained: folders of models whose layers differ, and decoders in the format "deci"."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Channels, Drop, Plan, Rule, errors
from fxprune.errors import FileError, FxPruneError, InputError
from fxprune.own_class.deci import _groups, to_deci
from fxprune.own_class.without_blocks import Bypass
from tests.files.deci_reader import logits_of

transformers = pytest.importorskip("transformers")

EAGER = {"compile": False, "measure": False}
TOKENS = {"vocab_size": 90, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
LLAMA = {**BERT, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0}
FIRST, SECOND = Rule("*.0.*", Channels(0.5)), Rule("*.1.*", Channels(0.25, align=1))
FAMILIES = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Mistral": {"head_dim": 16, "sliding_window": None},
}


def make(kind: str, **sizes: Any) -> Any:
    """A small random model; norms are not ones, nor biases zeros."""
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def smaller(model: Any, rules: list[Any], **more: Any) -> Any:
    """The model written back by a plan."""
    call = {"input_ids": torch.randint(3, 90, (2, 9)), **more}
    fast = fxprune.transform(model, Plan(rules), kwargs=call, options=EAGER, progress=False)
    return fxprune.write_back(model, fast.selection, kwargs=call, progress=False)


def decoder(family: str = "Llama", rules: tuple[Any, ...] = (FIRST, SECOND)) -> Any:
    """A decoder whose layers differ in width."""
    return copy.deepcopy(_decoder(family, rules))


@functools.cache
def _decoder(family: str, rules: tuple[Any, ...]) -> Any:
    model = make(f"{family}ForCausalLM", **{**LLAMA, **TOKENS, **FAMILIES[family]})
    return smaller(model, list(rules), use_cache=False)


MADE: dict[str, Callable[[], Any]] = {
    "heads of BERT": lambda: smaller(make("BertModel", **BERT, **TOKENS), [FIRST, SECOND]),
    "Llama": decoder,
    "branches": lambda: decoder(rules=(FIRST, Drop("model.layers.1.self_attn"), Drop("model.layers.2.mlp"),)),
    "GPT-2": lambda: smaller(
        make("GPT2LMHeadModel", n_embd=64, n_head=4, n_layer=3, vocab_size=90, n_positions=32),
        [FIRST, Drop("transformer.h.2")], use_cache=False,
    ),
    "T5": lambda: smaller(
        make("T5ForConditionalGeneration", **T5, vocab_size=90),
        [FIRST], decoder_input_ids=torch.randint(3, 90, (2, 5)), use_cache=False,
    ),
}  # fmt: skip


def answers(model: Any, name: str = "") -> torch.Tensor:
    """What a model answers to ids that it has not seen."""
    ids = torch.arange(3, 25).reshape(2, 11)
    call = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if name == "T5" else {})
    with torch.no_grad():
        return model(**call)[0]


@pytest.mark.filterwarnings("ignore::fxprune.FxPruneWarning")
@pytest.mark.parametrize("name", MADE)
def test_layers_of_different_widths_round_trip(name: str, tmp_path: Path) -> None:
    own = MADE[name]()
    assert fxprune.save_pretrained(own, tmp_path / "own") == tmp_path / "own"
    again = fxprune.from_pretrained(tmp_path / "own")
    assert type(again) is type(own) and not again.training
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in own.named_parameters()}
    assert torch.equal(answers(again, name), answers(own, name))
    assert (tmp_path / "own" / "fxprune.json").exists()
    # And again, from what was loaded.
    fxprune.save_pretrained(again, tmp_path / "second")
    assert torch.equal(answers(fxprune.from_pretrained(tmp_path / "second"), name), answers(own, name))


@pytest.mark.filterwarnings("ignore::fxprune.FxPruneWarning")
def test_a_new_process_loads_it_and_generates(tmp_path: Path) -> None:
    own = decoder()
    fxprune.save_pretrained(own, tmp_path)
    code = "import sys, torch, fxprune; m = fxprune.from_pretrained(sys.argv[1]); ids = torch.arange(3, 10)[None]; "
    code += "print(m.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path], capture_output=True, text=True)
    wanted = own.generate(torch.arange(3, 10)[None], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == wanted[0].tolist()


def test_where_the_config_says_all_the_folder_is_a_plain_one(tmp_path: Path) -> None:
    own = decoder(rules=(Rule("*", Channels(0.5, uniform=True)),))
    fxprune.save_pretrained(own, tmp_path)
    assert not (tmp_path / "fxprune.json").exists()
    for again in (type(own).from_pretrained(tmp_path).eval(), fxprune.from_pretrained(tmp_path)):
        assert torch.equal(answers(again), answers(own))


@pytest.mark.filterwarnings("ignore::fxprune.FxPruneWarning")
def test_half_precision_and_sharded_files(tmp_path: Path) -> None:
    own = decoder()
    for parameter in own.parameters():
        parameter.data = parameter.data.bfloat16()
    own.config.dtype = torch.bfloat16
    own.save_pretrained(tmp_path)
    fxprune.save_pretrained(own, tmp_path)
    again = fxprune.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16} and torch.equal(answers(again), answers(own))
    shards = tmp_path / "shards"
    fxprune.save_pretrained(own, shards)
    own.save_pretrained(shards, max_shard_size="100KB")
    (shards / "model.safetensors").unlink(missing_ok=True)
    assert torch.equal(answers(fxprune.from_pretrained(shards)), answers(own))
    # What an earlier model left is not taken for this one's, and what is not of it stays.
    (shards / "pruning.safetensors").write_bytes(b"another's")
    fxprune.save_pretrained(own, shards)
    assert (shards / "pruning.safetensors").read_bytes() == b"another's"
    assert not list(shards.glob("*-of-*")) and not (shards / "model.safetensors.index.json").exists()


@pytest.mark.filterwarnings("ignore::fxprune.FxPruneWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_of_deci_answers_what_the_model_answers(family: str, tmp_path: Path) -> None:
    own = decoder(family)
    layers = own.model.layers
    assert len({layer.mlp.gate_proj.out_features for layer in layers}) == 3
    assert len({layer.self_attn.q_proj.out_features for layer in layers}) == 3
    fxprune.save_pretrained(own, tmp_path, format="deci")
    found = logits_of(tmp_path, torch.arange(3, 25).reshape(2, 11))
    torch.testing.assert_close(found, answers(own), rtol=1e-4, atol=1e-4 * float(found.abs().max()))
    again = fxprune.from_pretrained(tmp_path)
    assert type(again) is type(own)
    torch.testing.assert_close(answers(again), answers(own), rtol=1e-4, atol=1e-4 * float(found.abs().max()))
    ids = torch.arange(3, 10)[None]
    same = [m.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None) for m in (own, again)]
    assert torch.equal(*same)


@pytest.mark.filterwarnings("ignore::fxprune.FxPruneWarning")
def test_deci_knows_layers_without_attention_and_without_feed_forward(tmp_path: Path) -> None:
    rules = (Rule("*.0.mlp*", Channels(0.3, align=1)), Drop("model.layers.1.self_attn"), Drop("model.layers.2.mlp"))
    own = decoder(rules=rules)
    fxprune.save_pretrained(own, tmp_path, format="deci")
    blocks = json.loads((tmp_path / "config.json").read_text())["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [False, True, False]
    assert [block["ffn"]["no_op"] for block in blocks] == [False, False, True]
    for found in (logits_of(tmp_path, torch.arange(3, 25).reshape(2, 11)), answers(fxprune.from_pretrained(tmp_path))):
        torch.testing.assert_close(found, answers(own), rtol=1e-4, atol=1e-4 * float(found.abs().max()))


@pytest.mark.filterwarnings("ignore::fxprune.FxPruneWarning")
def test_heads_in_groups_of_different_sizes_are_filled_up(tmp_path: Path) -> None:
    # A layer of 4 heads for 4 keys, one of 3 for 1, one of 8 for 4: eight heads in 4, 2 and 4 groups.
    own = decoder(rules=(Rule("*.2.mlp*", Channels(0.5)),))
    for index, (groups, each) in enumerate([(4, 1), (1, 3)]):
        attention = own.model.layers[index].self_attn
        for name, heads in (("q", groups * each), ("k", groups), ("v", groups)):
            linear = getattr(attention, f"{name}_proj")
            linear.weight = nn.Parameter(linear.weight[: heads * 8].clone())
        attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, : groups * each * 8].clone())
        attention.num_key_value_groups = each
    fxprune.save_pretrained(own, tmp_path, format="deci")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_attention_heads"] == 8
    assert [block["attention"]["n_heads_in_group"] for block in config["block_configs"]] == [2, 8, 2]
    found = logits_of(tmp_path, torch.arange(3, 25).reshape(2, 11))
    torch.testing.assert_close(found, answers(own), rtol=1e-4, atol=1e-4 * float(found.abs().max()))


def test_a_group_has_room_for_its_heads() -> None:
    # Three groups of two do not fit into seven heads, which one or seven groups have.
    assert [_groups(6, 3, heads) for heads in (6, 7, 8, 9)] == [3, None, 4, 3]


def test_write_back_says_at_once_what_the_format_cannot() -> None:
    model = make("BertModel", **BERT, **TOKENS)
    call = {"input_ids": torch.randint(3, 90, (2, 9))}
    plan = Plan([Rule("*.0.intermediate*", Channels(0.5))])
    fast = fxprune.transform(model, plan, kwargs=call, options=EAGER, progress=False)
    with pytest.raises(FxPruneError, match='format "deci" at BertModel: it is for decoders of the shape of llama'):
        fxprune.write_back(model, fast.selection, kwargs=call, format="deci", progress=False)
    with pytest.raises(InputError, match="there is no format 'dezi'"):
        fxprune.write_back(model, fast.selection, kwargs=call, format="dezi", progress=False)


def test_write_back_fills_widths_up_to_what_the_format_has(tmp_path: Path) -> None:
    model = make("LlamaForCausalLM", **LLAMA, **TOKENS)
    call = {"input_ids": torch.randint(3, 90, (2, 9)), "use_cache": False}
    plan = Plan([Rule("*.0.mlp*", Channels(0.7, align=1))])
    fast = fxprune.transform(model, plan, kwargs=call, options=EAGER, progress=False)
    own: Any = fxprune.write_back(model, fast.selection, kwargs=call, format="deci", progress=False)
    assert [layer.mlp.gate_proj.out_features for layer in own.model.layers] == [256, 512, 512]
    fxprune.save_pretrained(own, tmp_path, format="deci")
    found = logits_of(tmp_path, torch.arange(3, 25).reshape(2, 11))
    torch.testing.assert_close(found, answers(own), rtol=1e-4, atol=1e-4 * float(found.abs().max()))


@pytest.mark.parametrize(
    ("kind", "sizes", "why"),
    [
        ("GemmaForCausalLM", {}, "it is for decoders of the shape of llama, mistral, qwen2"),
        ("LlamaModel", {}, "ForCausalLM"),
        ("Qwen3ForCausalLM", {}, "it is for decoders"),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "its layers apply gelu"),
        ("MistralForCausalLM", {"sliding_window": 16}, "slides over 16 of 32 positions"),
    ],
)
def test_what_deci_has_no_word_for(kind: str, sizes: dict[str, Any], why: str, tmp_path: Path) -> None:
    model = make(kind, **{**LLAMA, **TOKENS, **sizes})
    with pytest.raises(FxPruneError, match=why):
        fxprune.save_pretrained(model, tmp_path / "new", format="deci")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.filterwarnings("ignore::fxprune.FxPruneWarning")
def test_deci_wants_the_first_attention_and_whole_heads(tmp_path: Path) -> None:
    with pytest.raises(FxPruneError, match="the attention of its first layer left"):
        fxprune.save_pretrained(decoder(rules=(Drop("model.layers.0.self_attn"),)), tmp_path / "new", format="deci")
    narrow = decoder()
    narrow.model.layers[1].self_attn.head_dim //= 2
    with pytest.raises(FxPruneError, match="heads of layer 1 lost some of their width"):
        fxprune.save_pretrained(narrow, tmp_path / "new", format="deci")
    assert not list(tmp_path.iterdir())


def test_models_of_ones_own_and_formats_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only models of transformers") as told:
        fxprune.save_pretrained(nn.Linear(3, 3), tmp_path)
    assert "fxprune.save(selection, path)" in str(told.value)
    with pytest.raises(InputError, match="there is no format 'deki'"):
        fxprune.save_pretrained(make("BertModel", **BERT, **TOKENS), tmp_path, format="deki")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="it is a file"):
        fxprune.save_pretrained(make("BertModel", **BERT, **TOKENS), tmp_path / "file")


def test_a_module_that_the_config_would_not_make_is_an_error(tmp_path: Path) -> None:
    model = make("BertModel", **BERT, **TOKENS)
    model.pooler = nn.Identity()
    with pytest.raises(FileError, match=r'at "pooler": its config makes another module there \(Identity and BertP'):
        fxprune.save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileError):
        fxprune.save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_number_of_another_kind_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    model = make("LlamaForCausalLM", **LLAMA, **TOKENS)
    model.model.layers[0].self_attn.head_dim = 8.5
    with pytest.raises(FileError, match=r'"model\.layers\.0\.self_attn\.head_dim": its config makes 8 of 8\.5'):
        fxprune.save_pretrained(model, tmp_path)
    model.model.layers[0] = Bypass(None)
    with pytest.raises(FxPruneError, match="layer 0 is a Bypass"):
        fxprune.save_pretrained(model, tmp_path, format="deci")


def test_what_is_filled_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    with pytest.warns(fxprune.FxPruneWarning, match=r"filled up with zeros .* align=256"):
        to_deci(decoder("Qwen2"))


def test_the_folder_stays_as_it_was_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = make("BertModel", **BERT, **TOKENS)
    fxprune.save_pretrained(own, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = make("BertModel", **{**BERT, "num_hidden_layers": 1}, **TOKENS)
    monkeypatch.setattr("fxprune.files.pretrained.differences", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(FileError, match="disk full"):
        fxprune.save_pretrained(other, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def _change(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        change(found)
        (folder / name).write_text(json.dumps(found))

    return spoil


def _values(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return _change("fxprune.json", lambda found: change(found["modules"]["values"]))


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: [file.unlink() for file in f.iterdir()], "config.json"),
    "no JSON": (lambda f: (f / "fxprune.json").write_text("{"), "fxprune.json"),
    "a list": (lambda f: (f / "fxprune.json").write_text("[]"), "no table"),
    "a newer version": (_change("fxprune.json", lambda d: d.update(version=2)), "of version 2"),
    "modules no table": (_change("fxprune.json", lambda d: d.update(modules=[1])), "it is no table"),
    "names no list": (_change("fxprune.json", lambda d: d.update({"left out": 3})), "no list"),
    "a class of none": (_change("config.json", lambda d: d.update(architectures=["os"])), "names the class 'os'"),
    "no class": (_change("config.json", lambda d: d.pop("architectures")), "names the class None"),
    "a path of none": (_values(lambda v: v.update({"no.where": {"size": 1}})), '"no.where"'),
    "a name of none": (_values(lambda v: v["model.layers.0.mlp"].update(forward=1)), "mlp.forward"),
    "another kind": (_values(lambda v: v["model.layers.0.mlp"].update(intermediate_size="7")), "intermediate_size"),
    "a module of code": (
        _change("fxprune.json", lambda d: d["modules"].update(modules={"lm_head": ["Sequential"]})), '"lm_head"'
    ),
    "a length too long": (
        _change("fxprune.json", lambda d: d["modules"].update(lengths={"model.layers": 99})), '"model.layers"'
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors",
    ),
    "elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a"}}'), "elsewhere"
    ),
    "a config of nonsense": (_change("config.json", lambda d: d.update(num_attention_heads="x")), "cannot make a"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::fxprune.FxPruneWarning")
@pytest.mark.parametrize("name", SPOILT)
def test_a_damaged_folder_is_an_error_that_says_what(name: str, tmp_path: Path) -> None:
    fxprune.save_pretrained(decoder(), tmp_path)
    spoil, said = SPOILT[name]
    spoil(tmp_path)
    with pytest.raises(FileError) as told:
        fxprune.from_pretrained(tmp_path)
    assert said in str(told.value)


@pytest.mark.filterwarnings("ignore::fxprune.FxPruneWarning")
def test_a_missing_and_a_strange_tensor_are_errors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    fxprune.save_pretrained(decoder(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n != "model.norm.weight"}, file)
    with pytest.raises(FileError, match=r'it has no tensor "model\.norm\.weight"'):
        fxprune.from_pretrained(tmp_path)
    save_file({**tensors, "other": torch.zeros(1)}, file)
    with pytest.raises(FileError, match='its class has no tensor "other"'):
        fxprune.from_pretrained(tmp_path)
    save_file({**tensors, "model.norm.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(FileError, match="which its class cannot use"):
        fxprune.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore::fxprune.FxPruneWarning")
def test_no_code_of_the_folder_runs(tmp_path: Path) -> None:
    fxprune.save_pretrained(decoder(), tmp_path)
    _change("config.json", lambda d: d.update(auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}))(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    assert type(fxprune.from_pretrained(tmp_path)).__name__ == "LlamaForCausalLM"


def test_a_deci_folder_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["DeciLMForCausalLM"]}')
    with pytest.raises(FileError, match="fxprune did not write"):
        fxprune.from_pretrained(tmp_path)
