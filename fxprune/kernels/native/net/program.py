"""program: a net as the integers that the op takes."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

from fxprune.errors import InputError

from .steps import (
    FORMS,
    POOLS,
    Activate,
    Add,
    Attention,
    Concat,
    Conv,
    Depthwise,
    Enter,
    Exit,
    LayerNorm,
    Mean,
    Multiply,
    Pool,
    Product,
    Repeat,
    Shuffle,
    Step,
)
from .taps import Finish, Taps, bits_of, float_of

VERSION = 2


def _arguments(step: Step) -> list[int]:
    match step:
        case Enter():
            return [step.input]
        case Conv():
            where = [step.row_block, step.k_block, step.first_value, step.values, step.first_segment, step.first_start]
            finish = [*step.finish.integers(), int(step.finish.adds_last)]
            return [step.x, step.residual, step.rows, step.channels, *step.taps.integers(), *where, step.bias, *finish]
        case Product():
            where = [step.first_value, step.values, step.first_word, step.first_start, step.bias]
            finish = [*step.finish.integers(), int(step.finish.adds_last)]
            return [step.x, step.residual, step.rows, step.channels, *where, *finish]
        case Depthwise():
            finish = [*step.finish.integers(), int(step.finish.adds_last)]
            return [step.x, step.residual, step.channels, *step.taps.integers(), step.weight, step.bias, *finish]
        case Pool():
            return [POOLS.index(step.kind), step.x, *step.taps.integers()]
        case Add() | Multiply():
            return [step.x, step.other, *step.finish.integers()]
        case Activate():
            return [step.x, *step.finish.integers()]
        case Concat():
            return list(step.parts)
        case Mean():
            return [step.x]
        case Exit():
            return [step.x, FORMS.index(step.form)]
        case Repeat():
            return [step.x, *step.times]
        case Shuffle():
            return [step.x, *step.times, *step.cut]
        case LayerNorm():
            return [step.x, step.weight, step.bias, bits_of(step.epsilon)]
        case Attention():
            first = [step.first_q, step.first_k, step.first_v]
            how = [step.mask, int(step.causal), int(step.rounds), bits_of(step.scale)]
            return [step.q, step.k, step.v, *first, step.heads, step.size, step.v_size, *how]


def encode(steps: Sequence[Step], *, large: int = -1, near: int = -1) -> list[int]:
    """The program of these steps.

    Steps between which maps of `large` bytes and more pass are run depth first, as long as their rows and weights fit
    into `near` bytes; -1 is what the machine's caches ask for.
    """
    program = [VERSION, large, near, len(steps)]
    for step in steps:
        arguments = _arguments(step)
        program += [step.code, step.tile, len(arguments), *arguments]
    return program


def decode(program: Sequence[int]) -> list[Step]:
    """The steps of a program. Raises InputError where it is none."""
    steps: list[Step] = []
    try:
        version, _, _, count, *rest = program
        if version != VERSION:
            raise ValueError(f"version {version}")
        numbers = iter(rest)
        for _ in range(count):
            code, tile, many = itertools.islice(numbers, 3)
            arguments = list(itertools.islice(numbers, many))
            if len(arguments) < many:
                raise ValueError("it ends too early")
            steps.append(_step(code, tile, arguments))
        if next(numbers, None) is not None:
            raise ValueError("it goes on after its last step")
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise InputError("net got a program that it cannot read", why=str(error)) from error
    return steps


def _step(code: int, tile: int, a: list[int]) -> Step:
    match code:
        case Enter.code:
            (source,) = a
            return Enter(source, tile)
        case Conv.code:
            taps, where, finish = Taps.of(a[4:14]), a[14:21], Finish.of(a[21:24], adds_last=a[24])
            row_block, k_block, value, values, segment, start, bias = where
            blocks = (row_block, k_block, a[1], value, values, segment, start, bias)
            return Conv(a[0], a[2], a[3], taps, *blocks, finish, tile)
        case Product.code:
            x, residual, rows, channels, value, values, word, start, bias, *finish = a
            where = (residual, value, values, word, start, bias)
            return Product(x, rows, channels, *where, Finish.of(finish[:3], adds_last=finish[3]), tile)
        case Depthwise.code:
            finish = Finish.of(a[15:18], adds_last=a[18])
            return Depthwise(a[0], a[2], Taps.of(a[3:13]), a[1], a[13], a[14], finish, tile)
        case Pool.code:
            return Pool(POOLS[a[0]], a[1], Taps.of(a[2:]), tile)
        case Add.code:
            return Add(a[0], a[1], Finish.of(a[2:]), tile)
        case Multiply.code:
            return Multiply(a[0], a[1], Finish.of(a[2:]), tile)
        case Activate.code:
            return Activate(a[0], Finish.of(a[1:]), tile)
        case Concat.code:
            return Concat(tuple(a), tile)
        case Mean.code:
            (x,) = a
            return Mean(x, tile)
        case Exit.code:
            x, form = a
            return Exit(x, FORMS[form], tile)
        case Repeat.code:
            x, down, right = a
            return Repeat(x, (down, right), tile)
        case Shuffle.code:
            x, down, right, *cut = a
            return Shuffle(x, (down, right), (cut[0], cut[1]), tile)
        case LayerNorm.code:
            x, weight, bias, epsilon = a
            return LayerNorm(x, weight, bias, float_of(epsilon), tile)
        case Attention.code:
            q, k, v, first_q, first_k, first_v, heads, size, v_size, mask, causal, rounds, scale = a
            sizes = (heads, size, v_size, first_q, first_k, first_v)
            return Attention(q, k, v, *sizes, mask, bool(causal), bool(rounds), float_of(scale), tile)
    raise ValueError(f"there is no step {code}")
