"""How much of what ln_structured left without effect leaves exactly, and how much faster the rest is.

    python -m benchmarks.exact [--models resnet50 ...] [--amounts 0.3 0.5 0.6] [--time] [--threads 1] [--quick]

Every weight of a convolution or linear layer but the classifier's loses channels by torch.nn.utils.prune.ln_structured,
along dim 0 or dim 1; biases and batch-norms stay as they are. fxprune.transform is then given that model as it is.

`ideal` counts the parameters that could leave: those of every index of a group of coupled channels that no product
reads, or that holds the same for every input wherever one does. It is measured, not derived: from activations of random
inputs under several draws of the weights that are not zero, and from the gradients behind them. `left` is what did
leave, at widths that are multiples of eight and, as a share, at any width (options align=1). `error` is the largest of
max|a - b| / max|b| against the masked model. With --time the result is also timed against the masked model as that runs
best.

Needs torchvision and transformers: `.venv-zoo/bin/python -m benchmarks.exact` after `make zoo`. Figures go to results/,
in place of those taken before for the same model, amount and dim; --quick runs one small network and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxprune
from benchmarks.machine import describe_machine, slug
from benchmarks.zoo_randomise import randomise
from benchmarks.zoo_vision import define_operators
from fxprune import prune
from fxprune.couple.axis import atoms
from fxprune.couple.coupling import Coupling
from fxprune.couple.indices import positions
from fxprune.shrink.dead.dead import Dead

RESULTS = Path(__file__).resolve().parent / "results"
TOLERANCE = 1e-5
Inputs = tuple[Tensor, ...]
Row = dict[str, Any]


def vision(name: str) -> Callable[[], nn.Module]:
    """Return what builds a torchvision model without weights."""

    def build() -> nn.Module:
        define_operators()
        models: Any = importlib.import_module("torchvision.models")
        return models.get_model(name, weights=None)

    return build


def bert() -> nn.Module:
    """Return BERT-base with its pooler."""
    define_operators()
    transformers: Any = importlib.import_module("transformers")
    return transformers.BertModel(transformers.BertConfig(attn_implementation="sdpa"))


def small() -> nn.Module:
    """Return a CNN of three convolutions, two of them padded."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def images(count: int) -> Inputs:
    """Return images `[count, 3, 224, 224]`."""
    return (torch.randn(count, 3, 224, 224),)


def texts(count: int) -> Inputs:
    """Return ids `[count, 128]` of texts without padding."""
    return (torch.randint(0, 30000, (count, 128)),)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    **{name: (vision(name), images) for name in ("resnet18", "resnet50", "vgg16", "mobilenet_v2", "densenet121")},
    "vit_b_16": (vision("vit_b_16"), images),
    "bert_base": (bert, texts),
}
QUICK = {"small": (small, lambda count: (torch.randn(count, 3, 24, 24),))}


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}


def prune_layers(model: nn.Module, amount: float, dim: int) -> None:
    """Masks slices of every layer's weight but the last's, in place; depthwise kernels have no second dimension."""
    *found, _classifier = layers(model).values()
    for layer in found:
        weight = layer.get_parameter("weight")
        if weight.shape[dim] > 1:
            prune.ln_structured(layer, "weight", amount=amount, n=2, dim=dim)


