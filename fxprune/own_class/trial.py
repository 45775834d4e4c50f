"""trial: a copy of the user's model run on the calls of a proof, and held against the oracle's answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from fxprune.capture import admit
from fxprune.check.compare import CheckRow
from fxprune.check.proof import Expected
from fxprune.graph.environment import words_of

from .follow import Outcome


def try_out(own: nn.Module, expected: Expected, *, everywhere: bool) -> Outcome:
    """Runs the copy in eval mode on calls of the example's sizes, or `everywhere`, and compares what it answers.

    The copy is in the modes and the state that it was in before, afterwards.
    """
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    hook = register_module_forward_hook(counted)
    try:
        with evaluating(own), admit.untouched(own), torch.no_grad():
            rows = _rows(own, expected, everywhere)
    except Exception as error:
        # What a class raises over sizes that it cannot follow may be anything.
        return Outcome(False, count, _path_of(own, error.__traceback__), words_of(error))
    finally:
        hook.remove()
    wrong = [row for row in rows if not row.ok]
    if not wrong:
        return Outcome(True, count)
    worst = max(wrong, key=lambda row: row.error)
    return Outcome(False, count, None, f"its outputs differ by {worst.off} on the {worst.call}", worst.error)


def _rows(own: nn.Module, expected: Expected, everywhere: bool) -> list[CheckRow]:
    rows = expected.result(own)
    if everywhere and all(row.ok for row in rows):
        rows = [*rows, *expected.at_other_sizes(own)]
    return rows


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of a model in eval mode, and in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _path_of(model: nn.Module, traceback: TracebackType | None) -> str | None:
    """The path of the innermost module of the model in whose code an error was raised."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = None
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        found = paths.get(id(owner), found)
        traceback = traceback.tb_next
    return found
