"""measure_inputs: one run of the dense model, for what must be known before anything is fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.graph.program import Program
from fxprune.graph.weights import Use

from .batches import Batch
from .finite import is_finite, refuse_activations
from .moments import Inputs
from .padding import Padding, positions
from .unfold import Windows, windows_of_use


class Watched:
    """One weight, by all its uses: the inputs that it is multiplied with, in full or their squares alone."""

    def __init__(self, *, gram: bool) -> None:
        self.inputs = Inputs(centred=False) if gram else None
        self.squares: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Sums up rows [g, rows, n]."""
        self.count += rows.shape[1]
        squares = rows.double().square().sum(1)
        self.squares = squares if self.squares is None else self.squares + squares
        if self.inputs is not None:
            self.inputs.add(rows)

    @property
    def norms(self) -> Tensor:
        """The root mean square of each input [g, n], float64."""
        assert self.squares is not None
        return (self.squares / max(1, self.count)).sqrt()


@torch.no_grad()
def measure_inputs(
    program: Program,
    uses: Mapping[str, Sequence[Use]],
    full: set[str],
    batches: Sequence[Batch],
    paddings: Mapping[str, Padding],
) -> dict[str, Watched]:
    """The inputs of weights by name, each with its uses (linear or convolution); of those in `full` the Gram matrix.

    `paddings` says of the nodes that they read how padding lies in them. Raises InputError where activations are not
    finite.
    """
    found = {name: Watched(gram=name in full) for name in uses}
    watched: dict[Node, list[_Watch]] = {}
    for name, places in uses.items():
        for use in places:
            windows = windows_of_use(program, name, use) if use.kind == "conv" else None
            watched.setdefault(use.node, []).append((name, found[name], use.x, windows))
    for batch in batches:
        _Watching(program, watched, batch, paddings).run(*batch.copied(), enable_io_processing=False)
    return found


# the weight, what to sum up, the node that holds the inputs, and how a convolution reads them
_Watch = tuple[str, Watched, Node, Windows | None]


class _Watching(torch.fx.Interpreter):
    def __init__(
        self, program: Program, watched: Mapping[Node, list[_Watch]], batch: Batch, paddings: Mapping[str, Padding]
    ) -> None:
        super().__init__(program)
        self._watched, self._batch, self._paddings = watched, batch, paddings

    def run_node(self, n: Node) -> Any:
        for name, entry, source, windows in self._watched.get(n, ()):
            x = self.env[source]
            padding = self._paddings.get(source.name, Padding.UNKNOWN)
            rows = positions(x, self._batch.valid, padding) if windows is None else windows.rows(x)
            if not is_finite(rows if windows is None else x):
                raise refuse_activations(name, n, "dense", self._batch, x)
            entry.add(rows)
        return super().run_node(n)
