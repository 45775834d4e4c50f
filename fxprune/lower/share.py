"""share: weights whose linears read the same activations are stored as one, so that one call computes all of them.

Attention's q, k and v: the activations are rearranged once for all, and the threads are woken once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxprune.graph.program import Program, fetch
from fxprune.graph.weights import Use

from .layouts import LAYOUTS
from .layouts.site import Packed, Site


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A weight that goes into a layout: its uses, what the layout is tuned for, the activation that all uses have."""

    name: str
    uses: list[Use]
    tokens: tuple[int, ...]
    activation: str
    packed: Packed


def groups(program: Program, chosen: list[Chosen]) -> list[list[Chosen]]:
    """The weights apart by the call that computes them, the members of a call in the order of their linears."""
    since = moments(program.graph)
    places = {node: place for place, node in enumerate(program.graph.nodes)}
    found: dict[Hashable, list[Chosen]] = {}
    for weight in chosen:
        found.setdefault(_call(weight, since), []).append(weight)
    return [sorted(group, key=lambda weight: places[weight.uses[0].node]) for group in found.values()]


def _call(weight: Chosen, since: dict[Node, int]) -> Hashable:
    """What weights must agree on to share a call; the weight's own name if it shares none."""
    linear = weight.uses[0]
    bias = linear.bias
    if len(weight.uses) > 1 or (bias is not None and bias.op != "get_attr"):
        return weight.name
    return weight.packed.layout, linear.x, since[linear.node], weight.activation, bias is None


def moments(graph: Graph) -> dict[Node, int]:
    """How many ops up to each node write to a tensor: only within one moment does a tensor surely keep its value."""
    result: dict[Node, int] = {}
    moment = 0
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            moment += 1
        result[node] = moment
    return result


def merge(program: Program, group: list[Chosen]) -> tuple[Packed, Tensor | None, list[int]]:
    """The weights of a group packed as one, their biases as one, and the bytes that each weight has a part in.

    The bytes are divided by the numbers of nonzeros, and add up to what is stored.
    """
    first = group[0]
    weights = [fetch(program, w.name).t() if w.uses[0].transposed else fetch(program, w.name) for w in group]
    biases = [fetch(program, str(w.uses[0].bias.target)) for w in group if w.uses[0].bias is not None]
    bias = torch.cat(biases) if biases else None
    node = first.uses[0].node.name
    site = Site(first.name, node, torch.cat(weights), bias, first.tokens, first.activation)
    packed = LAYOUTS[first.packed.layout].pack(site)
    nonzeros = torch.tensor([0, *(max(1, int(torch.count_nonzero(w))) for w in weights)]).cumsum(0)
    ends = [packed.bytes() * int(n) // int(nonzeros[-1]) for n in nonzeros]
    return packed, bias, [high - low for low, high in itertools.pairwise(ends)]
