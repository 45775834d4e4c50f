"""modules: the modules of a result with their parameters and buffers, as plain data, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxprune.capture.hooks import pruned_names
from fxprune.emit.trainable.parts import MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear, Part
from fxprune.errors import FileError

from .graphs import graph_data, graph_from
from .plain import Reader, Writer

_CONV = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding",
    "groups", "padding_mode", "_reversed_padding_repeated_twice",
)  # fmt: skip
# Class -> attributes that say how it computes; a Part's path is its own.
_LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    MaskedLinear: ("in_features", "out_features", "keep"),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
    **dict.fromkeys((MaskedConv1d, MaskedConv2d, MaskedConv3d), (*_CONV, "keep")),
    Part: ("path",),
    nn.Module: (),
}
_CLASSES = {kind.__name__: kind for kind in _LAYERS}


def module_data(root: nn.Module, writer: Writer) -> list[dict[str, Any]]:
    """Every module below `root`, and root itself as the first, with its tensors. Raises FileError."""
    found: list[dict[str, Any]] = []
    first: dict[int, str] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if id(module) in first:
            found.append({"path": path, "same": first[id(module)]})
            continue
        first[id(module)] = path
        found.append({"path": path, **_one(path, module, writer, is_root=module is root)})
    return found


def _one(path: str, module: nn.Module, writer: Writer, *, is_root: bool) -> dict[str, Any]:
    prefix = f"{path}." if path else ""
    if names := pruned_names(module):
        raise FileError(
            "cannot save the result",
            where=f'"{prefix}{names[0]}"',
            why="a pruning hook masks it, which is code",
            do=f"Make the masks permanent first (fxprune.prune.remove(module, {names[0]!r})), or keep its state_dict.",
        )
    parameters = {
        name: None if p is None else {"tensor": writer.put(p, prefix + name), "trains": p.requires_grad}
        for name, p in module._parameters.items()
    }
    buffers = {
        name: None
        if b is None
        else {"tensor": writer.put(b, prefix + name), "saved": name not in module._non_persistent_buffers_set}
        for name, b in module._buffers.items()
    }
    tensors = {"training": module.training, "parameters": parameters, "buffers": buffers}
    if is_root:
        return tensors
    if isinstance(module, GraphModule):
        return {"class": "GraphModule", "graph": graph_data(module.graph, writer), **tensors}
    names = _LAYERS.get(type(module))
    if names is None:
        raise FileError(
            "cannot save the result",
            where=f'module "{path}"',
            why=f"it is a {type(module).__qualname__}, put there after the transform, and a file holds no code",
            do="Save its state_dict beside, and put it in again after loading.",
        )
    settings = {name: writer.encode(getattr(module, name), f"{prefix}{name}") for name in names}
    return {"class": type(module).__name__, "settings": settings, **tensors}


def modules_from(data: Any, reader: Reader, trusted: Collection[str] = ()) -> nn.Module:
    """A plain module that holds what `module_data` described. Raises FileError."""
    made: dict[str, nn.Module] = {}
    parameters: dict[tuple[str, bool], nn.Parameter] = {}
    with _told():
        for each in data:
            path = each["path"]
            if not isinstance(path, str) or path in made or bool(path) is not bool(made):
                raise ValueError(f"a module is called {path!r}")
            module = made[each["same"]] if "same" in each else _module(each, reader, trusted, parameters)
            made[path] = module
            if path:
                above, _, leaf = path.rpartition(".")
                made[above].add_module(leaf, module)
        return made[""]


def _module(
    data: Mapping[str, Any], reader: Reader, trusted: Collection[str], parameters: dict[tuple[str, bool], nn.Parameter]
) -> nn.Module:
    kind = data.get("class", "Module")
    module = nn.Module().train(bool(data["training"]))
    if kind != "GraphModule":
        module.__class__ = _CLASSES[kind]
        for name, value in data.get("settings", {}).items():
            if name not in _LAYERS[_CLASSES[kind]]:
                raise ValueError(f"a {kind} has no {name!r}")
            vars(module)[name] = reader.decode(value)
    for name, each in data["parameters"].items():
        module.register_parameter(name, None if each is None else _parameter(each, reader, parameters))
    for name, each in data["buffers"].items():
        # Two names of one tensor stay two names of one.
        module.register_buffer(
            name, None if each is None else reader.tensor(each["tensor"]), each is None or each["saved"]
        )
    if kind == "GraphModule":
        return _graph_module(module, data, reader, trusted)
    return module


def _parameter(
    data: Mapping[str, Any], reader: Reader, parameters: dict[tuple[str, bool], nn.Parameter]
) -> nn.Parameter:
    key = (data["tensor"], bool(data["trains"]))
    if key not in parameters:
        parameters[key] = nn.Parameter(reader.tensor(key[0]), key[1])
    return parameters[key]


def _graph_module(held: nn.Module, data: Mapping[str, Any], reader: Reader, trusted: Collection[str]) -> nn.Module:
    module = GraphModule(held, graph_from(data["graph"], reader, trusted=trusted))
    module._parameters, module._buffers = held._parameters, held._buffers
    return module


@contextlib.contextmanager
def _told() -> Any:
    """What a broken description meets becomes a FileError."""
    try:
        yield
    except FileError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise FileError(
            "cannot read the file", why=f"its modules are broken: {type(error).__name__}: {error}"
        ) from error
