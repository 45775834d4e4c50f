"""One model of the zoo, in a process of its own: pruned by fxprune, and held against the model with zeros in place.

    python -m benchmarks.zoo_child LABEL FILE

Writes one row of JSON to FILE. The judgement is made here, from the user's model alone: none of fxprune's own checks
enters into it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import fxprune
from benchmarks.zoo_model import CallInputs, ZooModel
from benchmarks.zoo_models import named
from benchmarks.zoo_randomise import randomise
from fxprune.capture.capture import capture
from fxprune.errors import FxPruneError

AMOUNT = 0.3
TOLERANCE = 1e-4
# The oracle must differ from the dense model by this, or agreement with it says nothing.
FAR = 100 * TOLERANCE
# What fails in float32 and is within this in float64 computes the same function.
ROUNDING = 1e-9
REASONS = 3
# Dimensions of kernels, over which windows slide, are positions: no plan could ask for them.
POSITIONS = "windows slide over it"

Row = dict[str, Any]
Removed = dict[str, list[tuple[int, Tensor]]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What fxprune answered: the result, [(dim, removed indices)] by tensor, and each group's reason ("" if it may)."""

    result: nn.Module
    removed: Removed
    reasons: list[str]
    checks: list[tuple[str, str, float]]
    notes: list[str]


def prune(model: nn.Module, call: CallInputs) -> Outcome:
    """Remove `AMOUNT` of the channels everywhere it may: the only place that knows fxprune's interface."""
    plan = fxprune.Plan([fxprune.Rule("*", fxprune.Channels(AMOUNT))])
    result = fxprune.transform(model, plan, *call, options={"compile": False, "measure": False}, progress=False)
    report = result.report
    return Outcome(
        result,
        report.removed,
        [group.reason for group in report.groups],
        [(check.what, check.call, check.error) for check in report.checks],
        list(report.notes),
    )


def is_captured(model: nn.Module, call: CallInputs) -> bool:
    """Whether the model becomes a graph; asked only where `prune` raised."""
    try:
        capture(model, *call)
    except FxPruneError:
        return False
    return True


def outputs(model: nn.Module, call: CallInputs) -> list[Any]:
    """Flat outputs of one call on copies of its tensors."""
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, call)
    with torch.no_grad():
        return [v.clone() if isinstance(v, Tensor) else v for v in pytree.tree_leaves(model(*args, **kwargs))]


def difference(got: Sequence[Any], expected: Sequence[Any]) -> float:
    """Largest max|a - b| / max|b| over the outputs; infinite where they differ in number, shape, kind or finiteness."""
    if len(got) != len(expected):
        return math.inf
    return max((_difference(a, b) for a, b in zip(got, expected)), default=math.inf)


def _difference(got: Any, expected: Any) -> float:
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        return 0.0 if type(got) is type(expected) and got == expected else math.inf
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(got, expected) else math.inf
    if expected.numel() == 0:
        return 0.0
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(got), finite) or not torch.equal(got[~finite], expected[~finite]):
        return math.inf
    a, b = got[finite].double(), expected[finite].double()
    if not b.numel():
        return 0.0
    scale = float(b.abs().max())
    error = float((a - b).abs().max())
    return error / scale if scale > 0 else error


def is_finite(values: Sequence[Any]) -> bool:
    """Whether no output holds a NaN, and each holds finite values."""
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]
    return bool(tensors) and all(not v.isnan().any() and bool(v.isfinite().any()) for v in tensors)


class _Weight(TorchFunctionMode):
    """Watches what a module hands to convolutions and linears as its weight; `given` takes its place, once there."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self.found: Tensor | None = None
        self.given: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _PRODUCTS:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            if weight.shape == self.shape:
                self.found = weight if self.found is None else self.found
                if self.given is not None and "weight" in kwargs:
                    kwargs["weight"] = self.given
                elif self.given is not None:
                    args = (args[0], self.given, *args[2:])
        return func(*args, **kwargs)


_PRODUCTS = {functional.conv1d, functional.conv2d, functional.conv3d, functional.linear}


def compute_weights(model: nn.Module, call: CallInputs) -> None:
    """Makes weights that a forward computes from a parameter parameters that hold what they come to, in place.

    A standardised convolution is pruned as what it multiplies by. What is zeroed in the parameter must not be computed
    anew.
    """
    watched: list[tuple[nn.Module, nn.Parameter, _Weight]] = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            watch = _Weight(weight.shape)
            module.forward = functools.partial(_under, watch, module.forward)
            watched.append((module, weight, watch))
    outputs(model, call)
    for module, weight, watch in watched:
        if watch.found is None or watch.found.data_ptr() == weight.data_ptr():
            module.__dict__.pop("forward")
            continue
        weight.data = watch.found.detach().clone()
        watch.given = weight


def _under(watch: _Weight, forward: Any, *args: Any, **kwargs: Any) -> Any:
    with watch:
        return forward(*args, **kwargs)


@torch.no_grad()
def zero(model: nn.Module, removed: Removed) -> None:
    """Makes a model its own oracle: in place, +0.0 at every removed index of every floating parameter and buffer."""
    for name in removed:
        _unparametrize(model, name)
    tensors = _tensors(model)
    for name, cuts in removed.items():
        if tensors[name].is_floating_point():
            for dim, indices in cuts:
                tensors[name].index_fill_(dim, indices, 0.0)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _unparametrize(model: nn.Module, name: str) -> None:
    """A weight that a parametrization computes becomes a parameter, so that it can be zeroed."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner) if ".parametrizations" not in owner else None
    if module is not None and parametrize.is_parametrized(module, leaf):
        parametrize.remove_parametrizations(module, leaf)


