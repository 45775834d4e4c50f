"""Recurrent ops: LSTM, GRU and plain RNN, stacked and bidirectional, and their single steps.

The rows of every weight are (gate, unit), and no gate may leave. All layers and directions share their units, for the
states of all of them are stacked in one tensor. A unit whose rows and biases are zero stays what its state decays to:
zero, if it began there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxprune.couple.axis import ONE, Axis, atoms, concat, divide

from .relation import Atoms, Dims, Here, relation

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_STEP = "steps run over it"


@dataclass(frozen=True)
class Cell:
    """The parameters of one layer in one direction; `projection` [p, h] makes the state of an LSTM's units."""

    w_ih: Dims
    w_hh: Dims
    biases: tuple[Dims, ...]
    projection: Dims | None = None

    def rows(self) -> list[Dims]:
        """The tensors whose first dimension is (gate, unit)."""
        return [self.w_ih, self.w_hh, *self.biases]


def _tie_cell(here: Here, cell: Cell, gates: Axis, x: Axis, unit: Axis, state: Axis) -> None:
    for rows in cell.rows():
        if gates.size == ONE:
            here.tie(rows[0], unit)
            continue
        gate, each = divide(rows[0], [gates.size, unit.root().size], here.name)
        here.tie(gate, gates)
        here.tie(each, unit)
    here.tie(cell.w_ih[1], x)
    here.tie(cell.w_hh[1], state)
    if cell.projection is not None:
        here.tie(cell.projection[0], state)
        here.tie(cell.projection[1], unit)
        here.writes(cell.projection, state)
    here.writes(cell.w_ih, unit)
    here.writes(cell.w_hh, unit)


def _zero_of_cells(here: Here, cells: Sequence[Cell], unit: Axis, state: Axis, hx: Any) -> Atoms:
    """Where units and states are zero after every step; freezes what a step would sum where it is not.

    A unit decays from its state in `hx`, that of a cell where there are two; of a plain RNN nothing is left of it.
    """
    units = set(atoms(unit)).intersection(*(rows.zero for cell in cells for rows in cell.rows()))
    if not here.op.startswith("rnn"):
        units &= (hx[1] if isinstance(hx, list) else hx).zero
    states = units
    projections = [cell.projection for cell in cells if cell.projection is not None]
    if projections:
        states = set(atoms(state)).intersection(*(projection.zero for projection in projections))
        for projection in projections:
            here.sums(unit, projection.zero | units)
    for cell in cells:
        here.sums(state, cell.w_hh.zero)
    return units | states


def _gates(here: Here) -> Axis:
    gates = Axis(_GATES[here.op.removesuffix("_cell")])
    here.freeze(gates, "a gate of every unit")
    return gates


def _cells(params: list[Dims], has_biases: bool, count: int) -> list[Cell]:
    """The parameters as torch lists them: for each layer and direction w_ih, w_hh, b_ih, b_hh, w_hr."""
    each = len(params) // count
    rows = [params[i : i + each] for i in range(0, len(params), each)]
    biases = 2 if has_biases else 0
    return [Cell(r[0], r[1], tuple(r[2 : 2 + biases]), r[2 + biases] if len(r) > 2 + biases else None) for r in rows]


def _zero_of_layers(
    here: Here,
    out: list[Dims],
    input: Dims | None = None,
    hx: Any = None,
    params: Any = None,
    has_biases: bool = True,
    num_layers: int = 1,
    bidirectional: bool = False,
    **_: Any,
) -> Atoms:
    if input is None or len(input) != 3:
        return set()
    directions = 2 if bidirectional else 1
    cells = _cells(params, has_biases, num_layers * directions)
    for cell in cells[:directions]:
        here.sums(input[-1], input.zero | cell.w_ih.zero)
    zero = _zero_of_cells(here, cells, out[-1][-1], out[1][-1], hx)
    for cell in cells[directions:]:
        here.sums(out[1][-1], zero | cell.w_ih.zero)
    return zero


@relation("lstm", "gru", "rnn_tanh", "rnn_relu", zero=_zero_of_layers)
def layers(
    here: Here,
    out: list[Dims],
    input: Dims | None = None,
    hx: Any = None,
    params: Any = None,
    has_biases: bool = True,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    **a: Any,
) -> None:
    """. b x, . b h, (gates h) x, (gates h) h, (gates h)? -> . b (h + h), . b h"""
    if input is None or len(input) != 3:
        # a packed sequence, whose batches are data
        values = [input, *a.values(), *(hx if isinstance(hx, list) else [hx]), *(params or [])]
        here.freeze_all([*out, *(v for v in values if isinstance(v, Dims))], "a packed sequence")
        return
    directions = 2 if bidirectional else 1
    batch, step = (0, 1) if batch_first else (1, 0)
    # The last output holds the units of an LSTM, and otherwise the states, which are the units.
    state, unit = out[1][-1], out[-1][-1]
    for value in (input, out[0]):
        here.tie(value[batch], out[1][1])
        here.freeze(value[step], _STEP)
    for before, after in zip(hx if isinstance(hx, list) else [hx], out[1:]):
        here.tie(before[1], after[1])
        here.tie(before[2], after[2])
        here.freeze_each((before[0], after[0]), "one state of every layer and direction")
        here.tie(after[1], out[1][1])
    x = input[-1]
    cells = _cells(params, has_biases, num_layers * directions)
    gates = _gates(here)
    if cells[0].projection is None:
        here.tie(state, unit)
    else:
        # Were there as many units as projected states, torch would look for no projection.
        here.freeze(unit, "units that are projected")
    for i, cell in enumerate(cells):
        _tie_cell(here, cell, gates, x if i < directions else concat([state] * directions), unit, state)
    here.tie(out[0][-1], concat([state] * directions))


def _cell(a: dict[str, Any]) -> Cell:
    return Cell(a["w_ih"], a["w_hh"], tuple(b for b in (a.get("b_ih"), a.get("b_hh")) if b is not None))


def _zero_of_step(here: Here, out: Any, input: Dims, hx: Any, **a: Any) -> Atoms:
    cell, last = _cell(a), out[-1] if isinstance(out, list) else out
    here.sums(input[-1], input.zero | cell.w_ih.zero)
    return _zero_of_cells(here, [cell], last[-1], last[-1], hx)


@relation("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", zero=_zero_of_step)
def step(here: Here, out: Any, input: Dims, hx: Any, **a: Any) -> None:
    """* x, * h, (gates h) x, (gates h) h, (gates h)? -> * h"""
    outs = out if isinstance(out, list) else [out]
    for value in (*outs, *(hx if isinstance(hx, list) else [hx])):
        here.tie(value[-1], outs[0][-1])
        here.tie_rows(value.axes[:-1], input.axes[:-1])
    unit = outs[0][-1]
    _tie_cell(here, _cell(a), _gates(here), input[-1], unit, unit)
