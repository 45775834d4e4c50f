"""choose: the layout that measures fastest for a site, on the device at hand; dense unless another clearly wins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from fxprune.graph.environment import words_of
from fxprune.kernels.native.fingerprint import fingerprint
from fxprune.measure.device import cache_bytes
from fxprune.measure.timing import interleave_graphs, interleave_steady

from . import LAYOUTS
from .bitmap import Bitmap
from .dense import best_dense, predict_dense
from .gpu import GpuLayout
from .remember import Choices, choices_of
from .site import LEAST_ZEROS, Choice, Packed, Site, Timing

# A sparse layout must beat dense by this factor at the geometric mean of the declared sizes, and lose at none.
MARGIN = 1.05
SECONDS_PER_SITE = 0.12
# The part of the greatest gain that is enough for a smaller layout, where a weight is read from memory for every call.
_ALIKE = 0.87
_NO_MEMORY = "there is not enough memory on the device to pack it"


class Chooser:
    """Remembers what it measured: sites alike in shape, sparsity (to 2%), sizes and device are measured once.

    What was measured other processes know as well (`remember`), unless the CPU was busy meanwhile. `model_bytes` are
    those of all weights: where they fit into a core's cache a layer finds its own there, and is timed so; else the
    others' have taken their place. `watched` names weights that can be stored only if every call looks whether these
    tensors still hold what they held: that is part of what packing costs.
    """

    def __init__(self, *, only: str | None = None, model_bytes: int | None = None) -> None:
        self.only = only
        self._warm = model_bytes is not None and model_bytes <= cache_bytes()
        self.watched: Mapping[str, Sequence[Tensor]] = {}
        self._known: dict[tuple[object, ...], Choice] = {}

    def choose(self, site: Site) -> tuple[Choice, Packed | None]:
        """The choice for a site, and its weight packed unless the choice is dense."""
        refused: dict[str, str] = {}
        fitting: list[str] = []
        for name, layout in LAYOUTS.items():
            verdict = layout.fits(site)
            if verdict.ok:
                fitting.append(name)
            else:
                refused[name] = verdict.why
        if self.only is not None:
            return self._forced(site, refused, fitting)
        zeros = 1 - int(torch.count_nonzero(site.weight)) / max(1, site.weight.numel())
        if zeros < LEAST_ZEROS:
            few = f"{zeros:.1%} zeros are too few; {LEAST_ZEROS:.0%} is the least that is tried"
            return Choice("dense", few, {**refused, **dict.fromkeys(fitting, few)}, ()), None
        if not fitting:
            return Choice("dense", "no sparse layout fits", refused, ()), None
        watched = self.watched.get(site.name, ())
        key = (*_likeness(site, fitting), sum(tensor.nbytes for tensor in watched), self._warm)
        memory = _memory(site.weight)
        known = self._known.get(key) or (None if memory is None else _recalled(memory, key, fitting))
        if known is not None:
            packed, refused = _pack(site, [known.layout] if known.layout != "dense" else [], refused)
            if packed or known.layout == "dense":
                self._known[key] = known
                return dataclasses.replace(known, reused=True), packed.get(known.layout)
        choice, packed = _measure(site, fitting, refused, watched, self._warm)
        if _NO_MEMORY in choice.refused.values():
            return choice, packed  # There may be enough for the next.
        self._known[key] = choice
        if memory is not None and choice.timings and choice.steady:
            memory.put(str(key), dataclasses.asdict(choice))
        return choice, packed

    def _forced(self, site: Site, refused: dict[str, str], fitting: list[str]) -> tuple[Choice, Packed | None]:
        if self.only is not None and self.only in fitting:
            return Choice(self.only, "asked for by options", refused, ()), LAYOUTS[self.only].pack(site)
        why = "asked for by options" if self.only == "dense" else f"{self.only} does not fit"
        return Choice("dense", why, refused, ()), None


def _memory(weight: Tensor) -> Choices | None:
    return choices_of(weight.device)


def _recalled(memory: Choices, key: tuple[object, ...], fitting: list[str]) -> Choice | None:
    """What another process chose for a site alike; None where it chose nothing that fits this one."""
    found = memory.get(str(key))
    try:
        choice = Choice(**{**found, "timings": tuple(Timing(**each) for each in found["timings"])}) if found else None
    except (KeyError, TypeError):
        return None
    return choice if choice is not None and _is_whole(choice, fitting) else None


def _is_whole(choice: Choice, fitting: list[str]) -> bool:
    """Whether what was read has the types that a choice has, and is of a layout that fits."""
    figures = [figure for each in choice.timings for figure in (each.predicted, each.measured)]
    words = [choice.why, *choice.refused, *choice.refused.values()] if isinstance(choice.refused, dict) else [None]
    is_told = all(isinstance(word, str) for word in words)
    return is_told and choice.layout in ("dense", *fitting) and all(isinstance(figure, float) for figure in figures)


def _likeness(site: Site, fitting: list[str]) -> tuple[object, ...]:
    """What sites alike agree on: also which layouts fit, and what each would store."""
    weight = site.weight
    layouts = [(name, LAYOUTS[name]) for name in fitting]
    stored = [(name, round(50 * layout.bytes_of(weight) / weight.nbytes)) for name, layout in layouts]
    kept = int(torch.count_nonzero(weight)) / max(1, weight.numel())
    threads = torch.get_num_threads()
    return (*weight.shape, round(kept * 50), site.tokens, weight.dtype, weight.device, threads, tuple(stored))


def _measure(
    site: Site, fitting: list[str], refused: dict[str, str], watched: Sequence[Tensor], warm: bool
) -> tuple[Choice, Packed | None]:
    packed, refused = _pack(site, fitting, refused)
    fitting = list(packed)
    if not fitting:
        return Choice("dense", "no sparse layout could be packed", refused, ()), None
    timings: list[Timing] = []
    # A generator of its own, so that the user's random numbers go on as if nothing had been timed.
    generator = torch.Generator().manual_seed(0)
    gains: dict[str, list[float]] = {name: [] for name in fitting}
    steady = True
    for tokens in site.tokens:
        x = torch.randn(tokens, site.weight.shape[1], generator=generator).to(site.weight)
        dense = best_dense(site, x)
        sparse = [_bind(name, x, packed[name], site.bias, watched) for name in fitting]
        found = _times([*dense, *sparse], x.device, SECONDS_PER_SITE / len(site.tokens), warm)
        if isinstance(found, str):
            return Choice("dense", found, {**refused, **dict.fromkeys(fitting, found)}, ()), None
        samples, is_steady = found
        steady = steady and is_steady
        baseline = min(samples[: len(dense)])
        timings.append(Timing("dense", tokens, predict_dense(site, tokens), baseline))
        for name, seconds in zip(fitting, samples[len(dense) :], strict=True):
            timings.append(Timing(name, tokens, LAYOUTS[name].predict(site, tokens), seconds))
            gains[name].append(baseline / seconds)
    means = {name: math.exp(sum(map(math.log, g)) / len(g)) for name, g in gains.items()}
    sizes = "/".join(map(str, site.tokens))
    winners = {name: mean for name, mean in means.items() if mean >= MARGIN and min(gains[name]) >= 1.0}
    if winners:
        best = _best(winners, packed, thrifty=not warm and site.weight.device.type == "cpu")
        why = f"{means[best]:.2f}x dense at {sizes} tokens{_limit(best, site)}"
        fastest = max(winners, key=lambda name: winners[name])
        if best != fastest:
            why += f"; smaller than {fastest}, which is {means[fastest]:.2f}x"
        choice = Choice(best, why, refused, tuple(timings), steady=steady)
        return choice, packed[best]
    for name in fitting:
        refused = {**refused, name: f"{means[name]:.2f}x dense at {sizes} tokens; {MARGIN:.2f}x is asked"}
    choice = Choice("dense", "no sparse layout is clearly faster", refused, tuple(timings), steady=steady)
    return choice, None


def _best(gains: Mapping[str, float], packed: Mapping[str, Packed], *, thrifty: bool) -> str:
    """The layout that gains most; where `thrifty` the smallest of those that gain nearly as much.

    A weight that is read from memory for every call waits for its bytes, more so in a model than when it is timed.
    """
    most = max(gains.values())
    alike = [name for name in gains if gains[name] >= (most * _ALIKE if thrifty else most)]
    return min(alike, key=lambda name: packed[name].bytes())


def _pack(site: Site, fitting: list[str], refused: dict[str, str]) -> tuple[dict[str, Packed], dict[str, str]]:
    """The weight in each layout that there is memory to pack it for, and what was refused."""
    packed: dict[str, Packed] = {}
    for name in fitting:
        try:
            packed[name] = LAYOUTS[name].pack(site)
        except torch.OutOfMemoryError:
            refused = {**refused, name: _NO_MEMORY}
    return packed, refused


def _times(
    functions: list[Callable[[], Tensor]], device: torch.device, seconds: float, warm: bool
) -> tuple[list[float], bool] | str:
    """Seconds of each function and whether they are worth keeping, or why they could not be timed."""
    if device.type != "cuda":
        found, steady = interleave_steady(functions, seconds=seconds)
        return [samples.typical if warm else samples.alone for samples in found], steady
    try:
        # A kernel's time on a GPU strays to both sides, so that medians are compared.
        return [median(samples) for samples in interleave_graphs(functions, device, seconds=seconds)], True
    except RuntimeError as error:  # Among them torch.OutOfMemoryError.
        return f"it could not be timed ({words_of(error)})"


def _limit(name: str, site: Site) -> str:
    """What to tell of a layout whose kernel is for few tokens."""
    layout = LAYOUTS[name]
    layout = layout.on(site.weight.device) if isinstance(layout, Bitmap) else layout
    most = layout.most if isinstance(layout, GpuLayout) else None
    return "" if most is None else f"; a call with more than {most} tokens unpacks it first"


def _bind(name: str, x: Tensor, packed: Packed, bias: Tensor | None, watched: Sequence[Tensor]) -> Callable[[], Tensor]:
    layout = LAYOUTS[name]

    def call() -> Tensor:
        for tensor in watched:
            fingerprint(tensor)
        return layout.call(x, packed, bias, "")

    return call
