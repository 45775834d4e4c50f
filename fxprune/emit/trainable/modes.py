"""modes: how a model's train mode differs from the eval mode that it was captured in, node by node.

The model is captured once more in train mode, on a copy of its module tree, and both graphs are walked side by side.
Where they are the same ops, the arguments that differ are recorded by node name (batch-norm and dropout flags, SDPA's
dropout_p), with what train mode does beside them: dropouts that the eval graph lacks, batch counters, regions without
gradients. Where they are not, batch-norm and dropout are flipped by their flags and a note says so. A branch of train
mode with outputs, parameters or state of its own is refused: no flag makes it of an eval graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram, ShapesCollection
from torch.fx import Node

from fxprune.capture import admit
from fxprune.capture.capture import Capture, attempts, export_program
from fxprune.capture.entry import TensorInput
from fxprune.capture.hooks import fold_existing, separate
from fxprune.capture.own_masks import fold_constant_masks
from fxprune.check.calls import Call, resized_call
from fxprune.errors import CaptureError
from fxprune.graph.environment import words_of
from fxprune.graph.note import Note
from fxprune.graph.program import Program, arguments

from .regions import Flat
from .side_by_side import Mismatch, ModeArguments, Walk, beyond

aten = torch.ops.aten

_FLAGS = ("train", "training", "use_input_stats")


def training_modes(
    model: nn.Module | ExportedProgram,
    captured: Capture,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any = None,
) -> tuple[dict[str, ModeArguments], list[Note]]:
    """What train mode changes about the nodes of `captured.program`, by node name, and notes for the report.

    `args`, `kwargs` and `dynamic_shapes` are those of the capture. The model is not changed. Raises CaptureError where
    train mode has outputs, parameters or state that eval mode has not.
    """
    if isinstance(model, ExportedProgram):
        return _by_flags(captured.program, None, set(), None, "an ExportedProgram has one mode")
    with admit.untouched(model):
        try:
            shadow = separate(fold_existing(model)[0])
            cumulative = _start_training(shadow)
        except Exception as error:
            reason = f"no copy of the model could be set to train: {words_of(error)}"
            return _by_flags(captured.program, None, set(), None, reason)
        call = (tuple(args), dict(kwargs), dynamic_shapes)
        evals, trains, reason = Flat(captured.program), None, ""
        for exported in _graphs(shadow, captured, *call):
            if isinstance(exported, Exception):
                reason = reason or words_of(exported)[:200]
                continue
            trains = Flat(exported)
            try:
                modes = Walk(evals, trains, _state(shadow), cumulative).modes()
            except Mismatch as error:
                reason = str(error)
                continue
            return modes, _unmoved(captured.program, modes)
        if trains is not None and (more := beyond(evals, trains)):
            raise _branch(model, more)
        regions = _regions(separate(fold_existing(model)[0]), captured, evals, *call)
        return _by_flags(captured.program, shadow, cumulative, trains, reason, regions)


def _branch(model: nn.Module, more: str) -> CaptureError:
    return CaptureError(
        "cannot make a result that trains",
        where=type(model).__name__,
        why=f"in train mode the model {more}, and the graph is that of eval mode",
        do="Switch that branch off first (torchvision's auxiliary heads: model.aux_logits = False), or let an argument "
        "of the model decide on it in both modes, in place of self.training.",
    )


def _state(shadow: nn.Module) -> set[str]:
    return {n for n, _ in [*shadow.named_parameters(remove_duplicate=False), *shadow.named_buffers()]}


def _regions(
    shadow: nn.Module, captured: Capture, evals: Flat, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> dict[str, ModeArguments]:
    """The nodes that a model in eval mode computes without gradients, which a capture under no_grad does not show."""
    for exported in _graphs(shadow, captured, args, kwargs, shapes):
        if not isinstance(exported, Exception):
            with contextlib.suppress(Mismatch):
                return Walk(evals, Flat(exported), _state(shadow), set()).modes()
    # What is missed here is seen where the gradients of the result are held against the model's.
    return {}


def _start_training(shadow: nn.Module) -> set[str]:
    """Puts the copy in train mode; returns the paths of norms that average over all batches (momentum=None).

    Their momentum hangs on the value of a counter, which export cannot follow, so they are given a number.
    """
    shadow.train()
    cumulative = set()
    for path, module in shadow.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None and module.training:
            module.momentum = 0.1
            cumulative.add(path)
    return cumulative


def _graphs(
    shadow: nn.Module, captured: Capture, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Iterator[Program | Exception]:
    """Graphs of the copy, gradients on, with the sizes dynamic that may have been so at the capture, in its order."""
    wants = [want for want in captured.entry.inputs if isinstance(want, TensorInput)]
    dynamic = any(isinstance(size, str) for want in wants for size in want.sizes)
    if isinstance(dynamic_shapes, ShapesCollection):
        dynamic_shapes = dynamic_shapes.dynamic_shapes(shadow, args, kwargs)
    tries = attempts(args, kwargs, dynamic_shapes, not dynamic)
    if dynamic and dynamic_shapes is None:
        tries.pop()
    calls = [(args, kwargs)]
    larger = resized_call(captured, Call("example", args, kwargs))
    if larger is not None:
        # A batch-norm does not train on an example of one value per channel.
        calls.append((larger.args, larger.kwargs))
    for attempt in tries:
        for call in calls:
            try:
                # Export prints the graph of a model that it gives up on; here that is no failure.
                with contextlib.redirect_stderr(io.StringIO()):
                    own_args, own_kwargs, shapes = attempt.call(*call)
                    program = export_program(shadow, own_args, own_kwargs, shapes, gradients=True).module()
                    fold_constant_masks(program, only_held=True)
            except ValueError as error:
                yield error
            except Exception as error:
                yield error
                break
            else:
                yield program
                break


def _by_flags(
    program: Program,
    shadow: nn.Module | None,
    cumulative: set[str],
    trains: Flat | None,
    reason: str,
    regions: Mapping[str, ModeArguments] | None = None,
) -> tuple[dict[str, ModeArguments], list[Note]]:
    """Flips the flags that ops have for it, where the module that calls the op trains. `reason` goes into the note.

    `regions` are the nodes without gradients.
    """
    found: dict[str, ModeArguments] = dict(regions or {})
    rates, buffers = _attention_rates(trains), dict(program.named_buffers(remove_duplicate=False))
    places: dict[str, int] = defaultdict(int)
    unknown = []
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        path, given = _path(node), arguments(node)
        owner = _module(shadow, path)
        differs: dict[str, tuple[Any, Any]] = {}
        for flag in _FLAGS:
            if given.get(flag) is False and (owner is None or owner.training):
                differs[flag] = (False, True)
        if "dropout_p" in given:
            place, places[path] = places[path], places[path] + 1
            rate = rates[path][place] if place < len(rates[path]) else None
            if rate is None:
                unknown.append(node.name)
            elif rate != given["dropout_p"]:
                differs["dropout_p"] = (given["dropout_p"], rate)
        if not differs:
            continue
        mean = given.get("running_mean") if node.target is aten.batch_norm.default else None
        norm = str(mean.target).rpartition(".")[0] if isinstance(mean, Node) else None
        counter = f"{norm}.num_batches_tracked".lstrip(".")
        counter = counter if norm is not None and counter in buffers else None
        # An eval momentum of 0 is what momentum=None looks like.
        averages = norm in cumulative if shadow is not None else given.get("momentum") == 0.0
        averages = counter is not None and averages
        before = found.get(node.name, ModeArguments())
        found[node.name] = dataclasses.replace(before, differs=differs, counter=counter, cumulative=averages)
    note = f"train mode is not eval mode with other arguments ({reason}), so train() switches batch-norm and dropout "
    note += "by their flags and nothing else"
    if unknown:
        note += f"; the dropout of {len(unknown)} attentions stays off"
    return found, [Note(note, "warning")]


def _attention_rates(trains: Flat | None) -> dict[str, list[float]]:
    """Module path -> dropout_p of the attentions that it calls, in order."""
    rates: dict[str, list[float]] = defaultdict(list)
    for step in trains.steps if trains is not None else []:
        if isinstance(step.node.target, torch._ops.OpOverload):
            given = arguments(step.node)
            if "dropout_p" in given:
                rates[_path(step.node)].append(given["dropout_p"])
    return rates


def _path(node: Node) -> str:
    """The path of the module whose forward calls an op; a module called twice has an @1 the second time."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    return stack[-1][0].partition("@")[0] if stack else ""


def _module(shadow: nn.Module | None, path: str) -> nn.Module | None:
    try:
        return shadow.get_submodule(path) if shadow is not None else None
    except AttributeError:
        return None


def _unmoved(program: Program, modes: Mapping[str, ModeArguments]) -> list[Note]:
    """A note where a batch-norm or dropout is the same in both modes, as where a model keeps its norms frozen."""
    still = []
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.name not in modes:
            given = arguments(node)
            if any(given.get(flag) is False for flag in _FLAGS) and given.get("p") != 0:
                still.append(node.name)
    if not still:
        return []
    rest = f" and {len(still) - 3} more" if len(still) > 3 else ""
    return [Note(f"in train mode too the model runs these as in eval mode: {', '.join(still[:3])}{rest}")]
