"""Results saved here and loaded by a process of its own: what comes back, how fast, in how much memory.

    python -m benchmarks.round_trips [--only minilm gpt2]

Each model is transformed without compiling, saved, and loaded by a new process, which knows nothing of the model. There
its outputs are held against the saved result's, weights bit for bit, the report's text, and what a call of other sizes
or dtypes is told. Load times are medians of five loads in that process; memory is what the load adds to the process at
its peak, over the size of the file. Ends with a table and writes results/round_trips-<cpu>.json. It needs the zoo's
packages (.venv-zoo).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils import _pytree as pytree
from tqdm import tqdm

import fxprune
from benchmarks.cpu_language import language_models
from benchmarks.machine import describe_machine, slug
from benchmarks.round_trips_child import refusals, weights_of
from benchmarks.zoo_vision import define_operators
from fxprune import Channels, Plan, Rule, Unstructured

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent


@dataclasses.dataclass(frozen=True)
class Trip:
    """A model with a call, and how it is pruned."""

    build: Callable[[], nn.Module]
    call: Callable[[], dict[str, Any]]
    plan: Plan | None
    trainable: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _minilm() -> nn.Module:
    return next(model for model in language_models() if model.name == "minilm-128").build()


def _ids() -> dict[str, Any]:
    return {"ids": torch.randint(0, 30000, (1, 128))}


def _vision(name: str, silenced: bool = False) -> nn.Module:
    define_operators()
    model = getattr(importlib.import_module("torchvision.models"), name)()
    if silenced:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                prune.ln_structured(module, "weight", 0.5, 2, 0)
    return model


def _transformers(kind: str, config: str, **sizes: Any) -> nn.Module:
    define_operators()
    transformers = importlib.import_module("transformers")
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes))


class Tagger(nn.Module):
    """An LSTM in both directions and a label for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(5000, 128), nn.LSTM(128, 128, 2, batch_first=True, bidirectional=True)
        self.hidden, self.labels = nn.Linear(256, 512), nn.Linear(512, 17)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores [n, s, 17] for ids [n, s]."""
        return self.labels(self.hidden(self.lstm(self.words(ids))[0]).relu())


class Backbone(nn.Module):
    """ResNet-18's maps at four strides, by name, as detectors take them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _vision("resnet18")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of images [n, 3, h, w] at strides 4, 8, 16 and 32."""
        body: Any = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        maps = {}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(body, name)(x)
            maps[name] = x
        return maps


def _zeros(pattern: str, amount: float) -> Plan:
    return Plan([Rule(pattern, Unstructured(amount))])


def _half() -> Plan:
    return Plan([Rule("*", Channels(0.5))])


GROUPED = {
    "vocab_size": 2000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "use_cache": False,
}  # fmt: skip
T5 = {"vocab_size": 2000, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4, "use_cache": False}
TRIPS: dict[str, Trip] = {
    "minilm 90% packed": Trip(_minilm, _ids, _zeros("bert.encoder.*.weight", 0.9), options={"layout": "nonzeros"}),
    "minilm half the heads and FFN": Trip(_minilm, _ids, _half()),
    "resnet18 half the channels": Trip(
        lambda: _vision("resnet18"), lambda: {"x": torch.randn(1, 3, 224, 224)}, _half()
    ),
    "resnet18 silenced channels": Trip(
        lambda: _vision("resnet18", True), lambda: {"x": torch.randn(1, 3, 224, 224)}, None
    ),
    "resnet18 half, trainable": Trip(
        lambda: _vision("resnet18"), lambda: {"x": torch.randn(2, 3, 64, 64)}, _half(), trainable=True
    ),
    "resnet18 90% in nets": Trip(
        lambda: _vision("resnet18"),
        lambda: {"x": torch.randn(1, 3, 224, 224)},
        _zeros("*.weight", 0.9),
        options={"layout": "nonzeros"},
    ),
    "gpt2 80% packed": Trip(
        lambda: _transformers("GPT2LMHeadModel", "GPT2Config", use_cache=False),
        lambda: {"input_ids": torch.randint(0, 50000, (1, 8))},
        _zeros("transformer.h.*.weight", 0.8),
        options={"layout": "bitmap"},
    ),
    "llama, grouped queries, half": Trip(
        lambda: _transformers("LlamaForCausalLM", "LlamaConfig", **GROUPED),
        lambda: {"input_ids": torch.randint(0, 2000, (2, 16))},
        _half(),
    ),
    "t5 half": Trip(
        lambda: _transformers("T5ForConditionalGeneration", "T5Config", **T5),
        lambda: {"input_ids": torch.randint(0, 2000, (2, 16)), "decoder_input_ids": torch.randint(0, 2000, (2, 7))},
        _half(),
    ),
    "lstm tagger 90%": Trip(
        Tagger,
        lambda: {"ids": torch.randint(0, 5000, (4, 20))},
        _zeros("*.weight", 0.9),
        options={"layout": "nonzeros"},
    ),
    "detection backbone, dict output": Trip(Backbone, lambda: {"images": torch.randn(1, 3, 128, 128)}, _half()),
}


