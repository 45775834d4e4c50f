"""One case: a random model, its pruning, and the forms in which it is called, all drawn from one seed."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fuzz_grow import grow
from benchmarks.fuzz_prune import BACKEND, CALIBRATE, LATER, ONCE, TRAIN, Pruning, draw_pruning
from benchmarks.fuzz_sketch import FLAG, SCALE, Sketch, build, draw_inputs
from fxprune.lower.layouts import LAYOUTS

DTYPES = (torch.float32,) * 9 + (torch.float64,) * 8 + (torch.bfloat16, torch.float16)
BATCHES = (1, 2, 3, 3, 5, 8)
COMPILED = 0.05
UNCHECKED = 0.4
STRICT = 0.5
ROUNDED = 0.08
EXPORTED = 0.15
PICKLED = 0.2
SEVERAL = 0.1

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything that a case is.

    form        "args", "kwargs" or "both": how the example is given; later calls take turns
    memory      "plain", "channels_last" or "strided": how inputs lie
    is_checked  whether fxprune checks its result itself; where it does, its checks hide what the oracle here would find
    is_strict   FXPRUNE_CHECK=1: every stage keeps its promises, and no error turns into a note
    is_rounded  weights are multiples of a quarter: many are equal, some are zero
    is_exported the model is given as an ExportedProgram, which takes two samples and more
    is_pickled  the result is pickled and loaded before it is called
    is_several  two calls of different batches are given
    """

    seed: int
    sketch: Sketch
    pruning: Pruning
    dtype: torch.dtype
    batch: int
    constants: dict[str, Any]
    form: str
    memory: str
    options: dict[str, Any]
    is_checked: bool
    is_strict: bool
    is_rounded: bool
    is_exported: bool = False
    is_pickled: bool = False
    is_several: bool = False

    def model(self) -> nn.Module:
        """The user's model, pruned by the user; made anew, and always alike."""
        model = build(self.sketch.code()).to(self.dtype)
        if self.is_rounded:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_((parameter * 4).round() / 4)
        self.pruning.apply(model)
        return model

    def inputs(self, batch: int, seed: int) -> Inputs:
        """One call by name."""
        found = draw_inputs(self.sketch.inputs, batch, seed, self.dtype, self.constants)
        return {name: self._laid(value) if isinstance(value, Tensor) else value for name, value in found.items()}

    def _laid(self, x: Tensor) -> Tensor:
        if self.memory == "channels_last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if self.memory == "strided" and x.dim() > 1:
            return torch.stack([x, x], -1)[..., 0] if x.dim() != 3 else x.transpose(1, 2).contiguous().transpose(1, 2)
        return x

    def split(self, inputs: Inputs, form: str) -> tuple[tuple[Any, ...], Inputs]:
        """Arguments and keywords of a call in that form; every other case has the last keyword first."""
        names = list(inputs)
        # A name that was left out ends what can be given by place.
        order = [value.name for value in self.sketch.inputs]
        by_place = len(names) if names == order[: len(names)] else 1
        first = {"args": by_place, "kwargs": 0, "both": 1}[form]
        named = names[first:] if self.seed % 2 else names[first:][::-1]
        return tuple(inputs[name] for name in names[:first]), {name: inputs[name] for name in named}

    def describe(self) -> str:
        """The case for a reader: code, pruning and forms."""
        asked = f"transform(model, plan, dtype {self.dtype}, batch {self.batch}, by {self.form}, {self.memory} memory"
        asked += f", options={self.options}, check={self.is_checked}) by way of {self.pruning.way!r}"
        more = f"FXPRUNE_CHECK={int(self.is_strict)}" + (", weights rounded to quarters" if self.is_rounded else "")
        more += ", given as an ExportedProgram" * self.is_exported + ", pickled and loaded" * self.is_pickled
        more += ", two calls given" * self.is_several
        values = f", constants {self.constants}" if self.constants else ""
        inputs = ", ".join(f"{value.name} {value.kind} {list(value.shape)}" for value in self.sketch.inputs)
        return f"{self.sketch.code()}\n{self.pruning.code()}\n# {asked}\n# inputs: {inputs}{values}\n# {more}"


def draw_case(seed: int) -> Case:
    """The case of a seed; the same one in every process."""
    sketch = grow(random.Random(f"{seed} model"))
    rng = random.Random(f"{seed} pruning")
    pruning = draw_pruning(rng, build(sketch.code()))
    rng = random.Random(f"{seed} forms")
    dtype = rng.choice(DTYPES)
    constants: dict[str, Any] = {}
    for value in sketch.inputs:
        if value.kind == FLAG and rng.random() < 0.7:
            constants[value.name] = rng.random() < 0.5
        elif value.kind == SCALE and rng.random() < 0.7:
            constants[value.name] = rng.choice((0.5, 2.0))
    options: dict[str, Any] = {"compile": False, "measure": False}
    if rng.random() < COMPILED and pruning.way != TRAIN:
        del options["compile"]
    # Small weights are fastest dense: what packs them must be asked for.
    if layout := rng.choice((None, "nonzeros", "nonzeros", "nonzeros", "dense", *LAYOUTS)):
        options["layout"] = layout
    if rng.random() < 0.5:
        options["align"] = rng.choice((1, 2, 4))
    if pruning.way in (BACKEND, CALIBRATE) and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    batch = rng.choice(BATCHES)
    more = random.Random(f"{seed} more")
    is_exported, is_pickled, is_several = (more.random() < share for share in (EXPORTED, PICKLED, SEVERAL))
    # Hooks and parametrizations have other names in an ExportedProgram.
    is_exported = is_exported and pruning.way == ONCE and not pruning.edits and batch > 1
    return Case(
        seed,
        sketch,
        pruning,
        dtype,
        batch,
        constants,
        rng.choice(("args", "args", "kwargs", "both")),
        rng.choice(("plain", "plain", "plain", "channels_last", "strided")),
        options,
        rng.random() >= UNCHECKED,
        rng.random() < STRICT,
        rng.random() < ROUNDED,
        is_exported,
        is_pickled and pruning.way not in (BACKEND, LATER),
        is_several and pruning.way in (ONCE, TRAIN) and not is_exported,
    )
