"""own_masks: weights that a graph multiplies by constant masks become weights with zeros, under their own names.

So is a model whose code says `F.linear(x, self.weight * self.mask)`, and what `transform(trainable=True)` leaves where
masks are held. The graph's own tensors are replaced, the model's are not written to.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.graph.memory import base, writes
from fxprune.graph.program import fetch_any, keep_name, owner, replace_parameter

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Held:
    """A buffer that alone holds the mask of a weight: its name, and its dtype where it has the weight's shape.

    Without a dtype it holds the mask in a form of its own, as `masked_linear` does.
    """

    name: str
    dtype: torch.dtype | None


def fold_constant_masks(program: GraphModule, *, only_held: bool = False) -> tuple[dict[str, Tensor], dict[str, Held]]:
    """Folds masks into the weights of `program`; name -> bool, True where kept, for every name of each weight.

    The second answer names the buffers that held a mask and that nothing reads any more, by the weight's first name.
    With `only_held` no other masks are folded: a result that trains holds a mask in a buffer again, under its old name.

    A mask is computed from buffers alone (or from parameters that do not train), and is 0 or 1 everywhere and somewhere
    0. A weight stays as it is that is also read without it or with another one, and one whose product with it is
    written to or returned.
    """
    names = _names_by_parameter(program)
    constants = _Constants(program)
    own_memory = _handed_out(program)
    found: dict[str, Tensor] = {}
    holders: dict[str, Held] = {}
    products: set[Node] = set()
    for product in [node for node in program.graph.nodes if node.target is aten.mul.Tensor]:
        weight, mask = constants.weight_and_mask(product)
        if weight is None or mask is None:
            continue
        parameter = constants.tensor(weight)
        own = names.get(id(parameter), [])
        if not own or own[0] in found:
            continue
        reads = [n for n in program.graph.nodes if n.op == "get_attr" and str(n.target) in own]
        users = [user for read in reads for user in read.users]
        if not all(constants.is_masked_alike(user, mask, reads) and user not in own_memory for user in users):
            continue
        holder = constants.holder(users, reads, own[0])
        if only_held and holder is None:
            continue
        keep = (mask != 0).expand_as(parameter)
        if not bool((parameter.detach().isfinite() | keep).all()):
            continue  # Times zero these are NaN, and not zero.
        replace_parameter(program, own, parameter.detach().masked_fill(~keep, 0), parameter.requires_grad)
        found.update(dict.fromkeys(own, keep))
        if holder is not None:
            holders[own[0]] = holder
        products.update(users)
        for user in users:
            user.replace_all_uses_with(next(n for n in user.all_input_nodes if n in reads))
    if found:
        _drop_unused(program, products, counters=not only_held)
    left = {name for name, _ in program.named_buffers()}
    return found, {name: holder for name, holder in holders.items() if holder.name not in left}


def _names_by_parameter(program: GraphModule) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in program.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _handed_out(program: GraphModule) -> set[Node]:
    """Nodes whose memory is written to or returned, so that it cannot be a parameter's."""
    return _written(program) | {base(node) for node in program.graph.output_node().all_input_nodes}


def _written(program: GraphModule) -> set[Node]:
    """Nodes whose memory ops write to; `detach_`, as `torch.tensor` in a forward leaves it, writes no number."""
    return {
        memory for node in program.graph.nodes if node.target is not aten.detach_.default for memory in writes(node)
    }


