"""readers: where a graph sums over an axis, and what each of these sums sees of its indices.

Everything else that carries an axis computes each index from the same one, so that only sums tell whether an index may
leave without a trace: a product with a weight that is zero there does not read it, and one that reads what is the same
for every input can have a constant instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.couple.axis import Axis, atoms
from fxprune.couple.coupling import Ruled
from fxprune.couple.rules import Dims, packet_name
from fxprune.graph.ops import HALF
from fxprune.graph.program import arguments, node_of

from .known import ROUNDING, Known, even_along_symbols, is_even
from .products import CONVS, OPERANDS, pads, product, sizes_show
from .recurrent import RECURRENT, sums_of_units


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """One sum over `axis` [i] at a node; `out` [o] is the axis that its weight makes, if there is one.

    reads  bool [o, i] (or [1, i] where outputs do not differ): whether output o reads index i
    known  bool [i]: what comes in there is the same for every input, and a constant can stand in for it
    zero   bool [i]: what comes in there is zero
    why    in words: what an index that is read and not known runs into
    level  [i]: where a convolution that pads reads one number at all places, that number, and NaN elsewhere; None for
           other sums. Such a constant can be read from another channel that has one.
    is_fixed  whether the places where it is padded are the same for every call
    """

    node: Node
    axis: Axis
    summed: frozenset[Axis]
    out: Axis | None
    reads: Tensor
    known: Tensor
    zero: Tensor
    why: str
    level: Tensor | None = None
    is_fixed: bool = True


def readers(node: Node, call: Ruled, get: Callable[[Any], Any], own: Collection[str] = ()) -> list[Reader]:
    """The sums of one op over axes that could shrink; `get` says what is known of its arguments.

    `own` names the weights that one op alone reads, which may be changed for it.
    """
    summed = frozenset(atom for axis in call.summed for atom in atoms(axis) if not atom.frozen and not atom.mixed)
    if not summed:
        return []
    op = packet_name(node.target)
    states = {name: get(value) for name, value in arguments(node).items()}
    if op in OPERANDS:
        return [_of_product(node, op, call, summed, states, own)]
    if op == "scaled_dot_product_attention":
        query, key = call.arguments["query"], call.arguments["key"]
        zero = _zero_along(states["query"], -1, query) | _zero_along(states["key"], -1, key)
        return [_plain(node, query[-1], summed, zero, "the scores of attention, where it is not zero")]
    if op in ("sum", "mean", "norm", "linalg_vector_norm"):
        dims = call.arguments["self"]
        found = [d for d, axis in enumerate(dims.axes) if summed.intersection(atoms(axis))]
        why = f"{op}, where it is not zero"
        return [_plain(node, dims[d], summed, _zero_along(states["self"], d, dims), why) for d in found]
    if op in RECURRENT and (sums := sums_of_units(node, call.arguments, states, _zero_along)) is not None:
        why = f"{op}, where it is not zero ({node.name})"
        return [Reader(node, s.axis, summed, None, s.reads[None], s.zero, s.zero, why) for s in sums]
    if op == "einsum":
        return _of_einsum(node, call, summed, states)
    why = f"{op}, which is not followed"
    nowhere = [torch.zeros(axis.root().size.number, dtype=torch.bool) for axis in call.summed]
    return [_plain(node, axis, summed, zero, why) for axis, zero in zip(call.summed, nowhere)]


def _of_einsum(node: Node, call: Ruled, summed: frozenset[Axis], states: Mapping[str, Any]) -> list[Reader]:
    """Sums of products over letters: an index leaves where one factor is zero."""
    found, operands = [], call.arguments["tensors"]
    for axis in call.summed:
        zero = torch.zeros(axis.root().size.number, dtype=torch.bool)
        for state, dims in zip(states["tensors"], operands):
            for dim in [d for d, own in enumerate(dims.axes) if own.root() is axis.root()]:
                zero = zero | _zero_along(state, dim, dims)
        found.append(_plain(node, axis, summed, zero, "einsum, where no factor is zero"))
    return found


def _of_product(
    node: Node, op: str, call: Ruled, summed: frozenset[Axis], states: Mapping[str, Any], own: Collection[str]
) -> Reader:
    x_name, w_name, _ = OPERANDS[op]
    left, right = states[x_name], states[w_name]
    x_dims, w_dims = call.arguments[x_name], call.arguments[w_name]
    assert isinstance(call.out, Dims)
    if op in CONVS and len(x_dims) != len(w_dims):
        channels, nothing = x_dims[0], torch.zeros(x_dims[0].root().size.number, dtype=torch.bool)
        return _plain(node, channels, summed, nothing, "a convolution without a batch, which is not followed")
    if op in CONVS:
        known, zero = _known_along(left, 1, x_dims, node_of(node, x_name)), _zero_along(left, 1, x_dims)
        if not isinstance(right, Known) or not right.is_whole:
            return _plain(node, x_dims[1], summed, zero, "a convolution with a kernel that is computed")
        why = f"{_named(node, w_name)} reads it, and it is not known to be the same for every input"
        level = _levels(node, op, left, states) if _named(node, w_name) in own else None
        is_fixed = not sizes_show(node, op, states)
        if not is_fixed:
            known = zero if level is None else zero | ~level.isnan()
            why = f"{_named(node, w_name)} reads it and pads, over a size that is not fixed"
        reads = _kernel_reads(op, right, states)
        return Reader(node, x_dims[1], summed, call.out[1], reads, known, zero, why, level, is_fixed)
    if isinstance(right, Known) and right.is_whole:
        x, dims, at, weight, x_node = left, x_dims, -1, right, node_of(node, x_name)
        table = weight.zero if op == "linear" else weight.zero.transpose(-1, -2) if len(w_dims) > 1 else weight.zero
        out = call.out[-1] if len(w_dims) > 1 and len(call.out) else None
    elif isinstance(left, Known) and left.is_whole and op != "linear":
        x, dims, at, weight, x_node = right, w_dims, -2 if len(w_dims) > 1 else -1, left, node_of(node, w_name)
        table = weight.zero
        out = call.out[-2 if len(w_dims) > 1 else -1] if len(x_dims) > 1 and len(call.out) else None
    else:
        other = -1 if op == "linear" or len(w_dims) == 1 else -2
        zero = _zero_along(left, -1, x_dims) | _zero_along(right, other, w_dims)
        return _plain(node, x_dims[-1], summed, zero, "a product of activations, where it is not zero")
    reads = ~table.reshape(-1, *table.shape[-2:]).all(0) if table.dim() > 1 else ~table.unsqueeze(0)
    if out is not None and out.root().size.symbols:
        out, reads = None, reads.any(0, keepdim=True)
    known, zero = _known_along(x, at, dims, x_node), _zero_along(x, at, dims)
    by = _named(node, w_name if x is left else x_name)
    why = f"{by} reads it, and it is not known to be the same for every input"
    return Reader(node, dims[at], summed, out, reads.cpu(), known, zero, why)


def _levels(node: Node, op: str, state: Any, states: Mapping[str, Any]) -> Tensor | None:
    """[i]: the number that stands in all of a channel, or NaN; None where the convolution pads none, or has groups."""
    if not isinstance(state, Known) or states.get("groups", 1) != 1:
        return None
    if not (pads(states) or op.startswith("conv_transpose")):
        return None
    values, sure = (t.movedim(1, 0).flatten(1) for t in (state.value, state.sure))
    even = sure.all(1) & is_even(values, 1)
    return torch.where(even, values[:, 0], float("nan")).cpu()


def _named(node: Node, argument: str) -> str:
    """The weight of a product by its name, where it is a parameter."""
    found = node_of(node, argument)
    return str(found.target) if found.op == "get_attr" else node.name


def _plain(node: Node, axis: Axis, summed: frozenset[Axis], zero: Tensor, why: str) -> Reader:
    """A sum that only zeros may leave."""
    reads = torch.ones(1, axis.root().size.number, dtype=torch.bool)
    return Reader(node, axis, summed, None, reads, zero, zero, f"{why} ({node.name})")


def _kernel_reads(op: str, weight: Known, states: Mapping[str, Any]) -> Tensor:
    """[o, i]: whether any tap of the kernel from input i to output o is not zero."""
    groups = int(states.get("groups", 1))
    taps = ~weight.zero.flatten(2).all(2)
    # a plain kernel is [(g o), i], a transposed one [(g i), o]
    blocks = [t.T if op.startswith("conv_transpose") else t for t in taps.chunk(groups)]
    return torch.block_diag(*blocks).bool().cpu() if groups > 1 else blocks[0].cpu()


def _zero_along(state: Any, dim: int, dims: Dims) -> Tensor:
    size = dims[dim].root().size.number
    if not isinstance(state, Known) or dims[dim].root().size.symbols:
        return torch.zeros(size, dtype=torch.bool)
    return _all_but(state.zero, dim).cpu()


def _known_along(state: Any, dim: int, dims: Dims, node: Node) -> Tensor:
    """Where a tensor is known at all positions, and the same along every dimension of symbolic size."""
    if not isinstance(state, Known) or dims[dim].root().size.symbols:
        return torch.zeros(dims[dim].root().size.number, dtype=torch.bool)
    return _all_but(even_along_symbols(state, node).sure, dim).cpu()


def _all_but(flags: Tensor, dim: int) -> Tensor:
    """[i]: whether all flags at an index of `dim` are set."""
    return flags.movedim(dim, 0).flatten(1).all(1) if flags.dim() > 1 else flags.clone()


def constant(node: Node, reader: Reader, gone: Tensor, get: Callable[[Any], Any]) -> Tensor | None:
    """What the indices in `gone` (bool [i]) add to a product's output: in its shape, dimensions of one value as 1."""
    op = packet_name(node.target)
    states = {name: get(value) for name, value in arguments(node).items()}
    x_name, w_name, _ = OPERANDS[op]
    swapped = op not in CONVS and not (isinstance(states[w_name], Known) and states[w_name].is_whole)
    name = w_name if swapped else x_name
    x = states[name]
    if not isinstance(x, Known):
        # Of what leaves nothing is known: it is read by outputs alone that nobody reads, and that a width keeps.
        return None
    dim = 1 if op in CONVS else -1 if not swapped else max(-2, -x.value.dim())
    shape = [1] * x.value.dim()
    shape[dim] = -1
    wanted = gone.to(x.value.device).reshape(shape)
    value = torch.where(x.sure & wanted, x.value, torch.zeros_like(x.value))
    if not bool(value.any()):
        return None
    if op in CONVS and bool((value == value[:1]).all()):
        value = value[:1]
    found = product(node, op, {**states, name: Known.all(value)}, bias=False)
    assert found is not None
    out = 1 if op in CONVS else found.value.dim() - 1 if not swapped else max(found.value.dim() - 2, 0)
    # Terms of a sum that cancel leave their rounding behind.
    other = x_name if swapped else w_name
    sizes = {name: Known.all(value.abs()), other: Known(states[other].value.abs(), states[other].sure)}
    terms = product(node, op, {**states, **sizes}, bias=False)
    return _compact(found.value, out, found.value if terms is None else terms.value)


