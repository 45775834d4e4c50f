"""torch.compile(model, backend="fxprune"): the same stages behind Dynamo.

The pruning that the model carries (masks of torch.nn.utils.prune, plain zeros) is packed where that measures faster.
What is packed is a constant, and all else stays an input of the call. Dynamo guards neither the identity nor the values
of parameters, so that every call looks at both: other parameters (a block of the same class that shares the compiled
frame) and values that changed are packed anew. Versions do not tell of every write (those through `.data`, or from
another process), so that the weights behind what was packed are read: `fingerprint`. The chooser counts that in.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from fxprune.capture.constants import fold_constants
from fxprune.capture.from_dynamo import Traced, Unbound, with_floats
from fxprune.emit.settings import Settings
from fxprune.graph import compat
from fxprune.graph.environment import hidden
from fxprune.graph.program import Program, fetch
from fxprune.graph.weights import uses
from fxprune.kernels.native.fingerprint import fingerprint
from fxprune.lower.attention import lower_attention
from fxprune.lower.fold import fold_masks
from fxprune.lower.layouts.choose import Chooser
from fxprune.lower.lower import lower
from fxprune.select.decide import choose_selection
from fxprune.select.subnormal import flush_parameters

from .errors import InputError, warn_once

log = logging.getLogger("fxprune")

# Sets of parameters that have a program at a time, for each compiled frame; beyond, the oldest goes.
MOST_PROGRAMS = 64
# Programs that had to go before they had served so many calls; after so many of them nothing is packed any more.
FEW_CALLS, MOST_CHANGES = 100, 8


def fxprune(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend: a callable that computes what `gm` computes. `options` and `mode` are those of `transform`.

    With gradients enabled, packed constants would cut them off, and under autocast they would not follow it: the graph
    then goes to Inductor as it is, with a warning. So it does where nothing is worth packing. Raises InputError for
    unknown options.
    """
    settings = Settings.read(mode, options)
    if torch.is_grad_enabled():
        log.warning("backend fxprune: gradients are enabled, so the graph is compiled dense; use torch.no_grad()")
        return _inductor(gm, example_inputs, settings)
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        log.warning("backend fxprune: torch.autocast is on, so the graph is compiled dense; packed ops are float32")
        return _inductor(gm, example_inputs, settings)
    try:
        traced = Traced(gm, example_inputs)
        if traced.writes_to_state:
            log.warning("backend fxprune: the graph is compiled dense, it writes to its parameters or buffers")
            return _inductor(gm, example_inputs, settings)
        if traced.hides_weights:
            warn_once(
                "backend fxprune: weights of an nn.TransformerEncoderLayer or nn.MultiheadAttention stay dense, for "
                "torch's fast path runs the layer as one op. torch.backends.mha.set_fastpath_enabled(False) before the "
                "first call lets them be packed."
            )
        chooser = Chooser(only=settings.layout)
        packed = _pack(traced, example_inputs, settings, chooser)
    except InputError:
        raise
    except Exception as error:
        log.warning("backend fxprune: the graph is compiled dense, it could not be traced to ATen: %s", hidden(error))
        return _inductor(gm, example_inputs, settings)
    if packed is None:
        return _inductor(gm, example_inputs, settings)
    programs = _Programs(gm, traced, settings, chooser)
    compiled = _inductor(packed.unbound.program, _examples(traced, packed.unbound), settings)
    programs.add(example_inputs, packed, compiled)

    def run(*inputs: Any) -> Any:
        return programs(inputs)

    return run


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A program with packed weights, and what to look at before it may run.

    watched  positions, among the inputs, of what its constants were made from
    held     tensors of the graph itself that they were made from
    stamps   of both, as they were then
    """

    unbound: Unbound
    watched: tuple[int, ...]
    held: tuple[Tensor, ...]
    stamps: tuple[object, ...]

    @functools.cached_property
    def likeness(self) -> Hashable:
        """What programs agree on that can share what was compiled."""
        made = [(t.shape, t.stride(), t.dtype, t.device) for t in self.unbound.tensors]
        return self.unbound.program.code, self.unbound.used, tuple(made)


@dataclasses.dataclass
class _Entry:
    """The program of one set of parameters; `packed` is None where it is the dense one."""

    packed: _Packed | None
    run: Callable[..., Any]
    alive: list[weakref.ref[Tensor]]
    calls: int = 0


class _Programs:
    """The programs of a compiled frame: one for each set of parameters, as long as these hold what they held."""

    def __init__(self, gm: torch.fx.GraphModule, traced: Traced, settings: Settings, chooser: Chooser) -> None:
        self._gm, self._traced, self._settings, self._chooser = gm, traced, settings, chooser
        self._floats = tuple(traced.float_values.values())
        self._entries: dict[tuple[int, ...], _Entry] = {}
        self._changes = 0
        self._dense: Callable[..., Any] | None = None

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """What the graph computes, by the program of these parameters or by the dense one."""
        floats = tuple(float(inputs[i]) for i in self._traced.floats)
        if floats != self._floats:
            return self._run_dense(inputs)
        entry = self._entries.get(self._key(inputs))
        if entry is None or not self._is_current(entry, inputs):
            with compat.alone():
                entry = self._renew(inputs)
        if entry is None or entry.packed is None:
            return self._run_dense(inputs)
        entry.calls += 1
        return entry.run(*entry.packed.unbound.arguments(inputs))

    def add(self, inputs: Sequence[Any], packed: _Packed | None, run: Callable[..., Any]) -> _Entry:
        """Keeps the program of the parameters among these inputs for as long as all of them live."""
        key = self._key(inputs)
        while len(self._entries) >= MOST_PROGRAMS:
            self._forget(next(iter(self._entries)))
        # The key is by identity, which is only unique while the tensors live.
        alive = [weakref.ref(inputs[i], lambda _: self._forget(key)) for i in self._traced.static]
        self._entries[key] = _Entry(packed, run, alive)
        return self._entries[key]

    def _key(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        return tuple(id(inputs[i]) for i in self._traced.static)

    def _is_current(self, entry: _Entry, inputs: Sequence[Any]) -> bool:
        packed = entry.packed
        if packed is None:
            return True
        return all(
            _stamp(tensor, self._settings) == known
            for tensor, known in zip(_watched(packed.watched, inputs, packed.held), packed.stamps, strict=True)
        )

    def _renew(self, inputs: Sequence[Any]) -> _Entry | None:
        """The program for parameters that are new or changed; None where too much changes for any to pay."""
        key = self._key(inputs)
        entry = self._entries.get(key)
        if entry is not None and self._is_current(entry, inputs):
            return entry  # Another thread has done it.
        # Programs that differ in the values of their tensors alone are compiled once.
        compiled = {e.packed.likeness: e.run for e in list(self._entries.values()) if e.packed is not None}
        self._forget(key)
        if self._changes >= MOST_CHANGES:
            warn_once(
                "backend fxprune: the weights of a compiled graph changed again and again between calls, so that "
                "nothing more of it is packed and it runs dense, as torch.compile has it. Use torch.compile without "
                "this backend while weights change."
            )
            return None
        try:
            packed = _pack(self._traced, inputs, self._settings, self._chooser)
        except Exception as error:
            log.warning("backend fxprune: a graph runs dense, its weights could not be packed: %s", hidden(error))
            packed = None
        if packed is None:
            return self.add(inputs, None, self._run_dense)
        # Dynamo's guards for this frame are made by now: torch.compile makes what another program needs.
        run = compiled.get(packed.likeness) or _compiled_later(packed.unbound.program, self._settings)
        return self.add(inputs, packed, run)

    def _forget(self, key: tuple[int, ...]) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._changes += entry.calls < FEW_CALLS

    def _run_dense(self, inputs: Sequence[Any]) -> Any:
        """Dynamo's graph as it is, parameters among its inputs; compiled when it is first needed."""
        if self._dense is None:
            self._dense = _compiled_later(with_floats(self._gm, self._traced.floats), self._settings)
        floats = self._traced.floats
        return self._dense(*(float(x) if i in floats else x for i, x in enumerate(inputs)))