def count(model: nn.Module) -> int:
    """Number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_removed(model: nn.Module, removed: Removed) -> int:
    """Number of parameters that lie in a removed slice, each counted once; buffers do not count."""
    total, seen = 0, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in removed and id(parameter) not in seen:
            seen.add(id(parameter))
            kept = list(parameter.shape)
            for dim, indices in removed[name]:
                kept[dim] -= len(indices)
            total += parameter.numel() - math.prod(kept)
    return total


def misshapen(model: nn.Module, outcome: Outcome) -> list[str]:
    """Parameters of the result whose shape is not the model's less what was removed."""
    before = _tensors(model)
    wrong = []
    for name, tensor in outcome.result.named_parameters(remove_duplicate=False):
        if name in before:
            shape = list(before[name].shape)
            for dim, indices in outcome.removed.get(name, []):
                shape[dim] -= len(indices)
            if list(tensor.shape) != shape:
                wrong.append(f"{name}: {list(tensor.shape)}, not {shape}")
    return wrong


def run_model(zoo_model: ZooModel) -> Row:
    """Build, randomise, prune and judge one model."""
    start = time.perf_counter()
    torch.manual_seed(0)
    model = zoo_model.build()
    calls = [zoo_model.inputs(), zoo_model.inputs()]
    randomise(model, seed=0)
    row: Row = {"parameters": count(model), "captured": False, "transformed": False}
    dense = [outputs(model, call) for call in calls]
    if not all(is_finite(values) for values in dense):
        return row | {"verdict": "not finite", "seconds": time.perf_counter() - start}
    begun = time.perf_counter()
    try:
        outcome = prune(model, calls[0])
    except Exception as error:
        row |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-4000:]}
        row["captured"] = is_captured(model, calls[0])
        verdict = "raises" if row["captured"] else "not captured"
        return row | {"verdict": verdict, "seconds": time.perf_counter() - start}
    row |= {"captured": True, "transformed": True, "transform_seconds": time.perf_counter() - begun}
    row |= describe(outcome)
    row["share"] = count_removed(model, outcome.removed) / row["parameters"]
    row["misshapen"] = misshapen(model, outcome)
    got = [outputs(outcome.result, call) for call in calls]
    row["untouched"] = all(difference(outputs(model, call), values) == 0 for call, values in zip(calls, dense))
    compute_weights(model, calls[0])
    zero(model, outcome.removed)
    expected = [outputs(model, call) for call in calls]
    row["difference"] = max(map(difference, got, expected))
    row["from_dense"] = max(map(difference, dense, expected))
    if not row["difference"] <= TOLERANCE:
        row["difference_float64"] = difference_float64(zoo_model, calls)
    row["seconds"] = time.perf_counter() - start
    return row | {"verdict": judge(row, zoo_model.share)}


def difference_float64(zoo_model: ZooModel, calls: Sequence[CallInputs]) -> float:
    """The difference where the same model is built, pruned and zeroed in float64; infinite where it does not run so."""

    def widened(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    torch.manual_seed(0)
    model = zoo_model.build()
    randomise(model, seed=0)
    model = model.double()
    wide = [pytree.tree_map(widened, call) for call in calls]
    try:
        outcome = prune(model, wide[0])
        got = [outputs(outcome.result, call) for call in wide]
        compute_weights(model, wide[0])
        zero(model, outcome.removed)
        return max(map(difference, got, [outputs(model, call) for call in wide]))
    except Exception:
        return math.inf


def describe(outcome: Outcome) -> Row:
    """The groups that were found, why some are frozen, and what fxprune's own checks say."""
    reasons = [reason for reason in outcome.reasons if not reason.startswith(POSITIONS)]
    frozen = [reason for reason in reasons if reason]
    # Names and numbers differ from group to group; the words before them are the reason.
    words = Counter(reason.split(" (")[0].split(' "')[0] for reason in frozen)
    return {
        "groups": len(reasons),
        "frozen": len(frozen) / len(reasons) if reasons else 1.0,
        "reasons": words.most_common(REASONS),
        "result_parameters": count(outcome.result),
        "checks": outcome.checks,
        "notes": outcome.notes,
    }


def judge(row: Row, share: float) -> str:
    """The verdict over a model that was transformed: "ok", or the first thing that is wrong."""
    if not row["untouched"]:
        return "model changed"
    if not row["difference"] <= TOLERANCE:
        return "rounding" if row.get("difference_float64", math.inf) <= ROUNDING else "wrong"
    if row["misshapen"]:
        return "wrong shapes"
    if row["share"] < share:
        return "share missed"
    if not row["from_dense"] > FAR:
        return "oracle too near"
    return "ok"


def fingerprint() -> str:
    """Eight digits that change with fxprune's sources and this benchmark's."""
    root = Path(__file__).resolve().parent.parent
    files = sorted([*root.glob("fxprune/**/*.py"), *root.glob("benchmarks/zoo*.py")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def main(argv: Sequence[str]) -> int:
    """Run the model named first and write its row to the file named second."""
    label, file = argv
    torch.set_num_threads(1)
    zoo_model = named(label)
    row: Row = {"label": label, "code": fingerprint()}
    try:
        row |= run_model(zoo_model)
    except Exception as error:
        row |= {"verdict": "failed", "error": f"{type(error).__name__}: {error}"}
        row["traceback"] = traceback.format_exc()[-4000:]
    # Written whole or not at all: a run that is cut off leaves no half row behind.
    partial = Path(file).with_suffix(".part")
    partial.write_text(json.dumps(row), encoding="utf-8")
    partial.replace(file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
