"""The right answer in plain torch: the user's model with zeros in place, and how far another answer is from it.

Nothing of fxprune's checks or stages enters: only what a result says of itself, its masks and what it removed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.utils import _pytree as pytree

# What rounding may come to: the largest |a - b| over the largest |b| of an output.
FLOOR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# How much more than the model's own rounding a result's may be.
TIMES = {torch.float64: 100.0, torch.float32: 30.0, torch.float16: 10.0, torch.bfloat16: 10.0}

Cuts = Mapping[str, list[tuple[int, Tensor]]]


@dataclasses.dataclass(frozen=True)
class Told:
    """What a result says it did: elements of weights that stay, slices and blocks gone, new values."""

    masks: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    removed: Cuts = dataclasses.field(default_factory=dict)
    values: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @staticmethod
    def of(result: Any) -> Told:
        """Reads a result."""
        selection, report = result.selection, result.report
        masks = {name: mask.unpack() for name, mask in selection.mask.items()}
        return Told(masks, dict(report.removed), dict(selection.values), tuple(selection.drop))

    @property
    def is_something(self) -> bool:
        """Whether anything was pruned."""
        return bool(self.removed or self.dropped or any(not mask.all() for mask in self.masks.values()))


@torch.no_grad()
def zeroed(model: nn.Module, told: Told) -> nn.Module:
    """The model, changed in place into its own oracle: hooks settled, blocks bypassed, zeros where told."""
    settle(model)
    for path in told.dropped:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, nn.Identity())
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    # Of an exported model the parts of a parametrization have names; what they come to takes the last one's place.
    for name in [*told.values, *told.removed, *told.masks]:
        owner, inside, part = name.partition(".parametrizations.")
        if inside and f"{owner}.{part.partition('.')[0]}" in tensors:
            tensors[name] = tensors[f"{owner}.{part.partition('.')[0]}"]
    for name, value in told.values.items():
        tensors[name].copy_(value)
    for name, cuts in told.removed.items():
        if name in tensors and tensors[name].is_floating_point():
            for dim, indices in cuts:
                tensors[name].index_fill_(dim, indices, 0.0)
    for name, mask in told.masks.items():
        if name in tensors or not any(name.startswith(f"{path}.") for path in told.dropped):
            tensors[name].masked_fill_(~mask, 0.0)
    return model


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Weights that hooks and parametrizations compute become parameters; none that others share is written to.

    One weight that several modules hold under one mask stays one.
    """
    found: list[tuple[Tensor, Tensor, nn.Parameter]] = []
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
                own, mask = getattr(module, f"{name}_orig"), getattr(module, f"{name}_mask")
                tied = (p for other, same, p in found if other is own and torch.equal(same, mask))
                parameter = next(tied, None)
                if parameter is None:
                    parameter = nn.Parameter(own * mask)
                    found.append((own, mask, parameter))
                del module._forward_pre_hooks[key], module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
                delattr(module, name)
                module.register_parameter(name, parameter)
                if isinstance(module, nn.RNNBase):
                    module._init_flat_weights()
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name).clone() for name in module.parametrizations}  # pyright: ignore
            del module._modules["parametrizations"]
            module.__class__ = module.__class__.__bases__[0]
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))


@torch.no_grad()
def widened(model: nn.Module) -> nn.Module:
    """The settled model in float64, in place."""
    settle(model)
    return model.double()


def wide(values: Any) -> Any:
    """Inputs with their floats in float64."""
    return pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, values)


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far an answer is, and how far it may be; `why` where it is another kind of answer."""

    error: float
    allowed: float
    why: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether it is further off than rounding explains."""
        return bool(self.why) or not self.error <= self.allowed


def distance(got: Any, plain: Any, exact: Any, coarse: Callable[[], Any]) -> Distance | None:
    """An answer against the oracle's: `plain` in the case's type, `exact` in float64; None where that is not finite.

    What the oracle loses in its own type is the measure for what an answer may lose; `coarse` answers in float32, where
    float64 itself is in question.
    """
    flat, spec = pytree.tree_flatten(plain)
    mine, form = pytree.tree_flatten(got)
    if form != spec:
        return Distance(math.inf, 0.0, f"structure {form}, not {spec}")
    worst = Distance(0.0, 1.0)
    for index, (a, b, e) in enumerate(zip(mine, flat, pytree.tree_leaves(exact), strict=True)):
        found = _distance(a, b, e)
        if found is None:
            return None
        if found.is_wrong and not found.why and b.dtype == torch.float64:
            rough = _relative(pytree.tree_leaves(coarse())[index], e)
            found = Distance(found.error, max(found.allowed, rough * 1e-7 if math.isfinite(rough) else 0.0))
        if found.why or found.error / found.allowed > worst.error / worst.allowed:
            worst = found
        if found.why:
            break
    return worst


def _distance(got: Any, plain: Any, exact: Any) -> Distance | None:
    if not isinstance(plain, Tensor) or not isinstance(got, Tensor):
        same = type(got) is type(plain) and got == plain
        return Distance(0.0, 1.0) if same else Distance(math.inf, 0.0, f"{got!r}, not {plain!r}")
    if got.shape != plain.shape or got.dtype != plain.dtype:
        said = f"{got.dtype} {list(got.shape)}, not {plain.dtype} {list(plain.shape)}"
        return Distance(math.inf, 0.0, said)
    if not plain.is_floating_point():
        return Distance(0.0, 1.0) if torch.equal(got, plain) else Distance(math.inf, 0.0, "other integers")
    if not plain.numel():
        return Distance(0.0, 1.0)
    if not bool(exact.isfinite().all()) or not bool(plain.isfinite().all()):
        return None
    if not bool(got.isfinite().all()):
        return Distance(math.inf, 0.0, "not finite")
    own = _relative(plain, exact)
    return Distance(_relative(got, exact), max(FLOOR[plain.dtype], TIMES[plain.dtype] * own))


def _relative(a: Tensor, b: Tensor) -> float:
    scale, error = float(b.abs().max()), float((a.double() - b.double()).abs().max())
    return error / scale if scale > 0 else error


def relative(got: Any, expected: Any) -> float:
    """The largest relative difference of floats in two answers alike."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(expected))
    floats = [(a, b) for a, b in pairs if isinstance(b, Tensor) and b.is_floating_point() and b.numel()]
    return max((_relative(a, b.double()) for a, b in floats), default=0.0)
