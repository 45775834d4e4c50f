"""build: the steps of one region, its weights packed, and the call that takes its place in the graph."""

from __future__ import annotations

import dataclasses
import operator
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxprune.graph.program import Program, fetch, owner, sizes
from fxprune.kernels import native
from fxprune.kernels.native import net, segments, tiles
from fxprune.kernels.native.net import Finish, Step, Taps

from .gain import places_of, weight_of
from .known import gain_of
from .masks import as_dtype, hides_nothing, put_scores
from .part import WEIGHED, Heads, Part, channels_of, dtype_of
from .regions import Region
from .tiles import k_block, row_block, tile_for
from .transposed import plain_weight

aten = torch.ops.aten

# A net must beat its ops by this, which compiled are faster than they are one by one.
MARGIN = 1.3
# The share of nonzeros from which on tiles multiply a weight with its zeros faster than its nonzeros are multiplied.
LEAST_FOR_TILES = 1 / 16


@dataclasses.dataclass(frozen=True)
class Net:
    """What became of a region: why, whether it is a net, its weights by name and their bytes as stored."""

    is_net: bool
    why: str
    nodes: dict[str, str]
    bytes: dict[str, int]


class Builder:
    """Writes the steps of one region, packs its weights, and puts the call into the graph."""

    def __init__(self, program: Program, region: Region, *, rounds: bool = False) -> None:
        self.program, self.region = program, region
        self.steps: list[Step] = []
        self.value: dict[Node, int] = {}
        self.dtype = dtype_of(region.outputs[0])
        self.rounds = rounds or self.dtype == torch.bfloat16
        self.packed: list[segments.Segments] = []
        self.panels: list[net.Panels] = []
        self.starts: list[Tensor] = []
        self.dense: list[Tensor] = []
        self.at = {"values": 0, "segments": 0, "starts": 0, "dense": 0, "words": 0, "brains": 0}
        self.where = weights_in(region)
        self.bytes: dict[str, int] = {}
        self.ends = self._fusions()

    def _fusions(self) -> dict[Node, list[Node]]:
        """For the node that a convolution's sums end in: the convolution and what follows it in its epilogue."""
        parts, ends, taken = self.region.parts, {}, set()
        order = {node: number for number, node in enumerate(parts)}
        for node, part in reversed(parts.items()):
            if not _is_conv(part):
                continue
            chain = [node]
            while True:
                following = self._next(chain, order, taken)
                if following is None:
                    break
                chain.append(following)
            taken.update(chain)
            ends[chain[-1]] = chain
        return ends

    def _next(self, chain: list[Node], order: dict[Node, int], taken: set[Node]) -> Node | None:
        """What alone reads the end of the chain and can be computed with it: an activation, a residual, or both."""
        last, parts = chain[-1], self.region.parts
        user = next(iter(last.users), None)
        if len(last.users) != 1 or user not in parts or user in taken:
            return None
        kinds = [parts[node].kind for node in chain[1:]]
        if parts[user].kind == "activate" and kinds in ([], ["add"]):
            return user
        if parts[chain[0]].kind == "transposed conv":
            # Its sums are not yet where another map could be added.
            return None
        if parts[user].kind != "add" or kinds not in ([], ["activate"]) or len(set(parts[user].maps)) < 2:
            return None
        (other,) = [source for source in parts[user].maps if source is not last]
        whole = [sizes(source.meta["val"].shape)[1:] for source in parts[user].maps]
        # What is added must be there; of two convolutions that are added the later one adds.
        if whole[0] != whole[1] or (other in order and order[other] > order[chain[0]] and _is_conv(parts[other])):
            return None
        return user

    def build(self, *, forced: bool) -> Net:
        """The region as a net, where that is faster than its ops one by one."""
        inside = {node for chain in self.ends.values() for node in chain}
        self.masks = self._masks()
        for number, node in enumerate(self.region.inputs):
            self.value[node] = self._add(net.Enter(number, _tile(node)))
        for node, part in self.region.parts.items():
            if node in self.ends:
                self.value[node] = self._convolve(self.ends[node])
            elif node not in inside:
                self.value[node] = self._add(self._step(node, part))
        forms = [_form(node.meta["val"]) for node in self.region.outputs]
        for node, form in zip(self.region.outputs, forms, strict=True):
            self._add(net.Exit(self.value[node], form))
        tensors = self._tensors()
        kind = "linears" if is_of_tokens(self.region) else "convolutions"
        together = f"one of {len(self.where)} {kind} in one call" if len(self.where) > 1 else "a call of its own"
        if forced:
            self._store(tensors, forms)
            slow = "" if native.status().available else ", only by slow plain torch"
            return Net(True, f"{together}{slow}", self.where, self.bytes)
        gain = gain_of(self.program, self.region, (*tensors.values(), net.encode(self.steps)))
        if gain < MARGIN:
            why = f"{gain:.2f}x its ops one by one, {together}; {MARGIN:.2f}x is asked"
            return Net(False, why, self.where, self.bytes)
        self._store(tensors, forms)
        return Net(True, f"{together}, {gain:.2f}x its ops one by one", self.where, self.bytes)

    def _tensors(self) -> dict[str, Tensor]:
        """What all weights are stored in, as the op takes it. What is joined does not stay twice."""
        tensors = {}
        for key in ("values", "columns", "order", "counts"):
            dtype = torch.float32 if key == "values" else torch.int16
            tensors[key] = torch.cat([torch.zeros(0, dtype=dtype), *(getattr(packed, key) for packed in self.packed)])
            self.packed = [packed._replace(**{key: tensors[key][:0]}) for packed in self.packed]
        tensors["starts"] = torch.cat(self.starts)
        tensors["dense"] = torch.cat([torch.zeros(0), *self.dense])
        tensors["words"] = torch.cat([torch.zeros(0, dtype=torch.int32), *(panels.words for panels in self.panels)])
        spare = torch.zeros(net.SPARE if self.panels else 0, dtype=torch.bfloat16)
        tensors["brains"] = torch.cat([*(panels.values for panels in self.panels), spare])
        self.panels = []
        return tensors

    def _add(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps) - 1

    def _step(self, node: Node, part: Part) -> Step:
        x, *others = (self.value[source] for source in part.maps)
        match part.kind:
            case "add":
                return net.Add(x, others[0])
            case "multiply":
                return net.Multiply(x, others[0])
            case "activate":
                return net.Activate(x, part.finish)
            case "concat":
                return net.Concat((x, *others))
            case "global mean":
                return net.Mean(x)
            case "layer norm":
                weight, bias = (-1 if a is None else self._put_dense(self._fetch(a)) for a in (part.weight, part.bias))
                return net.LayerNorm(x, weight, bias, part.epsilon)
            case "attention":
                heads, (k, v) = cast(Heads, part.heads), others
                how = (*heads.firsts, self.masks.get(part.mask, -1), heads.causal, self.rounds, heads.scale)
                return net.Attention(x, k, v, heads.count, heads.size, heads.v_size, *how)
            case "repeat":
                return net.Repeat(x, part.times, _tile(node))
            case "shuffle":
                return net.Shuffle(x, part.times, tile=_tile(node))
            case kind:
                return net.Pool(kind, x, part.taps, _tile(node))

    def _convolve(self, chain: list[Node]) -> int:
        conv, *rest = chain
        parts = self.region.parts
        finish, residual, seen = Finish(), -1, conv
        for node in rest:
            if parts[node].kind == "activate":
                finish = parts[node].finish
            else:
                (other,) = [source for source in parts[node].maps if source is not seen]
                residual = self.value[other]
            seen = node
        kinds = [parts[node].kind for node in rest]
        finish = dataclasses.replace(finish, adds_last=kinds == ["activate", "add"])
        part = parts[conv]
        tile = _tile(part.maps[0] if part.as_plain is not None else conv)
        weight = self._weight(part)
        bias = -1 if part.bias is None else self._put_dense(self._bias(part, len(weight)))
        x = self.value[part.maps[0]]
        if part.kind == "depthwise":
            at = self._put_dense(weight.flatten())
            return self._add(net.Depthwise(x, len(weight), part.taps, residual, at, bias, finish, tile))
        rows, channels = weight.shape[:2]
        if self._pays_by_tiles(part, weight):
            where = self._put_panels(net.pack_panels(weight.bfloat16().flatten(1)), part)
            return self._add(net.Product(x, rows, channels, residual, *where, bias, finish))
        blocks = row_block(rows), k_block(part.taps, tile, channels)
        where = self._put(net.pack(weight, part.taps, tile, *blocks), part)
        value = self._add(net.Conv(x, rows, channels, part.taps, *blocks, residual, *where, bias, finish, tile))
        if part.as_plain is None:
            return value
        return self._add(net.Shuffle(value, part.times, part.as_plain.cut, _tile(conv)))

    def _pays_by_tiles(self, part: Part, weight: Tensor) -> bool:
        """Whether a weight that may be rounded is multiplied faster with its zeros, by tiles."""
        is_product = part.kind in ("linear", "conv") and part.taps == Taps()
        if not self.rounds or not is_product or tiles.isa() != "AMX":
            return False
        return int(torch.count_nonzero(weight)) >= LEAST_FOR_TILES * weight.numel()

    def _bias(self, part: Part, rows: int) -> Tensor:
        """The bias of each row: those of a transposed convolution are one after another for the places of a channel."""
        assert part.bias is not None
        bias = self._fetch(part.bias)
        return bias.repeat_interleave(rows // len(bias))

    def _weight(self, part: Part) -> Tensor:
        """The weight [o, i, kh, kw]; of a convolution by groups with the zeros between its groups."""
        weight = weight_of(self.program, part).float()
        if part.kind == "linear":
            return weight[:, :, None, None]
        if part.as_plain is not None:
            return plain_weight(weight, part.groups, part.as_plain)
        channels = channels_of(part.maps[0])
        groups = channels // weight.shape[1]
        if part.kind == "depthwise" or groups == 1:
            return weight
        blocks = weight.reshape(groups, -1, *weight.shape[1:])
        whole = weight.new_zeros(groups, blocks.shape[1], groups, *weight.shape[1:])
        each = torch.arange(groups)
        whole[each, :, each] = blocks
        return whole.reshape(len(weight), channels, *weight.shape[2:])

    def _fetch(self, node: Node) -> Tensor:
        return fetch(self.program, str(node.target)).float()

    def _masks(self) -> dict[Node | None, int]:
        """Which input each mask is; those that hide nothing are none."""
        kept = [mask for mask in self.region.masks if not hides_nothing(self.program, mask)]
        self.region = dataclasses.replace(self.region, masks=tuple(kept))
        return {mask: len(self.region.inputs) + number for number, mask in enumerate(kept)}

    def _put(self, packed: segments.Segments, part: Part) -> tuple[int, int, int, int]:
        place = self.at["values"], packed.values.numel(), self.at["segments"], self.at["starts"]
        self.packed.append(packed)
        self.at["values"] += packed.values.numel()
        self.at["segments"] += packed.order.numel()
        self._put_starts(packed.starts, packed, part)
        return place

    def _put_panels(self, packed: net.Panels, part: Part) -> tuple[int, int, int, int]:
        place = self.at["brains"], len(packed.values), self.at["words"], self.at["starts"]
        self.panels.append(packed)
        self.at["brains"] += len(packed.values)
        self.at["words"] += len(packed.words)
        self._put_starts(packed.starts, packed, part)
        return place

    def _put_starts(self, starts: Tensor, packed: tuple[Tensor, ...], part: Part) -> None:
        self.starts.append(starts)
        self.at["starts"] += len(starts)
        name = str(part.weight.target)  # pyright: ignore[reportOptionalMemberAccess]
        self.bytes[name] = self.bytes.get(name, 0) + sum(t.numel() * t.element_size() for t in packed)

    def _put_dense(self, values: Tensor) -> int:
        at = self.at["dense"]
        self.dense.append(values.contiguous())
        self.at["dense"] += values.numel()
        return at

    def _store(self, tensors: dict[str, Tensor], forms: list[str]) -> None:
        name = next(iter(self.where))
        holder = _hold(self.program, f"{name.rpartition('.')[0]}.in_lanes".lstrip("."), tensors)
        graph, region = self.program.graph, self.region
        first, *_ = [node for node in graph.nodes if node in region.nodes]
        place = {node: number for number, node in enumerate(graph.nodes)}
        sources = [node for node in (*region.inputs, *region.masks) if node.op != "get_attr"]
        before = max([*sources, first.prev], key=place.__getitem__).next
        while before.op == "placeholder":
            before = before.next
        with graph.inserting_before(before):
            operands = [graph.get_attr(f"{holder}.{key}") for key in tensors]
            inputs = [as_dtype(graph, _here(graph, node), torch.float32) for node in region.inputs]
            inputs += [put_scores(graph, mask) for mask in region.masks]
            call = graph.call_function(torch.ops.fxprune.net.default, (inputs, *operands, net.encode(self.steps)))
            results = []
            made = []
            for number, (node, form) in enumerate(zip(region.outputs, forms, strict=True)):
                result = graph.call_function(operator.getitem, (call, number))
                as_last = form == "channels last"
                value = node.meta["val"].float()
                made.append(value.permute(0, 2, 3, 1) if as_last else value)
                result.meta = {**node.meta, "val": made[-1]}
                result = as_dtype(graph, result, self.dtype)
                if as_last:
                    result = graph.call_function(aten.permute.default, (result, [0, 3, 1, 2]))
                    result.meta = {**node.meta}
                results.append(result)
        call.meta = {**region.outputs[0].meta, "val": made}
        for node, result in zip(region.outputs, results, strict=True):
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in region.nodes)
        for node in [node for node in reversed(graph.nodes) if node in region.nodes]:
            graph.erase_node(node)


