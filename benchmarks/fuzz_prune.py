"""Random pruning: what the user does to the model beforehand, the plan, and how fxprune is asked, all as code."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fxprune
from benchmarks.fuzz_parts import Masked

KINDS = ("hooks", "zeros", "dead", "parametrized", "elements", "channels", "channels", "channels", "drop", "mixed")
# The ways to ask: transform, its first call without an example, a selection again, training, calibration, the backend.
ONCE, LATER, REPLAY, TRAIN, CALIBRATE, BACKEND = "once", "later", "replay", "train", "calibrate", "backend"
RESIDUAL = ("ResidualMLP", "ResidualConv", "ResidualAttention", "InvertedResidual")


@dataclasses.dataclass(frozen=True)
class Edit:
    """A line on `model`, and the path of the module that it needs."""

    path: str
    line: str


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What the user did to the model, the rules and drops of the plan (none: the model's own pruning), and the way."""

    kind: str
    edits: tuple[Edit, ...] = ()
    rules: tuple[tuple[str, str], ...] = ()
    drops: tuple[str, ...] = ()
    way: str = ONCE

    def code(self) -> str:
        """The edits and the plan as Python."""
        lines = [edit.line for edit in self.edits]
        asked = [f'Rule("{pattern}", {rest})' for pattern, rest in self.rules] + [
            f'Drop("{path}")' for path in self.drops
        ]
        return "\n".join([*lines, f"plan = Plan([{', '.join(asked)}])" if asked else "plan = None"])

    def apply(self, model: nn.Module) -> None:
        """Does to the model what the user did, where what it needs is there."""
        scope: dict[str, Any] = {"torch": torch, "nn": nn, "prune": prune, "parametrize": parametrize, "Masked": Masked}
        paths = dict(model.named_modules())
        torch.manual_seed(1)
        for edit in self.edits:
            if edit.path in paths:
                with torch.no_grad():
                    exec(edit.line, scope | {"model": model})

    def plan(self, model: nn.Module) -> fxprune.Plan | None:
        """The plan, without names that the model does not have."""
        names, paths = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_modules())
        known = {name.replace(".parametrizations", "").replace(".original", "").replace("_orig", "") for name in names}
        scope = {**vars(fxprune), "torch": torch}
        rules = [
            eval(f'Rule("{pattern}", {rest})', scope)
            for pattern, rest in self.rules
            if "*" in pattern or pattern in known
        ]
        rules += [fxprune.Drop(path) for path in self.drops if path in paths]
        return fxprune.Plan(rules) if rules or self.rules or self.drops else None


def draw_pruning(rng: random.Random, model: nn.Module) -> Pruning:
    """A kind of pruning with all its amounts, for weights that the model has."""
    weights = _weights(model)
    blocks = [path for path, module in model.named_modules() if type(module).__name__ in RESIDUAL]
    kind = rng.choice(KINDS)
    if kind == "drop" and not blocks:
        kind = "channels"
    if kind == "channels" and len(weights) < 2:
        # Its outputs are the model's, which no plan may shrink.
        kind = "elements"
    edits: list[Edit] = []
    rules: list[tuple[str, str]] = []
    drops: list[str] = []
    if weights:
        if kind in ("hooks", "zeros", "dead", "parametrized"):
            edits = _edits(rng, kind, weights)
        elif kind == "mixed":
            edits = _edits(rng, rng.choice(("hooks", "zeros", "dead", "parametrized")), weights)
            rules = _rules(rng, "channels", weights) + (_rules(rng, "elements", weights) if rng.random() < 0.5 else [])
        elif kind in ("elements", "channels"):
            rules = _rules(rng, kind, weights)
    if kind == "drop":
        drops = rng.sample(blocks, rng.choice((1, min(2, len(blocks)))))
        rules = _rules(rng, rng.choice(("channels", "elements")), weights) if rng.random() < 0.4 else []
    return Pruning(kind, tuple(edits), tuple(rules), tuple(drops), _way(rng, kind))


def _way(rng: random.Random, kind: str) -> str:
    share = rng.random()
    if share < 0.06:
        return LATER
    if share < 0.12 and kind in ("elements", "channels", "drop", "mixed"):
        return REPLAY
    if share < 0.24:
        return TRAIN
    if share < 0.27 and kind == "elements":
        return CALIBRATE
    if share < 0.27 and kind in ("hooks", "zeros", "dead"):
        return BACKEND
    return ONCE


def _weights(model: nn.Module) -> list[tuple[str, str, tuple[int, ...], bool]]:
    """(module path, parameter, shape, whether a bias of its rows is beside it) of each that is no vector."""
    found = []
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module) and ".parametrizations" not in path:
            bias = getattr(module, "bias", None)
            for name, p in module.named_parameters(recurse=False):
                if p.dim() > 1:
                    found.append((path, name, tuple(p.shape), isinstance(bias, Tensor) and len(bias) == len(p)))
    return found


