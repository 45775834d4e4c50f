"""The zoo: its list is whole, its randomisation hides nothing, and its judgement catches what it is there to catch."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from benchmarks import zoo, zoo_child
from benchmarks.zoo_child import Outcome, count_removed, difference, judge, misshapen, run_model, zero
from benchmarks.zoo_model import SHARE, ZooModel
from benchmarks.zoo_models import all_models, choose
from benchmarks.zoo_randomise import randomise

FAMILIES = [
    "torchvision/resnet50",
    "resnext",
    "densenet",
    "inception",
    "mobilenetv1",
    "mobilenetv2",
    "mobilenet_v3",
    "mobilenetv4",
    "efficientnet",
    "shufflenet",
    "regnet",
    "convnext",
    "vgg",
    "squeezenet",
    "googlenet",
    "deeplabv3",
    "fcn",
    "vit",
    "deit",
    "swin",
    "maxvit",
    "mvit",
    "coatnet",
    "pvt",
    "transformers/bert",
    "roberta",
    "distilbert",
    "electra",
    "albert",
    "deberta",
    "mpnet",
    "gpt2",
    "gpt_neox",
    "opt",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "mixtral",
    "falcon",
    "bloom",
    "t5",
    "bart",
    "whisper",
    "clip",
    "detr",
    "segformer",
    "mamba",
    "wav2vec2",
]


def test_list_spans_the_sources_and_families() -> None:
    models = all_models()
    counts = {source: sum(m.source == source for m in models) for source in zoo.SOURCES}
    assert counts["torchvision"] >= 85
    assert sum(counts.values()) - counts["torchvision"] >= 120
    assert all(counts.values())
    labels = [model.label for model in models]
    assert [family for family in FAMILIES if not any(family in label for label in labels)] == []


def test_every_share_below_the_ordinary_has_a_reason() -> None:
    for model in all_models():
        assert 0.0 < model.share < 1.0, model.label
        assert model.share >= SHARE or model.why, model.label


def test_choose_by_glob_and_source() -> None:
    assert [m.label for m in choose(["resnet50"], ["torchvision"])] == ["torchvision/resnet50"]
    assert {m.source for m in choose(["timm/*"])} == {"timm"}
    assert choose(["no such model"]) == []


class Rich(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.conv = nn.Conv2d(3, 16, 3)
        self.bn = nn.BatchNorm2d(16)
        self.attention = nn.MultiheadAttention(16, 4)
        self.norm = nn.LayerNorm(16)
        self.layer_scale = nn.Parameter(torch.full((16,), 1e-6))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.head = nn.Linear(16, 32)
        self.head.weight = self.table.weight
        self.register_buffer("rope", torch.arange(8.0))
        self.register_buffer("index", torch.arange(8))


def test_randomise_leaves_nothing_silent_and_repeats() -> None:
    model, again, other = Rich(), Rich(), Rich()
    randomise(model, 0), randomise(again, 0), randomise(other, 1)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    for name, value in model.named_parameters():
        assert not torch.equal(value, dict(other.named_parameters())[name]), name
        assert bool((value != 0).all()) and float(value.detach().std()) > 0.05, name
    for name in ("bn.weight", "bn.running_var", "norm.weight", "layer_scale"):
        assert bool(((state[name] >= 0.5) & (state[name] <= 1.5)).all()), name
    assert float(state["bn.running_mean"].std()) > 0.05
    assert torch.equal(state["rope"], torch.arange(8.0)) and torch.equal(state["index"], torch.arange(8))
    assert model.head.weight is model.table.weight


def test_randomise_scales_by_fan_in() -> None:
    for module, fan in ((nn.Linear(400, 50), 400), (nn.Conv2d(32, 40, 3), 288), (nn.ConvTranspose1d(30, 60, 4), 120)):
        randomise(module, 0)
        assert float(module.weight.detach().std()) == pytest.approx(fan**-0.5, rel=0.05)


def test_difference() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    assert difference([a], [a]) == 0.0
    assert difference([b, a], [a, b]) == 0.25
    assert difference([a], [a, a]) == math.inf
    assert difference([], []) == math.inf
    assert difference([a], [a[:1]]) == math.inf
    assert difference([a], [torch.tensor([1.0, math.nan])]) == math.inf
    assert difference([torch.tensor([1.0, math.nan])], [a]) == math.inf
    masked = torch.tensor([-math.inf, 2.0])
    assert difference([masked], [masked]) == 0.0
    assert difference([a], [masked]) == math.inf
    assert difference([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == math.inf


def test_zero_reaches_parameters_buffers_and_parametrized_weights() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4))
    model[1].running_mean.fill_(1.0)
    gone = torch.tensor([1, 3])
    removed = {name: [(0, gone)] for name in ("0.weight", "0.bias", "1.weight", "1.running_mean")}
    zero(model, removed)
    for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].running_mean):
        assert bool((tensor[gone] == 0).all()) and bool((tensor[[0, 2]] != 0).all())
    assert bool((model[1].running_var == 1).all())


def test_count_removed_counts_each_parameter_once_and_no_buffer() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model[2].weight, model[2].bias = nn.Parameter(model[0].weight.detach().t().contiguous()), model[0].bias
    tied = nn.Sequential(model[0], model[0])
    both = [(0, torch.tensor([0, 1])), (1, torch.tensor([3]))]
    assert count_removed(tied, {"0.weight": both, "1.weight": both}) == 24 - 4 * 3
    assert count_removed(model, {"1.running_mean": [(0, torch.tensor([0]))]}) == 0


def test_misshapen_names_what_did_not_shrink() -> None:
    model, small = nn.Linear(4, 6), nn.Linear(4, 5)
    outcome = Outcome(small, {"weight": [(0, torch.tensor([2]))]}, [], [], [])
    assert misshapen(model, outcome) == ["bias: [5], not [6]"]


SOUND = {"untouched": True, "difference": 1e-6, "from_dense": 0.5, "misshapen": [], "share": 0.3}


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "ok"),
        ({"untouched": False}, "model changed"),
        ({"difference": 2e-4}, "wrong"),
        ({"difference": math.nan}, "wrong"),
        ({"difference": 2e-4, "difference_float64": 1e-8}, "wrong"),
        ({"difference": 2e-4, "difference_float64": 1e-12}, "rounding"),
        ({"misshapen": ["a"]}, "wrong shapes"),
        ({"share": 0.1}, "share missed"),
        ({"from_dense": 1e-3}, "oracle too near"),
        ({"from_dense": math.nan}, "oracle too near"),
    ],
)
def test_judge(change: dict, verdict: str) -> None:
    assert judge(SOUND | change, 0.15) == verdict


def small_model() -> ZooModel:
    build = lambda: nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()  # noqa: E731
    return ZooModel("mlp", "timm", build, lambda: ((torch.randn(2, 8),), {}))


ROUNDS = 2e-3


class Cut(nn.Module):
    """What a pruner returns: the model with slices of it at zero, and perhaps with a mistake on top."""

    def __init__(self, model: nn.Module, mistake: float) -> None:
        super().__init__()
        self.inner, self.mistake = model, mistake

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The mistake of "rounding" is one of float32 alone.
        rounds = self.mistake == ROUNDS and x.dtype == torch.float64
        return self.inner(x) * (1.0 if rounds else 1 + self.mistake)


def fake_prune(
    model: nn.Module, call: object, *, mistake: float = 0.0, count: int = 24, touch: bool = False
) -> Outcome:
    gone = torch.arange(count)
    removed = {
        "0.weight": [(0, gone)],
        "0.bias": [(0, gone)],
        "2.weight": [(0, gone), (1, gone)],
        "2.bias": [(0, gone)],
    }
    removed["4.weight"] = [(1, gone)]
    copied = copy.deepcopy(model)
    zero(copied, removed)
    if touch:
        with torch.no_grad():
            model[0].weight.mul_(1.5)
    return Outcome(Cut(copied, mistake), removed, ["", "graph output (x)", "windows slide over it"], [], [])


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({}, "ok"),
        ({"mistake": 1e-3}, "wrong"),
        ({"mistake": ROUNDS}, "rounding"),
        ({"touch": True}, "model changed"),
        ({"count": 2}, "share missed"),
        ({"mistake": math.nan}, "wrong"),
    ],
)
def test_run_model_judges_the_pruner(monkeypatch: pytest.MonkeyPatch, settings: dict, verdict: str) -> None:
    monkeypatch.setattr(zoo_child, "prune", functools.partial(fake_prune, **settings))
    row = run_model(small_model())
    assert row["verdict"] == verdict
    assert row["captured"] and row["transformed"]
    assert (row["groups"], row["frozen"], row["reasons"]) == (2, 0.5, [("graph output", 1)])
    if verdict == "ok":
        kept = 40 * 9 + 40 * 41 + 40 * 4 + 4
        assert row["share"] == pytest.approx(1 - kept / row["parameters"])


def test_run_model_tells_a_failed_capture_from_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Outcome:
        raise ValueError("no")

    monkeypatch.setattr(zoo_child, "prune", refuse)
    row = run_model(small_model())
    assert (row["verdict"], row["captured"], row["transformed"]) == ("raises", True, False)
    assert "ValueError: no" in row["error"]

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight if x.sum() > 0 else x

    branching = dataclasses.replace(small_model(), build=lambda: Branches().eval())
    row = run_model(branching)
    assert (row["verdict"], row["captured"], row["transformed"]) == ("not captured", False, False)


def test_run_model_refuses_outputs_that_are_not_finite() -> None:
    class Endless(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) / 0 * 0

    model = dataclasses.replace(small_model(), build=lambda: Endless(8, 8).eval())
    assert run_model(model)["verdict"] == "not finite"


def test_failures_stay_in_the_denominator() -> None:
    row = {
        "source": "timm",
        "label": "timm/a",
        "committed": 0.15,
        "captured": True,
        "transformed": True,
        "seconds": 1.0,
    }
    rows = [
        row | SOUND | {"verdict": "ok"},
        row | SOUND | {"verdict": "wrong", "difference": 0.1},
        {"source": "timm", "label": "timm/b", "committed": 0.15, "verdict": "time limit", "seconds": 300.0},
        {"source": "timm", "label": "timm/c", "committed": 0.15, "verdict": "crashed", "error": "exit status -9: "},
    ]
    timm, everything = zoo.coverage(rows)
    assert (timm["models"], timm["passed"], timm["exact"], timm["silently_wrong"]) == (4, 1, 1, 1)
    assert everything | {"source": "timm"} == timm
    assert [met for _, met in zoo.targets(rows)] == [False, False]
    assert zoo.format_rows(rows).count("timm/") == 4
    assert "25%" in zoo.format_coverage([timm, everything])


def test_a_share_raised_later_is_missed_by_a_row_kept(tmp_path: Path) -> None:
    row = {"label": "timm/mlp", "verdict": "ok"} | SOUND
    model = small_model()
    assert zoo.with_list(row, model)["verdict"] == "ok"
    assert zoo.with_list(row, dataclasses.replace(model, share=0.4))["verdict"] == "share missed"


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run_child(model: ZooModel, work: Path, seconds: float) -> dict:
        ran.append(model.name)
        return {"label": model.label, "verdict": "ok"} | SOUND

    monkeypatch.setattr(zoo, "run_child", run_child)
    models = [dataclasses.replace(small_model(), name=name) for name in ("a", "b", "c")]
    for name, verdict in (("a", "ok"), ("b", "wrong")):
        row = {"label": f"timm/{name}", **SOUND, "verdict": verdict}
        zoo.row_file(tmp_path, dataclasses.replace(models[0], name=name)).write_text(json.dumps(row))
    for extra, expected in (([], ["c"]), (["--failed"], ["b", "c"]), (["--again"], ["a", "b", "c"])):
        ran.clear()
        rows = zoo.run_all(models, zoo.parse(["--work", str(tmp_path), "--no-progress", *extra]))
        assert ran == expected
        assert [row["name"] for row in rows] == ["a", "b", "c"]


def test_a_child_that_dies_leaves_a_row(tmp_path: Path) -> None:
    unknown = dataclasses.replace(small_model(), source="nowhere")
    row = zoo.run_child(unknown, tmp_path, 600)
    assert row["verdict"] == "crashed" and "exit status 1" in row["error"]
    assert zoo.read_row(zoo.row_file(tmp_path, unknown)) == row
    row = zoo.run_child(unknown, tmp_path, 0.01)
    assert row["verdict"] == "time limit"


def test_the_list_prints_with_its_commitments(capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main(["--list", "--source", "torchvision"]) == 0
    assert "torchvision/resnet50" in capsys.readouterr().out
    assert zoo.main(["--only", "nothing at all"]) == 2


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, padding=1)


def test_a_weight_that_a_forward_computes_is_zeroed_as_what_it_comes_to() -> None:
    model = nn.Sequential(Standardised(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    before = copy.deepcopy(model)
    call = ((torch.randn(2, 3, 5, 5),), {})
    zoo_child.compute_weights(model, call)
    assert difference(zoo_child.outputs(model, call), zoo_child.outputs(before, call)) < 1e-6
    zero(model, {"0.weight": [(1, torch.tensor([2]))], "2.weight": [(1, torch.tensor([0]))]})
    weight = before[0].weight - before[0].weight.mean((1, 2, 3), keepdim=True)
    weight = torch.cat([weight[:, :2], torch.zeros(4, 1, 3, 3)], 1)
    hidden = nn.functional.conv2d(call[0][0], weight, before[0].bias, padding=1).relu()
    hidden[:, 0] = 0
    assert difference(zoo_child.outputs(model, call), [before[2](hidden).detach()]) < 1e-6
    assert "forward" not in vars(model[2])
