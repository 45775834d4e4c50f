"""How a call of an op is written down for the tests of the rules: tensors as shapes, the rest as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fxprune.couple.rules


@dataclass(frozen=True)
class Given:
    """A random tensor. `axes` names dimensions, one letter each: equal letters are one axis before the op is seen."""

    kind: str
    shape: tuple[int, ...]
    axes: str = ""
    high: int = 2

    def make(self, generator: torch.Generator) -> Tensor:
        """The tensor, float64 unless its kind is another.

        "ends" are where equal parts of `high` end, "full" holds `high`, "certain" are probabilities of 0 and 1, and
        "places" are distinct within the last `high` dimensions.
        """
        if self.kind == "int":
            return torch.randint(0, self.high, self.shape, generator=generator)
        if self.kind == "ends":
            return torch.linspace(0, self.high, self.shape[0] + 1)[1:].to(torch.int32)
        if self.kind == "places":
            random = torch.rand(self.shape, generator=generator)
            return random.flatten(-self.high).argsort(-1).view(self.shape)
        if self.kind == "full":
            return torch.full(self.shape, self.high)
        if self.kind in ("bool", "certain"):
            coins = torch.rand(self.shape, generator=generator) > 0.5
            return coins.double() if self.kind == "certain" else coins
        if self.kind == "single":
            return torch.randn(self.shape, generator=generator)
        if self.kind == "complex":
            return torch.randn(*self.shape, dtype=torch.complex128, generator=generator)
        if self.kind == "unit":
            return torch.rand(self.shape, dtype=torch.float64, generator=generator) * 0.8 + 0.1
        if self.kind == "sorted":
            return torch.randn(self.shape, dtype=torch.float64, generator=generator).sort().values
        return torch.randn(self.shape, dtype=torch.float64, generator=generator)

    def __str__(self) -> str:
        return ("" if self.kind == "float" else f"{self.kind} ") + "x".join(map(str, self.shape))


def F(*shape: int, axes: str = "") -> Given:
    """Normal floats."""
    return Given("float", shape, axes)


def U(*shape: int, axes: str = "") -> Given:
    """Floats between 0.1 and 0.9."""
    return Given("unit", shape, axes)


def I(high: int, *shape: int, axes: str = "") -> Given:  # noqa: E743
    """Whole numbers below `high`."""
    return Given("int", shape, axes, high)


def B(*shape: int, axes: str = "") -> Given:
    """Truth values."""
    return Given("bool", shape, axes)


def C(*shape: int) -> Given:
    """Complex numbers."""
    return Given("complex", shape)


@dataclass(frozen=True)
class Case:
    """One call. `out` names the output's dimensions as `Given.axes` does; `random` is an op whose values are.

    `aligned`: the op takes sizes of whole 16 bytes only, so that axes which earlier ops have split are left out.
    """

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    out: str = ""
    random: bool = False
    aligned: bool = False

    @property
    def op(self) -> str:
        """The key of its rule."""
        return fxprune.couple.rules.packet_name(self.target)

    def __str__(self) -> str:
        def show(value: Any) -> str:
            if isinstance(value, (list, tuple)):
                return "[" + ", ".join(map(show, value)) + "]"
            return str(value)

        named = [f"{k}={show(v)}" for k, v in self.kwargs.items()]
        return f"{str(self.target).removeprefix('aten.')}({', '.join([*map(show, self.args), *named])})"


CASES: list[Case] = []


def case(name: str, *args: Any, out: str = "", random: bool = False, aligned: bool = False, **kwargs: Any) -> None:
    """Add a call of `name`, "op" or "op.overload". An op that this torch does not have is left out."""
    packet, _, overload = name.partition(".")
    found = getattr(torch.ops.aten, packet, None)
    if found is None:
        return
    target = getattr(found, overload or ("default" if "default" in found.overloads() else found.overloads()[0]))
    CASES.append(Case(target, args, kwargs, out, random, aligned))


def each(names: str, *args: Any, **kwargs: Any) -> None:
    """The same call of several ops."""
    for name in names.split():
        case(name, *args, **kwargs)