def _here(graph: Graph, node: Node) -> Node:
    """The node, or where it reads a constant another that reads it at this place of the graph."""
    if node.op != "get_attr":
        return node
    again = graph.get_attr(str(node.target))
    again.meta = dict(node.meta)
    return again


def _is_conv(part: Part) -> bool:
    return part.kind in (*WEIGHED, "depthwise")


def _form(value: Tensor) -> str:
    """How an output stands in memory: channels last where they are side by side, and not as there is one place only."""
    if value.dim() == 3:
        return "tokens"
    is_one = all(isinstance(size, int) and size == 1 for size in value.shape[2:])
    stride = value.stride()
    as_last = not is_one and isinstance(stride[1], int) and stride[1] == 1 and value.shape[1] > 1
    return net.FORMS[as_last]


def _hold(program: Program, name: str, tensors: dict[str, Tensor]) -> str:
    """Registers tensors as buffers of a new module of the program; returns the module's name."""
    module, leaf = owner(program, name)
    taken, number = {*module._modules, *module._parameters, *module._buffers}, 0
    free = leaf
    while free in taken:
        number += 1
        free = f"{leaf}_{number}"
    holder = nn.Module()
    for key, tensor in tensors.items():
        holder.register_buffer(key, tensor)
    module.add_module(free, holder)
    return f"{name.rpartition('.')[0]}.{free}".lstrip(".")


def weights_in(region: Region) -> dict[str, str]:
    """The weights of a region's convolutions and linears by name, and the node of each."""
    parts = {node: part for node, part in region.parts.items() if part.kind in WEIGHED}
    return {str(part.weight.target): node.name for node, part in parts.items() if part.weight is not None}


def is_of_tokens(region: Region) -> bool:
    """Whether it is one of linears."""
    return any(part.kind == "linear" for part in region.parts.values())


def _tile(node: Node) -> int:
    return tile_for(*places_of(node))
