"""constant_masks: weights that a graph multiplies by constant masks become weights with zeros, under their own names.

So is a model whose code says `F.linear(x, self.weight * self.mask)`, and what `transform(trainable=True)` leaves where
masks are held. The graph's own tensors are replaced, the model's are not written to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def fold_constant_masks(program: GraphModule) -> dict[str, Tensor]:
    """Folds masks into the weights of `program`; name -> bool, True where kept, for every name of each weight.

    A mask is anything computed from tensors of the program alone that is 0 or 1 everywhere and somewhere 0. A weight
    that is also read without it, or with another one, stays as it is.
    """
    names = _names_by_parameter(program)
    constants = _Constants(program)
    products = [node for node in program.graph.nodes if node.target is aten.mul.Tensor]
    found: dict[str, Tensor] = {}
    for product in products:
        weight, mask = _weight_and_mask(product, constants)
        if weight is None or mask is None:
            continue
        parameter = constants.of(weight)
        own = names.get(id(parameter), [])
        if parameter is None or not own or own[0] in found:
            continue
        reads = [n for n in program.graph.nodes if n.op == "get_attr" and str(n.target) in own]
        users = [user for read in reads for user in read.users]
        if not all(_is_masked_alike(user, mask, reads, constants) for user in users):
            continue
        keep = (mask != 0).expand_as(parameter)
        if not bool(parameter.detach()[~keep].isfinite().all()):
            continue  # Times zero these are NaN, and not zero.
        _replace(program, own, nn.Parameter(parameter.detach().masked_fill(~keep, 0), parameter.requires_grad))
        found.update(dict.fromkeys(own, keep))
        for user in users:
            user.replace_all_uses_with(next(n for n in user.all_input_nodes if n in reads))
    if found:
        _drop_unused(program, constants)
    return found


def _names_by_parameter(program: GraphModule) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in program.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


class _Constants:
    """The values of nodes that depend on nothing but tensors of the program."""

    def __init__(self, program: GraphModule) -> None:
        self._program = program
        self._known: dict[Node, Any] = {}
        self._constant: set[Node] = set()
        for node in program.graph.nodes:
            if node.op == "get_attr" or (_is_function(node) and self._constant.issuperset(node.all_input_nodes)):
                self._constant.add(node)

    def of(self, node: Any) -> Any:
        """A node's value; None where it depends on an input, or is drawn or written to."""
        if node not in self._constant:
            return None
        if node not in self._known:
            self._known[node] = self._value(node)
        return self._known[node]

    def _value(self, node: Node) -> Any:
        if node.op == "get_attr":
            value: Any = self._program
            for part in str(node.target).split("."):
                value = getattr(value, part, None)
            return value if isinstance(value, Tensor) else None
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.of)  # pyright: ignore
        with torch.no_grad():
            return node.target(*args, **kwargs)  # pyright: ignore


def _is_function(node: Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and len(target._schema.returns) == 1
    )


def _weight_and_mask(product: Node, constants: _Constants) -> tuple[Node | None, Tensor | None]:
    """The two factors of weight * mask, in either order."""
    a, b = product.args[:2]
    for weight, mask in ((a, b), (b, a)):
        if not isinstance(weight, Node) or not isinstance(mask, Node) or weight.op != "get_attr":
            continue
        parameter, value = constants.of(weight), constants.of(mask)
        if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point() or not _is_mask(value):
            continue
        product_of = torch.broadcast_shapes(parameter.shape, value.shape)
        if product_of == parameter.shape and torch.result_type(parameter, value) == parameter.dtype:
            return weight, value
    return None, None


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(((value == 0) | (value == 1)).all()) and bool((value == 0).any())


def _is_masked_alike(user: Node, mask: Tensor, reads: list[Node], constants: _Constants) -> bool:
    if user.target is not aten.mul.Tensor:
        return False
    weight, other = _weight_and_mask(user, constants)
    return weight in reads and other is not None and other.shape == mask.shape and bool((other == mask).all())


def _replace(program: GraphModule, names: list[str], value: nn.Parameter) -> None:
    for name in names:
        path, _, leaf = name.rpartition(".")
        setattr(program.get_submodule(path), leaf, value)


def _drop_unused(program: GraphModule, constants: _Constants) -> None:
    """Takes out what only the masks were computed from."""
    graph = program.graph
    for node in list(graph.nodes):
        # Export asserts what it saw of constants too.
        if node.target is aten._assert_tensor_metadata.default and constants.of(node.args[0]) is not None:
            graph.erase_node(node)
    buffers = dict(program.named_buffers(remove_duplicate=False))
    for node in reversed(list(graph.nodes)):
        is_buffer = node.op == "get_attr" and str(node.target) in buffers
        if not node.users and (is_buffer or (node.op == "call_function" and constants.of(node) is not None)):
            graph.erase_node(node)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name in buffers.keys() - read:
        path, _, leaf = name.rpartition(".")
        delattr(program.get_submodule(path), leaf)
    graph.lint()
    program.recompile()
