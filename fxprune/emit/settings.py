"""Settings: transform's `mode` and `options`, read and refused in one place."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import torch

from fxprune.errors import InputError
from fxprune.graph.environment import variable
from fxprune.lower.layouts import LAYOUTS

_FLAGS = ("compile", "freezing", "measure", "masked_matmul", "constant_weights")
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a result is chosen and compiled.

    mode      torch.compile's mode, or None
    compile   False leaves the result eager
    freezing  Inductor's freezing: constants are folded and weights laid out for their kernels
    dtype     torch.bfloat16 or "bfloat16": products of packed float32 weights may be of numbers rounded to it, sums
              stay in float32; on CPUs with AMX they are several times as fast
    layout    force this layout ("dense" or one of LAYOUTS) instead of measuring
    measure   time the result in its forms, and against the user's model as it runs best: the fastest form is emitted
    tune_for  sizes of dim 0 of the inputs to choose layouts for; empty: the example's
    align     widths are left at multiples of this where dead channels leave: others are slower to compute
    masked_matmul   with trainable=True: masks of linear layers are bits that their products apply, so that no w * m
              takes memory; on a GPU the kernels of `triton_kernels.masked` do it
    constant_weights  for the backend of torch.compile: nobody writes to the weights, so that calls look at their
              identity and version alone, and not at what they hold
    """

    mode: str | None = None
    compile: bool = True
    freezing: bool = True
    dtype: str | None = None
    layout: str | None = None
    measure: bool = True
    tune_for: tuple[int, ...] = ()
    align: int = 8
    masked_matmul: bool = False
    constant_weights: bool = False

    @staticmethod
    def read(mode: str | None, options: Mapping[str, Any] | None) -> Settings:
        """Settings from transform's arguments. Raises InputError for what is unknown or of the wrong type."""
        if mode is not None and mode not in _MODES:
            raise _unknown("mode", mode, _MODES)
        if options is not None and not isinstance(options, Mapping):
            raise InputError(
                f"cannot use a {type(options).__name__} as options",
                why="they are not names with values",
                do='Pass a dict, such as {"freezing": False}.',
            )
        known = {f.name for f in dataclasses.fields(Settings)} - {"mode"}
        values = dict(options or {})
        for key, value in values.items():
            if key not in known:
                raise _unknown("option", key, sorted(known))
            if key in _FLAGS and not isinstance(value, bool):
                raise InputError(f"cannot use option {key}={value!r}", why="it is not True or False")
        align = values.get("align", 1)
        if isinstance(align, bool) or not isinstance(align, int) or align < 1:
            raise InputError(f"cannot use option align={align!r}", why="it is not a whole number, 1 or more")
        layout = values.get("layout")
        if layout is not None and layout not in ("dense", *LAYOUTS):
            raise _unknown("layout", layout, ("dense", *LAYOUTS))
        dtype = values.get("dtype")
        if dtype not in (None, "bfloat16", torch.bfloat16):
            raise InputError(
                f"cannot use option dtype={dtype!r}",
                why="products are of float32 numbers, or of bfloat16 ones",
                do='Leave it out, or give "bfloat16".',
            )
        values["dtype"] = None if dtype is None else "bfloat16"
        values["tune_for"] = _sizes(values.get("tune_for", ()))
        values.setdefault("measure", variable("FXPRUNE_MEASURE") != "0")
        return Settings(mode=mode, **values)

    def idle(self, *, trainable: bool) -> list[str]:
        """What was set and does nothing for a result of `transform` that is trainable, or is not."""
        names = ("mode", "dtype", "layout", "tune_for") if trainable else ("masked_matmul",)
        return [name for name in (*names, "constant_weights") if getattr(self, name) != getattr(Settings, name)]

    def inductor_options(self) -> dict[str, Any] | None:
        """Inductor's options, or None for eager. A mode of torch.compile is so many of these."""
        if not self.compile:
            return None
        options: dict[str, Any] = {}
        if self.mode not in (None, "default"):
            options.update(torch._inductor.list_mode_options(self.mode))  # pyright: ignore[reportAttributeAccessIssue]
        if self.freezing:
            options["freezing"] = True
        return options

    def words(self, options: Mapping[str, Any] | None) -> str:
        """How a graph with these of Inductor's options runs."""
        if options is None:
            return "eager graph" if self.compile else "eager graph (compile=False)"
        frozen = " with freezing" if options.get("freezing") else ""
        return f"torch.compile's Inductor{frozen}" + (f", mode {self.mode}" if self.mode else "")


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
        raise InputError(
            f"cannot tune for {value!r}",
            where='options["tune_for"]',
            why="it is a list of sizes of dim 0 of the inputs, each at least 1",
            do="For example [1, 8, 32].",
        )
    return sizes


def _unknown(kind: str, name: Any, known: Any) -> InputError:
    near = difflib.get_close_matches(str(name), list(known), 1)
    return InputError(
        f"unknown {kind} {name!r}",
        do=f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(map(str, known))}.",
    )
