"""Which parameters of a program are weights, and where each is used."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, cast

import torch
from torch.fx import Node

from .program import Program, arguments, names_of_parameters, same_shape

aten = torch.ops.aten

# Ops that hand a weight on unchanged or transposed, before it is multiplied.
_SAME = {aten.detach.default, aten.alias.default, aten.contiguous.default, aten.clone.default}
_TRANSPOSE = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}

# Ops that hand on all elements of one tensor as they are, in another order or shape.
_MOVED = {
    *_SAME,
    *_TRANSPOSE,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
    aten.flip.default,
}
# Of the operands of these, one that is broadcast scales rows or columns, and its zeros are no pattern of elements.
_SCALING = {aten.mul.Tensor, aten.div.Tensor, aten._weight_norm.default}
# Ops that keep an element that is zero a zero, wherever they put it.
_KEEPING_ZEROS = {
    *_MOVED,
    *_SCALING,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.neg.default,
    aten.cat.default,
    aten.stack.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.index_select.default,
    aten.unbind.int,
    aten.expand.default,
    aten.repeat.default,
    aten.to.dtype,
    aten._to_copy.default,
}

# op -> (kind, position of the weight, position of the activations, position of the bias)
_LINEAR: dict[Any, tuple[int, int, int | None]] = {
    aten.linear.default: (1, 0, 2),
    aten.addmm.default: (2, 1, 0),
    aten.mm.default: (1, 0, None),
    aten.matmul.default: (1, 0, None),
}
# Convolutions whose weight is [i, o, *k].
_TRANSPOSED_CONVS = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_OTHER = {
    "conv": {
        *_TRANSPOSED_CONVS,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv1d.padding,
        aten.conv2d.padding,
        aten.conv3d.padding,
        aten.convolution.default,
    },
    "embedding": {
        aten.embedding.default,
        aten.embedding_bag.default,
        aten.embedding_bag.padding_idx,
        aten._embedding_bag.default,
        aten._embedding_bag_forward_only.default,
    },
    "recurrent layer": {
        getattr(getattr(aten, kind), overload)
        for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        for overload in ("input", "data")
    },
    "bilinear": {aten.bilinear.default},
    "matmul": {
        aten.bmm.default,
        aten.baddbmm.default,
        aten.einsum.default,
        aten.matmul.default,
        aten.mm.default,
    },
}


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a weight is used. `kind` is linear, a key of `_OTHER`, or "" for anything else.

    For linear and conv, `x` and `bias` are the op's other operands as they are now; for linear, `transposed` says that
    the weight arrives as [i, o].
    """

    node: Node
    kind: str
    transposed: bool = False

    @property
    def x(self) -> Node:
        """The activations of a linear [..., i] or a convolution [b, i, ...]."""
        if self.kind != "linear":
            return arguments(self.node)["input"]
        return cast(Node, self.node.args[_LINEAR[self.node.target][1]])

    @property
    def bias(self) -> Node | None:
        """The bias of a linear or a convolution [o], if it has one."""
        if self.kind != "linear":
            return arguments(self.node).get("bias")
        position = _LINEAR[self.node.target][2]
        if position is None or len(self.node.args) <= position:
            return None
        return cast("Node | None", self.node.args[position])

    @property
    def inputs(self) -> int:
        """The dimension of the weight that is summed over: 1 unless it is stored with its inputs first."""
        if self.node.target is aten.convolution.default:
            return 0 if self.node.args[6] else 1
        return 0 if self.transposed or self.node.target in _TRANSPOSED_CONVS else 1


def uses(program: Program) -> dict[str, list[Use]]:
    """Where each parameter that the graph reads is used, under its first name."""
    canonical = names_of_parameters(program)
    found: dict[str, list[Use]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in canonical:
            found.setdefault(canonical[str(node.target)], []).extend(uses_of(node))
    return found


def uses_of(weight: Node) -> list[Use]:
    """Where what this node stands for is used, as it is or transposed."""
    return _follow(weight, transposed=False)


def is_moved(node: Node) -> bool:
    """Whether the node holds elements of one tensor as they are, in another order or shape."""
    return node.target in _MOVED


def read_by_products(program: Program) -> set[str]:
    """The first names of parameters whose zeros are zeros of a weight that a product reads.

    On their way they may be scaled, joined with others, cut and moved, as long as no input has a part in it.
    """
    canonical = names_of_parameters(program)
    of: dict[Node, set[str]] = {}
    found: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            of[node] = {canonical[str(node.target)]} if str(node.target) in canonical else set()
            continue
        names = {name for read in node.all_input_nodes if not _is_factor(read, node) for name in of.get(read, ())}
        if not names:
            continue
        is_constant = all(read in of for read in node.all_input_nodes)
        if is_constant and (node.target in _KEEPING_ZEROS or node.target is operator.getitem):
            of[node] = names
        elif any(node.target in ops for ops in (_LINEAR, *_OTHER.values())):
            found |= names
    return found


def _is_factor(operand: Node, node: Node) -> bool:
    return node.target in _SCALING and not same_shape(operand, node)


def _follow(node: Node, *, transposed: bool) -> list[Use]:
    result: list[Use] = []
    for user in node.users:
        if user.target in _SAME:
            result += _follow(user, transposed=transposed)
        elif user.target in _TRANSPOSE and _swaps_last_two(user):
            result += _follow(user, transposed=not transposed)
        else:
            result.append(_use(user, node, transposed))
    return result


def _swaps_last_two(node: Node) -> bool:
    value = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
    if value is None or value.dim() != 2:
        return False
    if node.target is aten.transpose.int:
        return {int(str(d)) % 2 for d in node.args[1:3]} == {0, 1}
    if node.target is aten.permute.default:
        return [d % 2 for d in node.args[1]] == [1, 0]  # pyright: ignore
    return True


def _use(user: Node, weight: Node, transposed: bool) -> Use:
    if user.target in _LINEAR:
        position, x_position, bias_position = _LINEAR[user.target]
        value = weight.meta.get("val")
        x = user.args[x_position] if len(user.args) > x_position else None
        bias = user.args[bias_position] if bias_position is not None and len(user.args) > bias_position else None
        plain = not user.kwargs and user.args[position] is weight and x is not weight and isinstance(x, Node)
        # linear takes [o, i]; the other three multiply by [i, o].
        swapped = user.target is not aten.linear.default
        if plain and value is not None and value.dim() == 2:
            if bias is None or _is_bias(bias, value.shape[1 if swapped else 0]):
                return Use(user, "linear", transposed != swapped)
        return Use(user, "matmul" if weight in (user.args[position], x) else "")
    for kind, ops in _OTHER.items():
        if user.target in ops:
            return Use(user, kind)
    return Use(user, "")


def _is_bias(bias: Any, size: int) -> bool:
    """Whether this is a plain vector [size], as kernels take it: not a scalar to broadcast, and not expanded."""
    value = bias.meta.get("val") if isinstance(bias, Node) else None
    return isinstance(value, torch.Tensor) and list(value.shape) == [size] and value.stride() == (1,)


def norm_behind(node: Node) -> Node | None:
    """The batch-norm in evaluation, by constants, that alone reads a convolution's output."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or user is None or user.target is not aten.batch_norm.default or user.args[0] is not node:
        return None
    given = arguments(user)
    constants = [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if given["running_mean"] is None or given["running_var"] is None or given["training"]:
        return None
    return user if all(c is None or (isinstance(c, Node) and c.op == "get_attr") for c in constants) else None