class Probe:
    """Which channels of each layer's input and output vary with the input, and on which outputs the model depends.

    One draw of the weights has units that happen to be off for every image, so that several are looked at, with zeros
    where the model has them.
    """

    def __init__(self, model: nn.Module, inputs: Callable[[int], Inputs], draws: int = 6) -> None:
        self.varies_in: dict[str, Tensor] = {}
        self.varies_out: dict[str, Tensor] = {}
        self.matters_out: dict[str, Tensor] = {}
        zeros = {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1}
        # In double precision: what varies after many pruned layers may vary little.
        drawn = copy.deepcopy(model).double()
        for seed in range(1, 1 + draws):
            randomise(drawn, seed)
            with torch.no_grad():
                for name, parameter in drawn.named_parameters():
                    if name in zeros:
                        parameter.masked_fill_(zeros[name], 0)
            self._look(drawn, tuple(x.double() if x.is_floating_point() else x for x in inputs(2)))

    def _look(self, model: nn.Module, given: Inputs) -> None:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [layer.register_forward_hook(_keep(seen, path)) for path, layer in layers(model).items()]
        output = model(*given)
        for handle in handles:
            handle.remove()
        found = list(output.values()) if isinstance(output, dict) else [output]
        sum((value * torch.randn_like(value)).sum() for value in found).backward()  # pyright: ignore
        for path, (x, y) in seen.items():
            dim = -1 if isinstance(model.get_submodule(path), nn.Linear) else 1
            assert y.grad is not None
            for table, flags in (
                (self.varies_in, _differs(x, dim)),
                (self.varies_out, _differs(y.detach(), dim)),
                (self.matters_out, _by_channel(y.grad != 0, dim).any(1)),
            ):
                table[path] = table[path] | flags if path in table else flags
        model.zero_grad()


