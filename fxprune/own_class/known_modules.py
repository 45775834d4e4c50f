"""known_modules: torch's own layers, whose attributes follow from the shapes of their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxprune.graph.program import Program, arguments

from .narrow_attention import NarrowAttention, settle_attention
from .sizes import paths_of


def settle_known(model: nn.Module, after: Program) -> None:
    """Sets what torch's layers in `model` remember of sizes, in place, from their weights and from the shrunk graph."""
    said = _arguments_by_module(after)
    for path, module in model.named_modules():
        _settle(module, said.get(path, {}))


def known_attributes(module: nn.Module) -> frozenset[str]:
    """The attributes that `settle_known` sets, which need no search."""
    if _is_transposed_linear(module):
        return frozenset(("nx", "nf"))
    return next((names for kind, names in _KNOWN.items() if isinstance(module, kind)), frozenset())


_KNOWN: dict[type[nn.Module], frozenset[str]] = {
    nn.Linear: frozenset(("in_features", "out_features")),
    nn.Bilinear: frozenset(("in1_features", "in2_features", "out_features")),
    _ConvNd: frozenset(("in_channels", "out_channels", "groups")),
    _NormBase: frozenset(("num_features",)),
    nn.LayerNorm: frozenset(("normalized_shape",)),
    nn.RMSNorm: frozenset(("normalized_shape",)),
    nn.GroupNorm: frozenset(("num_channels", "num_groups")),
    nn.Embedding: frozenset(("num_embeddings", "embedding_dim")),
    nn.PReLU: frozenset(("num_parameters",)),
    nn.RNNBase: frozenset(("input_size", "hidden_size", "proj_size")),
    NarrowAttention: frozenset(("embed_dim", "num_heads")),
}


def _arguments_by_module(after: Program) -> dict[str, dict[str, Any]]:
    """Module path -> arguments of the ops that its forward calls itself, by the names of their schemas."""
    found: dict[str, dict[str, Any]] = {}
    for node in after.graph.nodes:
        if node.op == "call_function":
            found.setdefault(paths_of(node)[-1], {}).update(arguments(node))
    return found


def _settle(module: nn.Module, said: dict[str, Any]) -> None:
    # A weight may be computed by the class, and is then no tensor of the module.
    weight = module._parameters.get("weight")
    if isinstance(module, _ConvNd):
        module.groups = said.get("groups", module.groups)
        if isinstance(weight, Tensor):
            inner, outer = weight.shape[1] * module.groups, weight.shape[0]
            if isinstance(module, _ConvTransposeNd):
                inner, outer = weight.shape[0], weight.shape[1] * module.groups
            module.in_channels, module.out_channels = inner, outer
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if isinstance(weight, Tensor):
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(said.get("normalized_shape"), (list, tuple)):
            module.normalized_shape = tuple(said["normalized_shape"])
    elif isinstance(module, nn.GroupNorm):
        groups = said.get("num_groups")
        module.num_groups = groups if isinstance(groups, int) else module.num_groups
        module.num_channels = len(weight) if isinstance(weight, Tensor) else module.num_channels
    elif isinstance(module, _NormBase):
        tensors = (weight, module._buffers.get("running_mean"))
        module.num_features = next((len(t) for t in tensors if isinstance(t, Tensor)), module.num_features)
    elif isinstance(module, nn.RNNBase):
        _settle_recurrent(module)
    elif isinstance(module, nn.MultiheadAttention):
        settle_attention(module)
    elif isinstance(weight, Tensor):
        _settle_by_weight(module, weight)


def _settle_by_weight(module: Any, weight: Tensor) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.numel()
    elif _is_transposed_linear(module):
        module.nx, module.nf = weight.shape


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of transformers, a linear layer with its weight [i, o]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _settle_recurrent(module: nn.RNNBase) -> None:
    first, second = module._parameters.get("weight_ih_l0"), module._parameters.get("weight_hh_l0")
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        module.input_size, module.hidden_size = first.shape[1], first.shape[0] // gates
        module.proj_size = second.shape[1] if module.proj_size else 0
        module._init_flat_weights()
