"""A sketch as it grows: names, members and values; what a random step asks for while it writes its lines."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from benchmarks.fuzz_sketch import IMAGE, SEQUENCE, SIGNAL, VECTOR, Step, Value

FLOATS = (VECTOR, SEQUENCE, SIGNAL, IMAGE)
WIDTHS = (4, 6, 7, 8, 8, 12, 16, 16, 24)
MOST_ELEMENTS = 4096


class Draft:
    """Values so far, and the steps that made them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.inputs: list[Value] = []
        self.steps: list[Step] = []
        self.values: list[Value] = []
        self.linears: list[tuple[str, int, int]] = []
        self._count = 0
        self._init: list[tuple[str, str]] = []

    def member(self, code: str, letter: str = "m") -> str:
        """A member of the model that the next step makes; how forward reads it."""
        self._count += 1
        self._init.append((f"{letter}{self._count}", f"self.{letter}{self._count} = {code}"))
        return f"self.{letter}{self._count}"

    def parameter(self, *shape: int) -> str:
        """A parameter of that shape."""
        return self.member(f"nn.Parameter(torch.empty({', '.join(map(str, shape))}))", "p")

    def buffer(self, code: str, persistent: bool = True) -> str:
        """A buffer that holds what the code says."""
        self._count += 1
        self._init.append(
            (f"b{self._count}", f'self.register_buffer("b{self._count}", {code}, persistent={persistent})')
        )
        return f"self.b{self._count}"

    def step(self, op: str, lines: str | Sequence[str], kind: str, shape: Sequence[int]) -> Value:
        """Adds a step. The last of its lines is the expression of what it makes."""
        self._count += 1
        value = Value(f"h{self._count}", kind, tuple(shape))
        *before, last = [lines] if isinstance(lines, str) else lines
        text = "\n".join([*before, last])
        init: list[str] = []
        for name, code in reversed(self._init):
            # Whoever draws one of several ways has made the members of all of them.
            if re.search(rf"\bself\.{name}\b", text):
                init.insert(0, code)
                text += code.partition(name)[2]
        self.steps.append(Step(op, tuple(init), (*before, f"{value.name} = {last}"), value))
        self.values.append(value)
        self._init = []
        return value

    def alike(self, x: Value) -> Value | None:
        """Another value of the same kind and shape."""
        found = [v for v in self.values if v.name != x.name and (v.kind, v.shape) == (x.kind, x.shape)]
        return self.rng.choice(found) if found else None

    def beside(self, x: Value) -> Value | None:
        """Another value that differs from x at most in its channels."""
        found = [v for v in self.values if v.name != x.name and v.kind == x.kind and _places(v) == _places(x)]
        return self.rng.choice(found) if found else None

    def width(self) -> int:
        """Some number of channels."""
        return self.rng.choice(WIDTHS)

    def divisor(self, n: int, most: int = 8) -> int:
        """A divisor of n from 2 up to `most`; 1 where there is none."""
        found = [k for k in range(2, most + 1) if n % k == 0]
        return self.rng.choice(found) if found else 1

    def coin(self, share: float = 0.5) -> bool:
        """True that often."""
        return self.rng.random() < share


def _places(value: Value) -> tuple[int, ...]:
    return value.shape[:-1] if value.kind == SEQUENCE else value.shape[1:]


def dim(x: Value) -> int:
    """Where its channels are, in a tensor with its batch."""
    return 2 if x.kind == SEQUENCE else 1


def with_width(x: Value, width: int) -> tuple[int, ...]:
    """Its shape with another number of channels."""
    return (*x.shape[:-1], width) if x.kind == SEQUENCE else (width, *x.shape[1:])