def _compact(tensor: Tensor, out: int, terms: Tensor) -> Tensor:
    """The tensor with one index along each dimension but `out` that does not matter, up to the rounding of a sum.

    `terms` are the sums of its terms' magnitudes, in its shape.
    """
    others = [dim for dim in range(tensor.dim()) if dim != out]
    largest = terms.abs().amax(others, keepdim=True) if others else terms.abs()
    slack = ROUNDING * torch.finfo(tensor.dtype).eps * largest
    for dim in others:
        first = tensor.narrow(dim, 0, 1)
        if bool(((tensor - first).abs() <= slack).all()):
            tensor = first
    return tensor.contiguous()


def read_instead(reader: Reader, gone: Tensor, at: int, weight: Tensor) -> tuple[int, Tensor]:
    """A convolution's weight at input `at`, with what it reads at the inputs in `gone` (bool [i]) added in proportion.

    Answers the dimension of the inputs and the slice there. Where input `at` holds one number everywhere, and each
    input that leaves another, this is exact also where the convolution pads.
    """
    assert reader.level is not None
    dim = 0 if packet_name(reader.node.target).startswith("conv_transpose") else 1
    share = torch.where(gone, reader.level / reader.level[at], 0.0).double().to(weight.device)
    share[at] = 1.0
    values = torch.tensordot(weight.double().movedim(dim, -1), share, dims=1)
    return dim, values.to(torch.float32 if weight.dtype in HALF else weight.dtype)
