"""torch.compile(model, backend="fxprune"): the same stages behind Dynamo.

The pruning that the model carries (masks of torch.nn.utils.prune, plain zeros) is packed where that measures
faster. What the backend compiles depends on the values of the parameters, which Dynamo does not guard: every call looks
at their identity and version, and a call with others (a block of the same class that shares the compiled frame, a
weight changed in place) gets its own program.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxprune.capture.capture import Capture
from fxprune.capture.constants import fold_constants
from fxprune.capture.from_dynamo import Traced
from fxprune.emit.settings import Settings
from fxprune.graph.environment import hidden
from fxprune.graph.program import Program, fetch
from fxprune.lower.fold import fold_masks
from fxprune.lower.layouts.choose import Chooser
from fxprune.lower.lower import lower
from fxprune.select.decide import choose_selection

from .errors import InputError

log = logging.getLogger("fxprune")

# Programs kept per compiled frame; beyond, calls with yet other parameters run the graph as Dynamo gave it.
MOST_PROGRAMS = 16


def fxprune(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend: a callable that computes what `gm` computes. `options` and `mode` are those of `transform`.

    With gradients enabled, packed constants would cut them off, and under autocast they would not follow it: the graph
    then goes to Inductor as it is, with a warning. Raises InputError for unknown options.
    """
    settings = Settings.read(mode, options)
    if torch.is_grad_enabled():
        log.warning("backend fxprune: gradients are enabled, so the graph is compiled dense; use torch.no_grad()")
        return _inductor(gm, example_inputs, settings)
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        log.warning("backend fxprune: torch.autocast is on, so the graph is compiled dense; packed ops are float32")
        return _inductor(gm, example_inputs, settings)
    untraced = "backend fxprune: the graph is compiled dense, it could not be traced to ATen: %s"
    try:
        traced = Traced(gm, example_inputs)
        first = _lower(traced.bind(example_inputs), settings)
    except InputError:
        raise
    except Exception as error:
        log.warning(untraced, hidden(error))
        return _inductor(gm, example_inputs, settings)
    compiled = _inductor(first, [traced.values[i] for i in traced.free], settings)
    programs: dict[tuple[Any, ...], Callable[..., Any]] = {_key(traced, example_inputs): compiled}
    # The key is by identity, which is only unique while the tensors live.
    alive: list[Any] = [[example_inputs[i] for i in traced.static]]

    def run(*inputs: Any) -> Any:
        key = _key(traced, inputs)
        program = programs.get(key)
        if program is None:
            if len(programs) >= MOST_PROGRAMS or key[1] != tuple(traced.float_values.values()):
                return gm(*inputs)
            # The graph is Dynamo's for any parameters; without its guards at hand the copy runs as plain ATen ops.
            program = programs[key] = _lower(traced.bind(inputs), settings)
            alive.append([inputs[i] for i in traced.static])
        return program(*(inputs[i] for i in traced.free))

    return run


def _key(traced: Traced, inputs: Sequence[Any]) -> tuple[Any, ...]:
    parameters = tuple((id(inputs[i]), inputs[i]._version) for i in traced.static)
    fake = torch._subclasses.FakeTensor
    return parameters, tuple(
        traced.float_values[i] if isinstance(inputs[i], fake) else float(inputs[i]) for i in traced.floats
    )


def _lower(captured: Capture, settings: Settings) -> torch.fx.GraphModule:
    captured.program = _returned_apart(fold_constants(captured.program))
    selection = choose_selection(captured, captured.program).selection
    program = fold_masks(captured.program, selection)
    packed, lowered = lower(program, selection.mask, Chooser(only=settings.layout))
    for w in lowered:
        log.info("backend fxprune: %s -> %s (%s)", w.name, w.choice.layout, w.choice.why)
    return packed


def _returned_apart(program: Program) -> Program:
    """Constants that the graph returns get a buffer of their own: a pruning hook's `weight` is also such an output."""
    output = program.graph.output_node()
    for node in [n for n in output.all_input_nodes if n.op == "get_attr"]:
        name = f"returned_{node.name}"
        program.register_buffer(name, fetch(program, str(node.target)), persistent=False)
        with program.graph.inserting_before(output):
            output.replace_input_with(node, program.graph.get_attr(name))
    program.recompile()
    return program


def _inductor(gm: torch.fx.GraphModule, inputs: Sequence[Any], settings: Settings) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    arguments = settings.inductor_options()
    if arguments is None:
        return gm
    patches = {k: v for k, v in arguments.items() if k != "freezing"}
    return compile_fx(gm, list(inputs), config_patches=patches or None)  # pyright: ignore[reportReturnType]


__all__ = ["fxprune"]
