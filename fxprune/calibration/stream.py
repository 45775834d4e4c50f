"""stream: the dense and the partly pruned program side by side, segment by segment, over all batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.check.oracle import Oracle
from fxprune.couple.removal import Removal
from fxprune.graph.ops import widened
from fxprune.graph.program import Program
from fxprune.select.selection import Selection

from .batches import Batch
from .finite import is_finite, refuse_activations
from .layer import Branch, Layer, is_routed, is_sum, other_operand
from .moments import Inputs, Outputs
from .padding import Padding, hides_padding, positions
from .segments import Segment
from .spill import Shelf
from .unfold import Windows, windows_of

Env = dict[Node, Any]


class Side:
    """One of the two programs: runs nodes by their values, with new values in place of the model's own."""

    def __init__(self, program: Program, values: Mapping[str, Tensor], removal: Removal | None = None) -> None:
        self._values = dict(values)
        self._run = Oracle(program, Selection(values=self._values), removal)

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Puts new values in place."""
        self._values.update(values)

    def run(self, nodes: Sequence[Node], env: Env) -> None:
        """Runs nodes in order; `env` gains their values, and parameters that they read."""
        self._run.env = env
        for node in nodes:
            for read in node.all_input_nodes:
                self.value(read, env)
            env[node] = self._run.run_node(node)

    def value(self, node: Node, env: Env) -> Any:
        """What a node has in `env`, which gains it for a parameter."""
        if node.op == "get_attr" and node not in env:
            self._run.env = env
            env[node] = self._run.run_node(node)
        return env[node]


class Fitted:
    """What one layer saw: inputs (shared by the layers that read the same) and wanted outputs.

    `routed` says that values decide which rows come to the layer. The two programs may decide otherwise, so both its
    inputs and its outputs are then the dense one's. `padded` says that padding among its rows could not be told apart.
    """

    def __init__(self, layer: Layer, inputs: Inputs, windows: Windows | None, padding: Padding) -> None:
        self.layer, self.inputs, self.windows, self.padding = layer, inputs, windows, padding
        self.outputs = Outputs()
        self.routed = is_routed(layer.x)
        self.padded = False


Solve = Callable[[Sequence[Fitted]], Mapping[str, Tensor]]


@torch.no_grad()
def stream(
    program: Program,
    segments: Sequence[Segment],
    batches: Sequence[Batch],
    solve: Solve,
    *,
    values: Mapping[str, Tensor] | None = None,
    removal: Removal | None = None,
    paddings: Mapping[str, Padding] | None = None,
    solved: Callable[[Segment], Mapping[str, Tensor] | None] = lambda _: None,
    limit: float,
    step: Callable[[], object] = lambda: None,
) -> int:
    """Runs every segment over all batches; after each, `solve` answers with new values for the pruned side.

    `solved` may answer them beforehand, and the segment then only runs. `paddings` says of the nodes that weights read
    how padding lies in them. `limit` is how many bytes of activations stay in memory. Answers the largest number of
    bytes that were remembered between two segments. Raises InputError where activations are not finite.
    """
    sides = Side(program, {}), Side(program, values or {}, removal)
    placeholders = program.graph.find_nodes(op="placeholder")
    by_name = {node.name: node for node in program.graph.nodes}
    shelf = Shelf(limit)
    with contextlib.closing(shelf):
        before: Sequence[Layer] = ()
        for index, segment in enumerate(segments):
            known = solved(segment)
            fitted = _fitted(segment, program, paddings or {})
            for number, batch in enumerate(batches):
                if index:
                    held = shelf.take(number)
                    dense, pruned = ({by_name[k]: v for k, v in held[side].items()} for side in ("dense", "pruned"))
                else:
                    dense, pruned = (dict(zip(placeholders, batch.copied(), strict=True)) for _ in sides)
                sides[1].run([layer.node for layer in before], pruned)
                sides[1].run(segment.nodes, pruned)
                sides[0].run(segment.nodes, dense)
                sides[0].run([layer.node for layer in segment.layers], dense)
                if known is None:
                    _sum_up(fitted, dense, pruned, batch, sides)
                shelf.put(
                    number,
                    {
                        "dense": {n.name: dense[n] for n in segment.dense if n in dense},
                        "pruned": {n.name: pruned[n] for n in segment.pruned if n in pruned},
                    },
                )
                del dense, pruned
                step()
            sides[1].set(known if known is not None else solve(fitted))
            before = segment.layers
        return shelf.largest


def _fitted(segment: Segment, program: Program, paddings: Mapping[str, Padding]) -> list[Fitted]:
    """One entry a layer; layers that read one input in one way share their sums over it."""
    shared: dict[Any, Inputs] = {}
    found = []
    for layer in segment.layers:
        windows = None
        if layer.kind == "conv":
            shape = program.get_parameter(layer.name).shape
            windows = windows_of(layer.node.target, layer.node.args, dict(layer.node.kwargs), shape)
        key = (layer.x, windows, layer.shift is not None)
        if key not in shared:
            shared[key] = Inputs(centred=layer.shift is not None)
        found.append(Fitted(layer, shared[key], windows, paddings.get(layer.x.name, Padding.UNKNOWN)))
    return found


def _sum_up(fitted: Sequence[Fitted], dense: Env, pruned: Env, batch: Batch, sides: tuple[Side, Side]) -> None:
    rows: dict[int, Tensor] = {}
    for entry in fitted:
        layer = entry.layer
        wanted = dense[layer.node]
        if not entry.routed:
            wanted = wanted + _correction(layer, dense, pruned, sides[0])
        if layer.bias is not None and layer.shift is None:
            wanted = wanted - _bias(entry, dense)
        given = positions(wanted, batch.valid, entry.padding) if entry.windows is None else entry.windows.out(wanted)
        if not is_finite(given):
            own = dense[layer.node]
            if is_finite(positions(own, batch.valid, entry.padding) if entry.windows is None else own):
                raise refuse_activations(layer.name, layer.node, "pruned", batch, wanted)
            raise refuse_activations(layer.name, layer.node, "dense", batch, own)
        x = sides[0].value(layer.x, dense) if entry.routed else sides[1].value(layer.x, pruned)
        if entry.windows is None:
            entry.padded |= hides_padding(x, batch.valid, entry.padding)
        else:
            entry.padded |= batch.valid is not None and entry.padding is not Padding.WITHOUT
        if id(entry.inputs) not in rows:
            read = positions(x, batch.valid, entry.padding) if entry.windows is None else entry.windows.rows(x)
            if not is_finite(read if entry.windows is None else x):
                raise refuse_activations(layer.name, layer.node, "pruned", batch, x)
            rows[id(entry.inputs)] = entry.inputs.add(read)
        entry.outputs.add(given, rows[id(entry.inputs)], entry.inputs)


def _bias(entry: Fitted, dense: Env) -> Tensor:
    assert entry.layer.bias is not None
    bias = dense[entry.layer.bias]
    return bias if entry.windows is None else bias.reshape(-1, *[1] * len(entry.windows.kernel))


def _correction(layer: Layer, dense: Env, pruned: Env, side: Side) -> Tensor | float:
    """What the output must gain so that the last sum on its way comes out as the dense one, [as the output].

    The way only moves elements, scales them by constants and adds to them, so its inverse is its transpose over the
    squares of the scales.
    """
    branch = layer.branch
    if branch is None:
        return 0.0
    if len(branch.way) == 1:
        (other,) = branch.others.values()
        return dense[other] - pruned[other]
    with torch.enable_grad():
        start = dense[layer.node].detach().clone().requires_grad_()
        end = _follow(branch, layer.node, start, dense, dense, side)
    missing = end.detach() - _follow(branch, layer.node, start.detach(), dense, pruned, side)
    (back,) = torch.autograd.grad(end, start, missing, retain_graph=True)
    (scale,) = torch.autograd.grad(end, start, torch.ones_like(end))
    squares = widened(scale).square()
    return torch.where(squares > 1e-8 * squares.max(), widened(back) / squares, 0.0)


def _follow(branch: Branch, node: Node, start: Tensor, dense: Env, others: Env, side: Side) -> Tensor:
    """The last sum on the way of a node's output, `start` at its beginning; what sums add comes from `others`."""
    scratch: Env = {known: value for known, value in dense.items() if known not in branch.way}
    scratch[node] = start

    def value(of: Node) -> Any:
        if of not in scratch:
            for read in of.all_input_nodes:
                value(read)
            side.run([of], scratch)
        return scratch[of]

    at = node
    for step in branch.way:
        if is_sum(step):
            # Not as it stands: a sum in place would write to what it adds to.
            other = other_operand(step, at)
            added = others[other] if step in branch.others else value(other) if isinstance(other, Node) else other
            scratch[step] = scratch[at] + added
        else:
            value(step)
        at = step
    return scratch[at]
