"""parts: the modules of a result that trains: linear layers and convolutions, and what is left of all others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod

from fxprune.errors import FxPruneError
from fxprune.graph.program import Program, arguments, fetch_any, owner

aten = torch.ops.aten


class Part(nn.Module):
    """A module of the model of which parameters, buffers and parts are left; its ops stand in the result's one graph.

    Nothing calls it, so it cannot be called, nor hooked but by torch.nn.utils.prune, whose hooks the result calls.
    `path` is its name in the result.
    """

    path: str = ""

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise self._refused("call it by itself")

    def __getitem__(self, index: int | str) -> nn.Module:
        """What has this place, or key, in the model's own container."""
        part = None if isinstance(index, int) and index < 0 else self._modules.get(str(index))
        if part is None:
            raise self._refused(f"take {index!r} of it", f"it holds {', '.join(self._modules) or 'no parts'}")
        return part

    def __iter__(self) -> NoReturn:
        raise self._refused("iterate over it", "parts without parameters are gone. children() has those that are left")

    def register_forward_pre_hook(self, hook: Any, **more: Any) -> Any:
        if not isinstance(hook, BasePruningMethod):
            raise self._refused("hook it")
        return super().register_forward_pre_hook(hook, **more)

    def register_forward_hook(self, *args: Any, **more: Any) -> NoReturn:
        raise self._refused("hook it")

    def _refused(self, what: str, why: str = "its ops stand in the one graph of the result") -> FxPruneError:
        return FxPruneError(
            f"cannot {what}",
            where=f'part "{self.path}" of a result that trains',
            why=why,
            do="The result's linear layers and convolutions are modules of their own: take one of them, or the result.",
        )

    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = register_forward_hook  # pyright: ignore


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a mask, a buffer of this name."""

    keep: str

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * getattr(self, self.keep), self.bias)


class _MaskedConv:
    keep: str

    def forward(self, input: Tensor) -> Tensor:
        conv = cast("nn.Conv2d", self)
        return conv._conv_forward(input, conv.weight * getattr(self, self.keep), conv.bias)


class MaskedConv1d(_MaskedConv, nn.Conv1d):
    """A convolution whose weight is multiplied by a mask."""


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    """A convolution whose weight is multiplied by a mask."""


class MaskedConv3d(_MaskedConv, nn.Conv3d):
    """A convolution whose weight is multiplied by a mask."""


def _linear(given: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    return {"in_features": weight.shape[1], "out_features": weight.shape[0]}


def _conv(given: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    sizes = {"in_channels": weight.shape[1] * given["groups"], "out_channels": weight.shape[0]}
    more = {name: given[name] for name in ("stride", "padding", "dilation")}
    more = {name: value if isinstance(value, str) else tuple(value) for name, value in more.items()}
    return {**sizes, "kernel_size": tuple(weight.shape[2:]), **more, "groups": given["groups"]}


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A module of one op: its class, the one of a masked weight, its ops, and its settings by the op's arguments."""

    plain: type[nn.Module]
    masked: type[nn.Module]
    ops: tuple[Any, ...]
    settings: Callable[[dict[str, Any], Tensor], dict[str, Any]]


_KINDS = (
    _Kind(nn.Linear, MaskedLinear, (aten.linear.default,), _linear),
    _Kind(nn.Conv1d, MaskedConv1d, (aten.conv1d.default, aten.conv1d.padding), _conv),
    _Kind(nn.Conv2d, MaskedConv2d, (aten.conv2d.default, aten.conv2d.padding), _conv),
    _Kind(nn.Conv3d, MaskedConv3d, (aten.conv3d.default, aten.conv3d.padding), _conv),
)
_BY_NAME = {f"{cls.__module__}.{cls.__qualname__}": kind for kind in _KINDS for cls in (kind.plain, kind.masked)}


def make_layers(draft: Program) -> None:
    """Makes real modules of the linear layers and convolutions whose ops are theirs alone.

    A layer is one where its module's forward is that op, of its own weight (masked or not) and bias, at every call.
    """
    calls: dict[str, list[Node]] = {}
    kinds: dict[str, _Kind | None] = {}
    for node in draft.graph.nodes:
        stack = [*node.meta.get("nn_module_stack", {}).values()]
        if node.op == "call_function" and stack:
            path, cls = stack[-1]
            path = path.partition("@")[0]
            calls.setdefault(path, []).append(node)
            kinds[path] = _BY_NAME.get(cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}")
    for path, nodes in calls.items():
        kind = kinds[path]
        layer = None if kind is None else _layer(draft, path, kind, nodes)
        if layer is not None:
            module, leaf = owner(draft, path)
            module._modules[leaf] = layer
            for node in nodes:
                _call(node, path)
    draft.graph.lint()


def name_parts(result: nn.Module) -> None:
    """Makes Parts of the plain modules that torch's GraphModule holds its tensors in."""
    for path, module in result.named_modules():
        if type(module) is nn.Module:
            module.__class__ = Part
            vars(module)["path"] = path


def _layer(draft: Program, path: str, kind: _Kind, nodes: list[Node]) -> nn.Module | None:
    """The module that computes all of these nodes; None where none does."""
    given = [arguments(node) for node in nodes if node.target in kind.ops]
    reads = [(_read(each["weight"]), _attribute(each["bias"])) for each in given]
    if len(given) < len(nodes) or any(read != reads[0] for read in reads[1:]):
        return None
    (weight, keep), bias = reads[0]
    others = [{k: v for k, v in each.items() if k not in ("input", "weight", "bias")} for each in given]
    if weight != f"{path}.weight" or bias not in ("", f"{path}.bias") or any(o != others[0] for o in others[1:]):
        return None
    held = draft.get_submodule(path)
    names = {"weight", *(["bias"] if bias else []), *([keep.rpartition(".")[2]] if keep else [])}
    if held._modules or {*held._parameters, *held._buffers} != names or keep.rpartition(".")[0] not in ("", path):
        return None
    parameter = fetch_any(draft, weight)
    cls = kind.masked if keep else kind.plain
    layer = cls(**kind.settings(given[0], parameter), bias=bool(bias), device="meta")
    layer._parameters, layer._buffers = held._parameters, held._buffers
    if not bias:
        layer.register_parameter("bias", None)
    if keep:
        vars(layer)["keep"] = keep.rpartition(".")[2]
    return layer


def _read(weight: Any) -> tuple[str, str]:
    """The names of a weight and of the mask that it is multiplied by, "" for what there is not."""
    if isinstance(weight, Node) and weight.target is aten.mul.Tensor:
        return _attribute(weight.args[0]), _attribute(weight.args[1])
    return _attribute(weight), ""


def _attribute(value: Any) -> str:
    """The name of what a node reads; "" for None and "?" for what is no attribute."""
    if value is None:
        return ""
    return str(value.target) if isinstance(value, Node) and value.op == "get_attr" else "?"


def _call(node: Node, path: str) -> None:
    """The call of a module in place of a node, and of what only computed its weight."""
    graph, sources = node.graph, node.all_input_nodes
    x = arguments(node)["input"]
    with graph.inserting_before(node):
        call = graph.call_module(path, (x,))
    call.meta = node.meta
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    for source in _unread(sources):
        graph.erase_node(source)


def _unread(nodes: list[Node]) -> Iterator[Node]:
    for node in nodes:
        if node.op != "placeholder" and not node.users and (node.op == "get_attr" or node.target is aten.mul.Tensor):
            inputs = node.all_input_nodes
            yield node
            yield from _unread(inputs)
