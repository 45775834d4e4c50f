"""lines: convolutions over lines [n, c, w], and what lies between them, as such over maps of one row [n, c, 1, w]."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.graph.program import Program, arguments, fetch, owner, same_shape

from .read import ACTIVATIONS

aten = torch.ops.aten


def lift_lines(program: Program, names: Collection[str]) -> None:
    """Puts a 2-D convolution in place of each 1-D one whose weight nobody else reads, where any reads one of `names`.

    torch computes the one as the other. Activations, sums, pooling and joined lines behind them are lifted as well, so
    that nothing lies between.
    """
    graph = program.graph
    convs = [node for target in _CONVS for node in graph.find_nodes(op="call_function", target=target)]
    if not any(str(arguments(node)["weight"].target) in names for node in convs):
        return
    lifted: dict[Node, Node] = {}
    for node in list(graph.nodes):
        make = _LIFTS.get(node.target) if node.op == "call_function" else None
        found = make(program, node, lifted) if make is not None else None
        if found is None:
            continue
        target, args, kwargs = found
        with graph.inserting_before(node):
            args = tuple(_up(program, lifted, arg) if isinstance(arg, Node) else arg for arg in args)
            args = tuple([_up(program, lifted, a) for a in arg] if isinstance(arg, list) else arg for arg in args)
            new = graph.call_function(target, args, kwargs)
        new.meta = {**node.meta, "val": node.meta["val"].unsqueeze(2)}
        lifted[node] = new
    for node, new in reversed(lifted.items()):
        if node.users:
            with graph.inserting_before(node):
                down = graph.call_function(aten.squeeze.dim, (new, 2))
            down.meta = dict(node.meta)
            node.replace_all_uses_with(down)
        graph.erase_node(node)


def _up(program: Program, lifted: dict[Node, Node], node: Any) -> Any:
    """A line as a map of one row; what is no line as it is."""
    if not isinstance(node, Node) or node.op == "get_attr":
        return node
    if node in lifted:
        return lifted[node]
    if node.meta["val"].dim() != 3:
        return node
    up = program.graph.call_function(aten.unsqueeze.default, (node, 2))
    up.meta = {**node.meta, "val": node.meta["val"].unsqueeze(2)}
    return up


Lift = tuple[Any, tuple[Any, ...], dict[str, Any]] | None


def _is_line(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.dim() == 3


def _one(value: Any) -> int | None:
    """The only number of a 1-D convolution's argument."""
    number = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
    return number if type(number) is int else None


def _conv(program: Program, node: Node, lifted: dict[Node, Node]) -> Lift:
    given = arguments(node)
    x, weight, padding = given["input"], given["weight"], given["padding"]
    numbers = [_one(given[name]) for name in ("stride", "dilation")]
    around = padding if isinstance(padding, str) else _one(padding)
    if not _is_line(x) or weight.op != "get_attr" or None in (*numbers, around):
        return None
    name = str(weight.target)
    module, leaf = owner(program, name)
    readers = [user for each in program.graph.find_nodes(op="get_attr") if each.target == name for user in each.users]
    if leaf not in module._parameters or len(readers) > 1:
        return None
    value = fetch(program, name).unsqueeze(2)
    module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    weight.meta["val"] = weight.meta["val"].unsqueeze(2)
    stride, dilation = numbers
    target = aten.conv2d.padding if isinstance(around, str) else aten.conv2d.default
    beside = around if isinstance(around, str) else [0, around]
    return target, (x, weight, given["bias"], [1, stride], beside, [1, dilation], given["groups"]), {}


def _same(program: Program, node: Node, lifted: dict[Node, Node]) -> Lift:
    """An activation of a lifted line."""
    return (node.target, node.args, dict(node.kwargs)) if node.args and node.args[0] in lifted else None


def _binary(program: Program, node: Node, lifted: dict[Node, Node]) -> Lift:
    """A sum or product of lines, one of them lifted."""
    lines = [arg for arg in node.args if isinstance(arg, Node)]
    alike = len(lines) == 2 and all(map(_is_line, lines)) and same_shape(*lines)
    return (node.target, node.args, dict(node.kwargs)) if alike and any(a in lifted for a in lines) else None


def _cat(program: Program, node: Node, lifted: dict[Node, Node]) -> Lift:
    given = arguments(node)
    lines = list(given["tensors"])
    if given["dim"] % 3 != 1 or not all(map(_is_line, lines)) or not any(line in lifted for line in lines):
        return None
    return node.target, (lines, 1), {}


def _pool(target: Any, *names: str) -> Callable[[Program, Node, dict[Node, Node]], Lift]:
    def lift(program: Program, node: Node, lifted: dict[Node, Node]) -> Lift:
        given = arguments(node)
        kernel, padding = _one(given["kernel_size"]), _one(given["padding"])
        stride = _one(given["stride"] or given["kernel_size"])
        dilation = _one(given.get("dilation", 1))
        if given["self"] not in lifted or None in (kernel, padding, stride, dilation):
            return None
        more = {"dilation": [1, dilation]} if "dilation" in names else {}
        flags = {name: given[name] for name in names if name != "dilation"}
        return target, (given["self"], [1, kernel], [1, stride], [0, padding]), {**more, **flags}

    return lift


_CONVS = (aten.conv1d.default, aten.conv1d.padding)
_LIFTS: dict[Any, Callable[[Program, Node, dict[Node, Node]], Lift]] = {
    **dict.fromkeys(_CONVS, _conv),
    aten.max_pool1d.default: _pool(aten.max_pool2d.default, "dilation", "ceil_mode"),
    aten.avg_pool1d.default: _pool(aten.avg_pool2d.default, "ceil_mode", "count_include_pad"),
    aten.cat.default: _cat,
    **dict.fromkeys((aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor), _binary),
    **dict.fromkeys(ACTIVATIONS, _same),
}