class _Constants:
    """What nodes are that depend on nothing but tensors of the program that neither train nor are written to."""

    def __init__(self, program: GraphModule) -> None:
        self._program = program
        self._known: dict[Node, Tensor | None] = {}
        self._masks: dict[Node, Tensor | None] = {}
        written = _written(program)
        self._constant: set[Node] = set()
        for node in program.graph.nodes:
            if base(node) in written:
                continue
            if node.op == "get_attr":
                tensor = self.tensor(node)
                if tensor is not None and not tensor.requires_grad:
                    self._constant.add(node)
            elif _is_function(node) and self._constant.issuperset(node.all_input_nodes):
                self._constant.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self._constant

    def tensor(self, node: Node) -> Any:
        """The tensor that a get_attr node reads; None where it reads something else."""
        value = fetch_any(self._program, str(node.target))
        return value if isinstance(value, Tensor) else None

    def weight_and_mask(self, product: Node) -> tuple[Node | None, Tensor | None]:
        """The two factors of weight * mask, in either order."""
        a, b = product.args[:2]
        for weight, mask in ((a, b), (b, a)):
            if not isinstance(weight, Node) or not isinstance(mask, Node) or weight.op != "get_attr":
                continue
            parameter = self.tensor(weight)
            if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point() or parameter.is_meta:
                continue
            value = self._mask(mask)
            if value is None or value.device != parameter.device:
                continue
            covered = torch.broadcast_shapes(parameter.shape, value.shape) == parameter.shape
            if covered and torch.result_type(parameter, value) == parameter.dtype:
                return weight, value
        return None, None

    def is_masked_alike(self, user: Node, mask: Tensor, reads: list[Node]) -> bool:
        """Whether a reader of a weight multiplies it by this mask."""
        if user.target is not aten.mul.Tensor:
            return False
        weight, other = self.weight_and_mask(user)
        if weight not in reads or other is None:
            return False
        return other is mask or (other.shape == mask.shape and bool((other == mask).all()))

    def holder(self, products: list[Node], reads: list[Node], weight: str) -> Held | None:
        """The one buffer that the masks of all these products of a weight are made of."""
        masks = {node for product in products for node in product.all_input_nodes if node not in reads}
        buffers = {str(node.target): self.tensor(node) for node in _above(masks) if node.op == "get_attr"}
        name, buffer = next(iter(buffers.items()), ("", None))
        if len(buffers) != 1 or isinstance(buffer, nn.Parameter) or buffer is None:
            return None
        same_shape = buffer.shape == fetch_any(self._program, weight).shape
        return Held(name, buffer.dtype if same_shape else None) if same_shape or name == keep_name(weight) else None

    def _mask(self, node: Node) -> Tensor | None:
        if node not in self._masks:
            value = self._value(node) if node in self._constant else None
            # A single number is a gate, which may open again.
            is_mask = value is not None and value.dim() > 0 and not value.is_meta
            is_mask = is_mask and bool(((value == 0) | (value == 1)).all()) and bool((value == 0).any())
            self._masks[node] = value if is_mask else None
        return self._masks[node]

    def _value(self, node: Node) -> Tensor | None:
        if node.op == "get_attr":
            return self.tensor(node)
        if node not in self._known:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._value)  # pyright: ignore
            try:
                with torch.no_grad():
                    value = node.target(*args, **kwargs)  # pyright: ignore
            except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
                # What cannot be computed here is no constant; the model computes it.
                value = None
            self._known[node] = value if isinstance(value, Tensor) else None
        return self._known[node]


def _is_function(node: Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and (not target._schema.is_mutable or target is aten.detach_.default)
        and torch.Tag.nondeterministic_seeded not in target.tags
        and len(target._schema.returns) == 1
        and "empty" not in target.name()
    )


def _drop_unused(program: GraphModule, products: set[Node], *, counters: bool) -> None:
    """Takes out these products and what only their masks were computed from; with `counters` all unread buffers."""
    graph = program.graph
    above = _above(products)
    if counters:
        above.update(node for node in graph.find_nodes(op="get_attr") if not node.users)
    for node in list(graph.nodes):
        # Export asserts what it saw of constants too.
        if node.target is aten._assert_tensor_metadata.default and node.args[0] in above:
            graph.erase_node(node)
    buffers = dict(program.named_buffers(remove_duplicate=False))
    dropped = set()
    for node in reversed(list(graph.nodes)):
        is_parameter = node.op == "get_attr" and str(node.target) not in buffers
        if node in above and not node.users and not is_parameter and node.op != "placeholder":
            dropped.add(str(node.target) if node.op == "get_attr" else "")
            graph.erase_node(node)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name in dropped - read - {""}:
        delattr(*owner(program, name))
    graph.lint()
    program.recompile()


def _above(nodes: set[Node]) -> set[Node]:
    """These nodes, and all that they are computed from."""
    found, waiting = set(nodes), list(nodes)
    while waiting:
        new = [node for node in waiting.pop().all_input_nodes if node not in found]
        found.update(new)
        waiting += new
    return found