def _at(path: str) -> str:
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split(".") if part)


def _edits(rng: random.Random, kind: str, weights: list[Any]) -> list[Edit]:
    chosen = rng.sample(weights, rng.randrange(1, len(weights) + 1))
    edits = []
    for path, name, shape, bias in chosen:
        where, amount = _at(path), rng.choice((0.2, 0.3, 0.5, 0.5, 0.7, 0.9))
        over = rng.randrange(len(shape))
        rows = sorted(rng.sample(range(shape[over]), rng.randrange(1, shape[over] + 1))) if shape[over] > 1 else [0]
        index = ":, " * over + str(rows)
        if kind == "hooks":
            lines = [
                f'prune.l1_unstructured({where}, "{name}", {amount})',
                f'prune.random_unstructured({where}, "{name}", {amount})',
                f'prune.ln_structured({where}, "{name}", {amount}, n=2, dim={over})',
                f'prune.random_structured({where}, "{name}", {amount}, dim={over})',
                f'prune.custom_from_mask({where}, "{name}", torch.rand({shape}) > {amount})',
                f'prune.l1_unstructured({where}, "{name}", {amount}); prune.remove({where}, "{name}")',
                f'prune.identity({where}, "{name}")',
            ]
            lines += [f'{lines[0]}; prune.ln_structured({where}, "{name}", 0.3, n=2, dim={over})']
        elif kind == "zeros":
            lines = [f"{where}.{name}.masked_fill_(torch.rand({shape}) < {amount}, 0.0)"]
            lines += [f"{where}.{name}[{where}.{name}.abs() < {amount} * {where}.{name}.std()] = -0.0"]
        elif kind == "dead":
            lines = [f"{where}.{name}[{index}] = 0"]
            if bias and over == 0 and rng.random() < 0.4:
                lines = [f"{lines[0]}; {where}.bias[{rows}] = 0"]
        else:
            lines = [f'parametrize.register_parametrization({where}, "{name}", Masked(torch.rand({shape}) > {amount}))']
            full = f"torch.ones({shape}).index_fill({over}, torch.tensor({rows}), 0.0)"
            lines += [f'parametrize.register_parametrization({where}, "{name}", Masked({full}))']
        edits.append(Edit(path, rng.choice(lines)))
    return edits


def _rules(rng: random.Random, kind: str, weights: list[Any]) -> list[tuple[str, str]]:
    names = [f"{path}.{name}" if path else name for path, name, *_ in weights]
    found = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        pattern = "*" if rng.random() < 0.7 else rng.choice([*names, "*weight", "m*", "*.weight"])
        found.append((pattern, _channels(rng, pattern) if kind == "channels" else _elements(rng, pattern)))
    return found


def _elements(rng: random.Random, pattern: str) -> str:
    amount = rng.choice((0.2, 0.5, 0.5, 0.7, 0.9, 1.0))
    scope = rng.choice(("", "", ', scope="global"'))
    per_row = ", per_row=True" if not scope and rng.random() < 0.2 else ""
    score = rng.choice(("", "", ', score="random"'))
    if scope and rng.random() < 0.3:
        score = ', score="lamp"'
    ways = [f"Unstructured({amount}{score}{per_row}){scope}"] * 3
    ways += [f"Blocks({amount}, shape={rng.choice(((1, 2), (2, 2), (4, 1), (4, 4), (2, 4)))}){scope}"]
    ways += [rng.choice(("SemiStructured()", "SemiStructured(1, 4)", "SemiStructured(1, 2)", "SemiStructured(4, 8)"))]
    ways += ["Existing()"]
    if "*" not in pattern:
        ways += [f"Unstructured({rng.choice((1, 2, 3))})"]
    return rng.choice(ways)


def _channels(rng: random.Random, pattern: str) -> str:
    amount = rng.choice((0.25, 0.3, 0.5, 0.5, 0.5, 0.7, 0.9))
    scope = rng.choice(("", "", "", ', scope="global"', ', scope="isomorphic"'))
    more = rng.choice(
        ("", "", "", ', score="random"', ", norm=1", ', score="fpgm"', ', reduce="max"', ', score="bn_scale"')
    )
    if scope == ', scope="global"' and rng.random() < 0.2:
        more = ', score="lamp"'
    more += rng.choice(("", "", "", ', unit="inner"'))
    more += ", dim=1" if rng.random() < 0.08 else ""
    return f"Channels({amount}, align={rng.choice((1, 1, 1, 2, 4, 8))}{more}){scope}"
