"""gradients: one backward pass of a result that trains, in eval mode, held against the pruned model's.

The pruned model is a copy of the user's own with the selection's zeros in its weights. Where there is none (blocks were
dropped, a statistic runs over what is kept, the model does not copy, it came as an ExportedProgram) it is the captured
graph with the selection applied. Parameters are compared at the indices and elements that stay; a gradient that is
missing counts as zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.capture import admit
from fxprune.capture.hooks import fold_existing, separate
from fxprune.errors import CheckError
from fxprune.graph.compat import GroupNormGoesBackward
from fxprune.graph.environment import words_of
from fxprune.graph.note import Note

from .calls import Call
from .compare import CheckRow, compare
from .oracle import Oracle, nudged, run
from .proof import Expected
from .rounding import SAMPLES

# How far a gradient may be off, in units of the model's own rounding, where that is larger than the tolerance: of a sum
# that cancels, such as the gradient of the bias of an attention's keys, nothing but rounding is left.
_ROUNDINGS = 8.0


@torch.inference_mode(False)
def compare_gradients(
    result: nn.Module, model: object, expected: Expected, without: Collection[str]
) -> tuple[list[CheckRow], list[Note]]:
    """Holds gradients, and which outputs have one, against the pruned model's on the example: check rows and notes.

    Cotangents are random and seeded. `without` names the nodes of the captured graph that the model computes without
    gradients. Raises CheckError where the result does not train as it should.
    """
    call, oracle = expected.proof.example, expected.oracle
    copied = _zeroed(model, expected)
    try:
        theirs = _backward(copied, call, _parameters(copied)) if copied is not None else None
        if theirs is None or (any(theirs.flags) and not theirs.found):
            # A copy whose gradients go to none of its parameters calls the model that it was copied from.
            copied, theirs = None, _Graph(expected, without).backward(call)
    except Exception as error:
        why = f"the model itself does not go backward in eval mode ({words_of(error)[:200]})"
        return [], [Note(f"gradients were not compared: {why}", "warning")]
    try:
        ours = _backward(result, call, _parameters(result))
    except Exception as error:
        raise _wrong(call, f"its backward pass raises {words_of(error)[:200]}") from error
    if ours.flags != theirs.flags:
        if copied is not None and ours.flags == _flags_in_training(copied, call):
            why = "in eval mode the model stops gradients that the result, as train mode does, lets through"
            return [], [Note(f"gradients were not compared: {why}", "warning")]
        number = next(n for n, (a, b) in enumerate(zip(ours.flags, theirs.flags, strict=True)) if a != b)
        has = "it has a gradient, and the model none" if ours.flags[number] else "it has no gradient, the model has one"
        raise _wrong(call, f"output {number}: {has}")
    names = [n for n, _ in result.named_parameters(remove_duplicate=False)]
    flags = {n: n in ours.wanted for n in names if (n in ours.wanted) is not (n in theirs.wanted)}
    for name, trains in flags.items():
        raise _wrong(call, f'"{name}" {"trains" if trains else "does not train"}, unlike in the model')
    what = "gradients = pruned model's" if copied is not None else "gradients = captured graph's, pruned"
    rows = {n: compare(what, call, [_staying(oracle, n, theirs.of(n))], [ours.of(n)]) for n in ours.wanted}
    if not all(row.ok for row in rows.values()):
        rounding = _rounding(expected, without, call)
        for name, row in rows.items():
            own = _ROUNDINGS * rounding.get(name, 0.0)
            if own > row.tolerance:
                told = f"allowed is {_ROUNDINGS:.0f} times the model's own rounding"
                rows[name] = dataclasses.replace(row, tolerance=own, note=told)
    for name, row in rows.items():
        if not row.ok:
            differs = f"differs by {row.error:.2e} relative, {row.tolerance:.0e} is allowed"
            raise _wrong(call, f'the gradient of "{name}" {differs}')
    return sorted(rows.values(), key=lambda row: row.error / row.tolerance)[-1:], []


def _wrong(call: Call, why: str) -> CheckError:
    return CheckError(
        "the result does not train as the pruned model does",
        where=call.label,
        why=why,
        do="Please report it with FXPRUNE_TRACE=<dir>.",
    )


@dataclasses.dataclass(frozen=True)
class _Backward:
    """One backward pass.

    flags   whether each output that is a tensor requires a gradient
    wanted  the parameters and inputs that do, by name
    found   their gradients, but for those that the outputs do not depend on
    """

    flags: list[bool]
    wanted: Mapping[str, Tensor]
    found: Mapping[str, Tensor]

    def of(self, name: str) -> Tensor:
        """The gradient of a parameter or input."""
        return self.found[name] if name in self.found else torch.zeros_like(self.wanted[name])


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False))


def _backward(function: Callable[..., Any], call: Call, parameters: Mapping[str, Tensor]) -> _Backward:
    """A backward pass from all outputs that require a gradient to the parameters and inputs that do."""
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    originals = pytree.tree_leaves((call.args, call.kwargs))
    copies, spec = pytree.tree_flatten(call.copy())
    with torch.enable_grad(), GroupNormGoesBackward():
        for place, (original, copy) in enumerate(zip(originals, copies, strict=True)):
            if isinstance(original, Tensor) and original.requires_grad:
                wanted[f"input {place}"] = copy.requires_grad_()
                # A model may write to its input, which autograd forbids for a leaf.
                copies[place] = copy.clone()
        args, kwargs = pytree.tree_unflatten(copies, spec)
        outputs = [o for o in pytree.tree_leaves(function(*args, **kwargs)) if isinstance(o, Tensor)]
        ends = {place: o for place, o in enumerate(outputs) if o.requires_grad}
        found: dict[str, Tensor] = {}
        if ends and wanted:
            cotangents = [_drawn(o, place) for place, o in ends.items()]
            gradients = torch.autograd.grad([*ends.values()], [*wanted.values()], cotangents, allow_unused=True)
            found = {name: g for name, g in zip(wanted, gradients, strict=True) if g is not None}
    return _Backward([o.requires_grad for o in outputs], wanted, found)


def _drawn(output: Tensor, seed: int) -> Tensor:
    """Random numbers for the gradient of an output: the same for the same shape and seed."""
    dtype = torch.complex128 if output.is_complex() else torch.float64
    drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return drawn.to(output.device, output.dtype)


def _flags_in_training(copied: nn.Module, call: Call) -> list[bool] | None:
    """Which outputs have a gradient in train mode; None where the model does not run in it."""
    with torch.random.fork_rng(devices=[]), admit.untouched(copied):
        try:
            return _backward(copied.train(), call, {}).flags
        except Exception:
            # Train mode refuses some calls, such as a batch of one; the caller then answers by eval mode alone.
            return None


def _zeroed(model: object, expected: Expected) -> nn.Module | None:
    """A copy of the model that holds the oracle's values; None where no values make the model the pruned one."""
    oracle, captured = expected.oracle, expected.proof.captured
    is_whole = [n.name for n in captured.program.graph.nodes] == [n.name for n in oracle.program.graph.nodes]
    if not isinstance(model, nn.Module) or oracle.removal.statistics or not is_whole:
        return None
    try:
        copied = separate(fold_existing(model)[0])
    except Exception:
        # The captured graph, which holds all that is needed, takes its place.
        return None
    names: dict[Tensor, list[str]] = {}
    for name, tensor in [*copied.named_parameters(remove_duplicate=False), *copied.named_buffers()]:
        names.setdefault(tensor, []).append(name)
    theirs = {**_parameters(oracle.program), **dict(oracle.program.named_buffers(remove_duplicate=False))}
    if not oracle.removal.kept.keys() <= {name for aliases in names.values() for name in aliases}:
        return None
    for tensor, aliases in names.items():
        held = next((theirs[name] for name in aliases if name in theirs), None)
        if held is not None:
            value = held.detach()
            for name in aliases:
                value = oracle.applied(name, value)
            tensor.data = value
    return copied