def _pack(traced: Traced, inputs: Sequence[Any], settings: Settings, chooser: Chooser) -> _Packed | None:
    """The program for these inputs; None where no weight is packed and nothing else is a constant."""
    captured = traced.bind(inputs)
    program, _ = flush_parameters(_returned_apart(fold_constants(captured.program)), hidden=True)
    selection = choose_selection(captured, program).selection
    folded = fold_masks(program, selection)
    reads = {str(node.target): node for node in folded.graph.find_nodes(op="get_attr")}
    found = uses(folded)

    def sources(names: Iterable[str]) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
        """Positions of the inputs, and tensors of the graph, that these constants and their biases came from."""
        biases = [str(u.bias.target) for name in names for u in found.get(name, []) if u.bias is not None]
        each = [traced.sources(reads[name]) for name in (*names, *biases) if name in reads]
        held = {id(tensor): tensor for _, tensors in each for tensor in tensors}
        return tuple(dict.fromkeys(i for places, _ in each for i in places)), tuple(held.values())

    def tensors(names: Sequence[str]) -> list[Tensor]:
        return _watched(sources(names)[0], inputs, sources(names)[1])

    is_fixed = settings.constant_weights
    on_gpu = _on_gpu([inputs[i] for i in traced.static])
    chooser.watched = {} if is_fixed or on_gpu else {name: tensors([name]) for name in selection.mask}
    result, lowered = lower(folded, selection.mask, chooser, rounds=settings.dtype is not None)
    packed = [w.name for w in lowered if w.choice.layout != "dense"]
    if on_gpu and not is_fixed and packed:
        warn_once(
            "backend fxprune: the graph runs dense, for to see whether weights on a GPU changed a call would wait for "
            'it. Where nobody writes to them, options={"constant_weights": True} packs them.'
        )
        return None
    for w in lowered:
        log.info("backend fxprune: %s -> %s (%s)", w.name, w.choice.layout, w.choice.why)
    for gain in lower_attention(result) if packed else []:
        log.info("backend fxprune: an attention reads keys and values where they lie (%.2fx torch's)", gain)
    unbound = traced.unbind(result, keep_folded=is_fixed)
    if not unbound.tensors:
        return None
    made = [name for name in reads if name not in unbound.live]
    places, held = sources(dict.fromkeys([*packed, *made]))
    stamps = tuple(_stamp(tensor, settings) for tensor in _watched(places, inputs, held))
    return _Packed(unbound, places, held, stamps)


