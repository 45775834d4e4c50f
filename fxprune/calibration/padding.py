"""padding: which rows of an activation are the positions that an attention mask hides.

A shape cannot tell: rows [b * s, n] may come sample by sample or position by position, and those of a decoder are none
of the encoder's. So the program runs twice on one batch, the second time with other text where the mask hides it. The
rows that change are padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.graph.program import Program

from .batches import Batch

# A row has changed where random projections of it moved by more than this share of their size in all rows: far above
# rounding, far below what other text does.
_MOVED = 1e-3
_PROJECTIONS = 4
# The share of the text's rows that may change with what stands beside it, as under a convolution along the text.
_LEAKS = 0.1


class Padding(Enum):
    """How the rows of a tensor lie to a mask's positions [b, s].

    SAMPLES by samples, as the mask; TURNED by positions, as its transpose; WITHOUT no row is padding; UNKNOWN some are,
    and nobody knows which.
    """

    SAMPLES = "samples"
    TURNED = "turned"
    WITHOUT = "without"
    UNKNOWN = "unknown"


@torch.no_grad()
def find_padding(program: Program, batches: Iterable[Batch], nodes: Iterable[Node]) -> dict[str, Padding]:
    """How padding lies in each of these nodes, by name, from the batch whose mask tells most.

    Empty where no mask hides anything.
    """
    masked = [batch for batch in batches if batch.valid is not None and bool(batch.valid.any())]
    if not masked:
        return {}
    batch = next((batch for batch in masked if not _symmetric(batch.valid)), masked[0])
    valid, other, watched = batch.valid, _with_other_text(batch), set(nodes)
    assert valid is not None
    if other is None:
        return dict.fromkeys((node.name for node in watched), Padding.UNKNOWN)
    sides = []
    for flat in (batch.copied(), other):
        side = _Prints(program, watched, valid)
        side.run(*flat, enable_io_processing=False)
        sides.append(side.prints)
    return {name: _padding(before, sides[1][name], valid) for name, before in sides[0].items()}


def _symmetric(valid: Tensor | None) -> bool:
    return valid is None or torch.equal(valid.reshape(-1), valid.T.reshape(-1))


def _with_other_text(batch: Batch) -> list[Any] | None:
    """The inputs of a batch with text of other positions under the mask; None where no input is known to be text."""
    valid = batch.valid
    if valid is None or not batch.texts:
        return None
    flat = batch.copied()
    for place in batch.texts:
        text = flat[place][valid]
        hidden = int((~valid).sum())
        flat[place][~valid] = text[torch.arange(hidden, device=text.device) % len(text)]
    return flat


class _Prints(torch.fx.Interpreter):
    """Runs a program and keeps a few random projections of each row of some nodes' values."""

    def __init__(self, program: Program, watched: set[Node], valid: Tensor) -> None:
        super().__init__(program)
        self._watched, self._valid = watched, valid
        self.prints: dict[str, Tensor | None] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._watched and isinstance(value, Tensor):
            self.prints[n.name] = _prints(value, self._valid)
        return value


def _prints(x: Tensor, valid: Tensor) -> Tensor | None:
    """x [..., n] -> projections [rows, few] float64; a row is a position of the mask where the sizes allow it."""
    if x.dim() < 2 or not x.numel() or x.is_complex():
        return None
    lead = 2 if tuple(x.shape[:2]) in (tuple(valid.shape), tuple(valid.T.shape)) else x.dim() - 1
    rows = x.reshape(x.shape[:lead].numel(), -1).double()
    generator = torch.Generator().manual_seed(0)
    onto = torch.randn(rows.shape[1], _PROJECTIONS, generator=generator, dtype=torch.float64)
    return rows @ onto.to(rows.device)


def _padding(before: Tensor | None, after: Tensor | None, valid: Tensor) -> Padding:
    if before is None or after is None or before.shape != after.shape:
        return Padding.UNKNOWN
    size = before.nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt()
    moved = ~((before - after).abs() <= _MOVED * size).all(1) & ~(before.isnan() & after.isnan()).all(1)
    if not bool(moved.any()):
        return Padding.WITHOUT
    if len(moved) != valid.numel():
        return Padding.UNKNOWN
    leaks = {
        Padding.SAMPLES: float(moved[valid.reshape(-1)].float().mean()),
        Padding.TURNED: float(moved[valid.T.reshape(-1)].float().mean()),
    }
    best = min(leaks, key=lambda padding: leaks[padding])
    return best if leaks[best] <= _LEAKS else Padding.UNKNOWN


def counting(leading: Sequence[int], valid: Tensor | None, padding: Padding) -> Tensor | None:
    """The rows that count of a tensor whose rows have these `leading` sizes, bool of them; None where all do."""
    if valid is None or padding not in (Padding.SAMPLES, Padding.TURNED):
        return None
    turned = valid if padding is Padding.SAMPLES else valid.T
    if tuple(leading) == tuple(turned.shape):
        return turned
    return turned.reshape(-1) if tuple(leading) == (turned.numel(),) else None


def positions(x: Tensor, valid: Tensor | None, padding: Padding) -> Tensor:
    """x [..., n] -> [1, rows, n], without the rows that are padding, as far as these are known."""
    counts = counting(x.shape[:-1], valid, padding)
    return (x.reshape(-1, x.shape[-1]) if counts is None else x[counts]).unsqueeze(0)


def hides_padding(x: Tensor, valid: Tensor | None, padding: Padding) -> bool:
    """Whether rows of x [..., n] are padding that `positions` does not leave out."""
    return valid is not None and padding is not Padding.WITHOUT and counting(x.shape[:-1], valid, padding) is None