class _Graph(Oracle):
    """The captured graph with the selection applied, with gradients.

    With `seed` each parameter is off by what one rounding of its elements may be.
    """

    def __init__(self, expected: Expected, without: Collection[str], seed: int | None = None) -> None:
        oracle = expected.oracle
        super().__init__(oracle.program, oracle.selection, oracle.removal)
        self._without = without
        # New values came without the flags of the parameters that they replaced.
        trains = {name for name, p in _parameters(expected.proof.captured.program).items() if p.requires_grad}
        leaves: dict[Tensor, Tensor] = {}
        self._leaves: dict[str, Tensor] = {}
        for name, parameter in _parameters(oracle.program).items():
            if parameter not in leaves:
                value = parameter.detach().clone() if seed is None else nudged(parameter.detach(), seed)
                leaves[parameter] = value.requires_grad_(name in trains)
            self._leaves[name] = leaves[parameter]

    def backward(self, call: Call) -> _Backward:
        """A backward pass to the parameters that train."""
        return _backward(lambda *args, **kwargs: run(self, args, kwargs), call, self._leaves)

    def fetch_attr(self, target: str) -> Any:
        """The parameter, connected with what its gradient goes to."""
        leaf = self._leaves.get(target)
        return super().fetch_attr(target) if leaf is None else self.applied(target, leaf)

    def run_node(self, n: torch.fx.Node) -> Any:
        """The node's value, cut off where the model computes it without gradients."""
        value = super().run_node(n)
        return value.detach() if n.name in self._without and isinstance(value, Tensor) else value


def _staying(oracle: Oracle, name: str, gradient: Tensor) -> Tensor:
    """What is left of a parameter's gradient: +0.0 where it is masked, and without the indices that leave."""
    first = oracle.canonical.get(name, name)
    mask = oracle.selection.mask.get(first)
    if mask is not None:
        gradient = torch.where(mask.unpack().to(gradient.device), gradient, 0.0)
    for dim, kept in oracle.removal.kept.get(name, oracle.removal.kept.get(first, [])):
        gradient = gradient.index_select(dim, kept.to(gradient.device))
    return gradient


def _rounding(expected: Expected, without: Collection[str], call: Call) -> dict[str, float]:
    """How far gradients go for a rounding of the parameters, relative to the largest of each: the worst of a few."""
    try:
        own, *others = (_Graph(expected, without, seed).backward(call) for seed in (None, *range(SAMPLES)))
    except Exception:
        # Where the graph does not go backward, as the model does, the tolerance is its dtype's, and no more.
        return {}
    found = {}
    for name in own.wanted:
        gradients = [_staying(expected.oracle, name, each.of(name)) for each in (own, *others)]
        found[name] = max(compare("rounding", call, gradients[:1], [moved]).error for moved in gradients[1:])
    return found
