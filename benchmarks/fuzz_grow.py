"""A random sketch: inputs, some steps, and what is returned."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from benchmarks.fuzz_any import ANY
from benchmarks.fuzz_draft import FLOATS, MOST_ELEMENTS, Draft
from benchmarks.fuzz_maps import MAPS
from benchmarks.fuzz_parts import VOCABULARY
from benchmarks.fuzz_rows import SEQUENCES, VECTORS
from benchmarks.fuzz_sketch import FLAG, IMAGE, MASK, SCALE, SEQUENCE, SIGNAL, TOKENS, VECTOR, Sketch, Value

OWN: dict[str, tuple[Callable[[Draft, Value], Any], ...]] = {
    VECTOR: VECTORS,
    SEQUENCE: SEQUENCES,
    SIGNAL: MAPS,
    IMAGE: MAPS,
}
LATEST = 0.65  # How often a step goes on from the newest value.
OWN_SHARE = 0.6


def grow(rng: random.Random) -> Sketch:
    """A sketch of up to 15 steps whose outputs need them."""
    d = Draft(rng)
    _inputs(d)
    wanted = rng.choice((3, 4, 5, 6, 7, 8, 9, 10, 12, 14))
    tries = 0
    while len(d.steps) < wanted and tries < 200:
        tries += 1
        floats = [v for v in d.values if v.kind in FLOATS]
        x = floats[-1] if d.coin(LATEST) else rng.choice(floats)
        act = rng.choice(OWN[x.kind] if d.coin(OWN_SHARE) else ANY)
        before = len(d.steps)
        act(d, x)
        if len(d.steps) > before and math.prod(d.values[-1].shape) > MOST_ELEMENTS:
            d.steps.pop()
            d.values.pop()
    return _returned(d).needed()


def _inputs(d: Draft) -> None:
    """One or two tensors of any kind, and perhaps a mask, a flag or a number."""
    _tensor(d, "x", d.rng.choice((VECTOR, VECTOR, SEQUENCE, SEQUENCE, SEQUENCE, IMAGE, IMAGE, IMAGE, SIGNAL, TOKENS)))
    if d.coin(0.25):
        like = d.rng.choice(d.values)
        if d.coin(0.6):
            second = Value("y", like.kind, like.shape)
            d.inputs.append(second)
            d.values.append(second)
        else:
            _tensor(d, "y", d.rng.choice((VECTOR, SEQUENCE, IMAGE)))
    places = [v.shape[0] for v in d.inputs if v.kind in (SEQUENCE, TOKENS)]
    if places and d.coin(0.3):
        d.inputs.append(Value("mask", MASK, (d.rng.choice(places),)))
    if d.coin(0.1):
        d.inputs.append(Value("scale", SCALE, ()))
    if d.coin(0.05):
        d.inputs.append(Value("flag", FLAG, ()))
        x = next((v for v in d.values if v.kind in FLOATS), None)
        if x is not None:
            d.step("flag", f"{x.name}.tanh() if flag else {x.name}", x.kind, x.shape)


def _tensor(d: Draft, name: str, kind: str) -> None:
    c, t = d.width(), d.rng.choice((3, 4, 5, 6))
    side = d.rng.choice((4, 5, 6, 8))
    shapes = {
        VECTOR: (c,),
        SEQUENCE: (t, c),
        SIGNAL: (c, t + 2),
        IMAGE: (d.rng.choice((3, 4, c)), side, side),
        TOKENS: (t,),
    }
    value = Value(name, kind, shapes[kind])
    d.inputs.append(value)
    if kind == TOKENS:
        padding = ", padding_idx=0" if d.coin(0.2) else ""
        d.step("embedding", f"{d.member(f'nn.Embedding({VOCABULARY}, {c}{padding})')}({name})", SEQUENCE, (t, c))
    else:
        d.values.append(value)


def _returned(d: Draft) -> Sketch:
    """The newest value through a head or as it is; seldom several values, an input as it came, a shape of its own."""
    if d.coin(0.6):
        last = d.values[-1]
        OWN[last.kind][0](d, last)
    names = [d.values[-1].name]
    if d.coin(0.25):
        names += d.rng.sample([v.name for v in d.values[:-1]], min(len(d.values) - 1, d.rng.choice((1, 1, 2))))
    if d.coin(0.03):
        names.append(d.inputs[-1].name)
    names = list(dict.fromkeys(names))
    if d.coin(0.04):
        names.append(names[0])
    form = d.rng.choice(("plain", "plain", "plain", "tuple", "dict", "nested"))
    return Sketch(tuple(d.inputs), tuple(d.steps), tuple(names), form)