def _keep(seen: dict[str, tuple[Tensor, Tensor]], path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen[path] = (args[0].detach(), output)

    return hook


def _by_channel(values: Tensor, dim: int) -> Tensor:
    return values.movedim(dim, 0).reshape(values.shape[dim], -1)


def _differs(values: Tensor, dim: int) -> Tensor:
    """[c]: whether values [batch, ...] differ within the batch, beyond rounding."""
    spread = _by_channel((values - values[:1]).abs(), dim).amax(1)
    return spread > 1e-12 * _by_channel(values.abs(), dim).amax(1).clamp(min=1e-12)


def ideal_indices(coupling: Coupling, model: nn.Module, probe: Probe) -> dict[str, Tensor]:
    """Return group -> indices that have to stay, as far as the probe tells."""
    stays = {group.axis: torch.zeros(group.size, dtype=torch.bool) for group in coupling if group.free}
    for path, layer in layers(model).items():
        weight = layer.get_parameter("weight").detach()
        axis = coupling.axis(f"{path}.weight", 1)
        found = [atom for atom in set(atoms(axis)) if atom in stays]
        if path not in probe.varies_in:
            for atom in found:
                stays[atom][:] = True
            continue
        live = probe.varies_out[path] & probe.matters_out[path]
        reads = (weight.flatten(2) != 0).any(2) if weight.dim() > 2 else weight != 0
        read = reads[live].any(0) & (probe.varies_in[path] if weight.shape[1] == len(probe.varies_in[path]) else True)
        for atom in found:
            place = positions(axis, atom)
            stays[atom][place[read & (place >= 0)]] = True
    for group in coupling:
        if group.free:
            # Groups that no layer above reads (the score of attention) are not looked at.
            touched = any(group.axis in atoms(coupling.axis(f"{p}.weight", 1)) for p in layers(model))
            stays[group.axis] |= not touched
            stays[group.axis][:1] |= not bool(stays[group.axis].any())
    return {group.name: stays[group.axis].nonzero().flatten() for group in coupling if group.free}


def removed_parameters(coupling: Coupling, model: nn.Module, keep: dict[str, Tensor]) -> int:
    """Return how many parameters leave when groups keep these indices."""
    cuts = coupling.kept(keep)
    total = 0
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        for dim, kept in cuts.get(name, []):
            shape[dim] = len(kept)
        total += parameter.numel() - math.prod(shape)
    return total


def measure(name: str, amount: float, dim: int, time: bool, cases: Any) -> Row:
    """Return one row of the table: a model pruned along one dimension."""
    build, inputs = cases[name]
    torch.manual_seed(0)
    model = build().eval()
    randomise(model, 0)
    prune_layers(model, amount, dim)
    example = inputs(1)
    quiet = {"compile": False, "measure": False}
    result = fxprune.transform(model, example_inputs=example, options={} if time else quiet, progress=False)
    report = result.report
    odd = fxprune.transform(model, example_inputs=example, options={**quiet, "align": 1}, progress=False).report
    for layer in layers(model).values():
        if prune.is_pruned(layer):
            prune.remove(layer, "weight")
    probe = Probe(model, inputs)
    coupling = fxprune.analyze(model, example)
    ideal = removed_parameters(coupling, model, ideal_indices(coupling, model, probe))
    before = sum(p.numel() for p in model.parameters())
    after = report.parameters[1] if report.parameters else before
    # Where taking them out did not pay, nothing is said of dead channels.
    dead = report.dead or Dead()
    rest: Counter[str] = Counter()
    for part in dead.slices:
        rest[part.why.split(" (")[0] if " reads it" not in part.why else "read elsewhere"] += part.zero - part.left
    return {
        "model": name, "amount": amount, "dim": dim, "parameters": before, "after": after, "left": before - after,
        "left_at_any_width": before - odd.parameters[1] if odd.parameters else 0, "ideal": ideal,
        "error": max(c.error for c in [*report.checks, *odd.checks]),
        "routes": dict(dead.routes), "map_elements": dead.map_elements,
        "zero_slices": sum(s.zero for s in dead.slices), "zero_slices_left": sum(s.left for s in dead.slices),
        "rest": {why: count for why, count in rest.most_common() if count},
        "ratio": report.timing.ratio if report.timing else None,
        "dense_ms": 1e3 * report.timing.dense if report.timing else None,
        "ms": 1e3 * report.timing.pruned if report.timing else None,
        "threads": torch.get_num_threads(),
        "notes": report.notes, "seconds": report.seconds,
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return the rows for people."""
    shown = [
        (
            r["model"], f"{r['amount']:.0%}", r["dim"], f"{r['parameters'] / 1e6:.2f} M", f"{r['left'] / 1e6:.2f} M",
            f"{r['ideal'] / 1e6:.2f} M", f"{r['left'] / max(r['ideal'], 1):.1%}",
            f"{r['left_at_any_width'] / max(r['ideal'], 1):.1%}", f"{r['zero_slices_left']} of {r['zero_slices']}",
            f"{r['map_elements'] / 1e6:.2f} M", f"{r['error']:.1e}", f"{r['ratio']:.2f}" if r["ratio"] else "-",
        )
        for r in rows
    ]  # fmt: skip
    headers = "model,pruned,dim,parameters,left,ideal,share,at any width,zero slices left,maps,error,times faster"
    return tabulate(shown, headers=headers.split(","), disable_numparse=True)


def merged(before: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Return all rows in the order of the table, new in place of old; where a new one was not timed, old times stay."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in [*before, *rows]:
        key = (row["model"], row["amount"], row["dim"])
        times = {k: v for k, v in found.get(key, {}).items() if k in ("ratio", "dense_ms", "ms")}
        found[key] = {**row, **(times if row.get("ratio") is None else {})}
    names = list(CASES)
    return [found[key] for key in sorted(found, key=lambda key: (names.index(key[0]), *key[1:]))]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save; the exit status says whether every result was equal to its masked model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exact", description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.3, 0.5, 0.6])
    parser.add_argument("--time", action="store_true", help="also compile and time each result at the middle amount")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one small network; writes nothing")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    cases = QUICK if given.quick else CASES
    work = [
        (name, amount, dim)
        for name in (QUICK if given.quick else given.models)
        for amount in given.amounts
        for dim in (0, 1)
    ]
    rows = []
    for name, amount, dim in tqdm(work, desc="exact", disable=None, leave=False):
        is_timed = given.time and amount == sorted(given.amounts)[len(given.amounts) // 2]
        rows.append(measure(name, amount, dim, is_timed, cases))
        tqdm.write(table(rows[-1:]).splitlines()[-1])
    print(table(rows))
    if not given.quick:
        machine = describe_machine()
        path = RESULTS / f"exact-{slug(machine['cpu'])}.json"
        rows = merged(json.loads(path.read_text())["rows"] if path.exists() else [], rows)
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        print(f"written to {path.name}")
    return 0 if all(row["error"] <= TOLERANCE for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
