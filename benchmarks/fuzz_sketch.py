"""A random model as data: steps that read and make named values, its code, and the model built from that code.

Steps are lines of Python, so that a model prints as it runs, and can lose a step and still be a model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import linecache
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import fuzz_parts

HEADER = """\
import torch
from torch import nn
import torch.nn.functional as F
from benchmarks.fuzz_parts import *
"""
VECTOR, SEQUENCE, SIGNAL, IMAGE = "vector", "sequence", "signal", "image"
TOKENS, MASK, FLAG, SCALE = "tokens", "mask", "flag", "scale"


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the model by name: what its dimensions mean, and its shape [batch, *shape] without the batch.

    vector [c], sequence [t, c], signal [c, l], image [c, h, w], tokens [t] (integers), mask [t] (booleans).
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """How many channels it has."""
        return self.shape[-1] if self.kind == SEQUENCE else self.shape[0]


@dataclasses.dataclass(frozen=True)
class Step:
    """Lines of __init__ and of forward under the name of what they do, and the one value that they make."""

    op: str
    init: tuple[str, ...]
    lines: tuple[str, ...]
    makes: Value

    def members(self) -> list[str]:
        """Names of the modules, parameters and buffers that it makes."""
        return [
            found for line in self.init for found in re.findall(r'^self\.(?:register_buffer\(")?(\w+)(?: =|",)', line)
        ]

    def with_reader(self, old: str, new: str) -> Step:
        """The step reading another value."""
        return dataclasses.replace(self, lines=tuple(re.sub(rf"\b{old}\b", new, line) for line in self.lines))


@dataclasses.dataclass(frozen=True)
class Sketch:
    """Inputs, steps in order, and what is returned: values by name and how they are put together."""

    inputs: tuple[Value, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    form: str = "plain"

    def code(self) -> str:
        """The model as Python."""
        init = [line for step in self.steps for line in step.init]
        body = [line for step in self.steps for line in step.lines]
        lines = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in init]
        lines += ["", f"    def forward(self, {', '.join(map(_parameter, self.inputs))}):"]
        lines += [f"        {line}" for line in body]
        lines += [f"        return {_returned(self.outputs, self.form)}"]
        return HEADER + "\n" + "\n".join(lines) + "\n"

    def needed(self) -> Sketch:
        """Without steps of which neither the value nor a member is needed for the outputs."""
        text, steps = " ".join(self.outputs), []
        for step in reversed(self.steps):
            if any(_uses(text, name) for name in (step.makes.name, *step.members())):
                steps.append(step)
                text = "\n".join((text, *step.lines, *step.init))
        used = [value for index, value in enumerate(self.inputs) if index == 0 or _uses(text, value.name)]
        return dataclasses.replace(self, inputs=tuple(used), steps=tuple(reversed(steps)))

    def values(self) -> list[Value]:
        """Inputs and what steps make, in order."""
        return [*self.inputs, *(s.makes for s in self.steps)]


def _uses(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


def _parameter(value: Value) -> str:
    defaults = {FLAG: "=True", SCALE: "=1.0"}
    return value.name + defaults.get(value.kind, "")


def _returned(outputs: Sequence[str], form: str) -> str:
    if form == "dict":
        return "{" + ", ".join(f'"{name}": {name}' for name in outputs) + "}"
    if form == "nested":
        return "{" + f'"first": {outputs[0]}, "rest": [{", ".join(outputs)}]' + "}"
    if form == "tuple" or len(outputs) > 1:
        return "(" + ", ".join(outputs) + ",)"
    return outputs[0]


def build(code: str) -> Any:
    """The model of a sketch's code, in eval mode, with all weights drawn at unit-like scale; always the same one."""
    digest = hashlib.sha256(code.encode()).hexdigest()[:12]
    file = f"<fuzz {digest}>"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"__name__": f"fuzz_{digest}"}
    exec(compile(code, file, "exec"), scope)
    torch.manual_seed(0)
    return randomise(scope["Model"]()).eval()


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Every parameter and statistic drawn anew from its name: nothing is 0, 1 or tiny, and no other name matters.

    Matrices keep the scale of their inputs, vectors are near one.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(number(name))
        scale = math.prod(parameter.shape[1:]) ** -0.5 if parameter.dim() > 1 else 0.5
        drawn = torch.randn(parameter.shape, generator=generator) * scale
        parameter.copy_(drawn + 1.0 if parameter.dim() == 1 else drawn)
    for name, buffer in model.named_buffers():
        generator = torch.Generator().manual_seed(number(name))
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def number(text: str) -> int:
    """A number that any text always has, in any process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def draw_inputs(
    inputs: Sequence[Value], batch: int, seed: int, dtype: torch.dtype, constants: Mapping[str, Any]
) -> dict[str, Any]:
    """One call of a sketch by name. Flags and scales are constants of the case; all else is drawn."""
    found: dict[str, Any] = {}
    for value in inputs:
        generator = torch.Generator().manual_seed(number(f"{value.name} {batch} {seed}"))
        shape = (batch, *value.shape)
        if value.kind in (FLAG, SCALE):
            if value.name in constants:
                found[value.name] = constants[value.name]
        elif value.kind == TOKENS:
            found[value.name] = torch.randint(0, fuzz_parts.VOCABULARY, shape, generator=generator)
        elif value.kind == MASK:
            found[value.name] = torch.rand(shape, generator=generator) > 0.3
            found[value.name][:, 0] = True
        else:
            found[value.name] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return found