def run(name: str, trip: Trip, folder: Path) -> dict[str, Any]:
    """The row of one model."""
    torch.manual_seed(0)
    model, call = trip.build().eval(), trip.call()
    options = {} if trip.trainable else {"compile": False, "measure": False, **trip.options}
    result = fxprune.transform(model, trip.plan, kwargs=call, trainable=trip.trainable, options=options, progress=False)
    path = fxprune.save(result, folder / "model.safetensors")
    with torch.no_grad():
        outputs = pytree.tree_leaves(result(**call))
    told = {"call": call, "outputs": outputs, "report": str(result.report), "refusals": refusals(result, call)}
    torch.save({**told, "weights": weights_of(result)}, folder / "told.pt")
    dense = {name: p.nbytes for name, p in model.named_parameters()}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.round_trips_child", str(path), str(folder / "told.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"model": name, "failed": done.stderr.strip().splitlines()[-1]}
    weights = [weight for weight in result.report.weights if weight.layout != "dense"]
    return {
        "model": name,
        "file": path.stat().st_size,
        "dense": sum(dense.values()),
        "packed": sum(weight.lowered.bytes for weight in weights) / max(1, sum(w.lowered.dense_bytes for w in weights)),
        **json.loads(done.stdout.splitlines()[-1]),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the trips; 1 where something came back as another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="models whose names begin so")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--no-progress", action="store_true")
    given = parser.parse_args(arguments)
    names = [name for name in TRIPS if not given.only or any(name.startswith(each) for each in given.only)]
    rows = []
    for name in tqdm(names, disable=True if given.no_progress else None):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(name, TRIPS[name], Path(folder)))
    header = (
        "model",
        "file MB",
        "of dense",
        "packed of dense",
        "outputs off",
        "weights, report, refusals",
        "load s",
        "memory of file",
    )
    print(tabulate([_words(row) for row in rows], headers=header, disable_numparse=True))
    machine = describe_machine()
    if not given.only:
        given.results.mkdir(parents=True, exist_ok=True)
        file = given.results / f"round_trips-{slug(machine['cpu'])}.json"
        figures = {"benchmark": "round_trips", "machine": machine, "rows": rows}
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten: {file.name}")
    return 0 if all(row.get("same") and row["error"] <= 1e-6 for row in rows) else 1


def _words(row: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return (row["model"], row["failed"])
    return (
        row["model"],
        f"{row['file'] / 1e6:.1f}",
        f"{row['file'] / row['dense']:.2f}",
        f"{row['packed']:.3f}" if row["packed"] else "-",
        f"{row['error']:.0e}",
        "the same" if row["same"] else f"other: {row['others']}",
        f"{row['seconds']:.2f}",
        f"{row['memory'] / row['file']:.2f}",
    )


if __name__ == "__main__":
    raise SystemExit(main())