def _on_gpu(tensors: Iterable[Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors)


def _watched(places: Sequence[int], inputs: Sequence[Any], held: Sequence[Tensor]) -> list[Tensor]:
    return [*(inputs[i] for i in places), *held]


def _stamp(tensor: Tensor, settings: Settings) -> object:
    """What tells whether a tensor is as it was."""
    if settings.constant_weights:
        return None if tensor.is_inference() else tensor._version
    return tuple(tensor.shape), fingerprint(tensor)


def _returned_apart(program: Program) -> Program:
    """Constants that the graph returns get a buffer of their own: a pruning hook's `weight` is also such an output."""
    output = program.graph.output_node()
    for node in [n for n in output.all_input_nodes if n.op == "get_attr"]:
        name = f"returned_{node.name}"
        program.register_buffer(name, fetch(program, str(node.target)), persistent=False)
        with program.graph.inserting_before(output):
            apart = program.graph.get_attr(name)
        apart.meta = dict(node.meta)
        output.replace_input_with(node, apart)
    program.recompile()
    return program


def _examples(traced: Traced, unbound: Unbound) -> list[Any]:
    """Fake values for the inputs of a program: Dynamo's own, and for what was made their sizes as they are."""
    fake = detect_fake_mode(traced.values)
    made = [fake.from_tensor(t, static_shapes=True) if fake is not None else t for t in unbound.tensors]
    return [*(traced.values[i] for i in unbound.used), *made]


def _inductor(gm: torch.fx.GraphModule, inputs: Sequence[Any], settings: Settings) -> Callable[..., Any]:
    """The graph compiled for a frame that Dynamo is about to guard."""
    from torch._inductor.compile_fx import compile_fx

    patches = _options(settings)
    if patches is None:
        return gm
    return compile_fx(gm, list(inputs), config_patches=patches or None)  # pyright: ignore[reportReturnType]


def _compiled_later(program: torch.fx.GraphModule, settings: Settings) -> Callable[..., Any]:
    """The same for a program that is met when the frame has its guards: it gets guards of its own."""
    options = _options(settings)
    return program if options is None else torch.compile(program, options=options or None)


def _options(settings: Settings) -> dict[str, Any] | None:
    """Options of Inductor; None for eager. Parameters are inputs, so that there is nothing to freeze."""
    options = settings.inductor_options()
    return None if options is None else {key: value for key, value in options.items() if key != "freezing"}


__all__ = ["fxprune"]
