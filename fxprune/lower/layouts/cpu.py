"""cpu: what layouts whose kernels are the C++ ones have in common: each has an op, and one that splits its rows."""

from __future__ import annotations

import abc
import operator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxprune.kernels import native

from .site import Packed, Site, Verdict


class CpuLayout(abc.ABC):
    """A layout with a kernel on the CPU alone. Each says how it packs and unpacks."""

    name = ""
    # Its tensors by name, in the order in which the ops take them, after x.
    tensors: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    op: torch._ops.OpOverload
    split_op: torch._ops.OpOverload

    def fits(self, site: Site) -> Verdict:
        """Whether `site` can be stored so; `why` also says when only the slow plain-torch kernel runs."""
        weight = site.weight
        if weight.dtype not in self.dtypes:
            *rest, last = (str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return Verdict(False, f"{weight.dtype} is not {', '.join(rest)}{' or ' if rest else ''}{last}")
        if weight.device.type != "cpu":
            return Verdict(False, f"the weight is on {weight.device}, the kernel runs on the CPU")
        if weight.dim() != 2:
            return Verdict(False, f"the weight has {weight.dim()} dimensions, not 2")
        if weight.numel() == 0:
            return Verdict(False, f"the weight is empty {tuple(weight.shape)}")
        if site.activation not in native.ACTIVATIONS:
            return Verdict(False, f"the kernel has no activation {site.activation!r}")
        if why := self.refuses(site):
            return Verdict(False, why)
        state = native.status()
        slow = "" if state.available else "only the slow plain-torch kernel: "
        return Verdict(True, slow + state.detail)

    def refuses(self, site: Site) -> str:
        """Why a weight [o, i] on the CPU cannot be stored so; nothing if it can."""
        return ""

    def arguments(self, packed: Packed) -> tuple[str, ...]:
        """Names of the packed tensors in the order in which the ops take them, after x."""
        return self.tensors

    def call(self, x: Tensor, packed: Packed, bias: Tensor | None = None, activation: str = "") -> Tensor:
        """activation(x [..., i] @ W^T + bias) [..., o]."""
        return self.op(x, *(packed.tensors[name] for name in self.tensors), bias, packed.shape[0], activation)

    def lower(
        self,
        graph: Graph,
        packed: Packed,
        tensors: dict[str, Node],
        x: Node,
        bias: Node | None,
        activation: str,
        out_features: tuple[int, ...],
    ) -> list[Node]:
        """One call for x, and where the rows make several results, a getitem node for each."""
        operands = (x, *(tensors[name] for name in self.tensors), bias)
        if len(out_features) == 1:
            return [graph.call_function(self.op, (*operands, out_features[0], activation))]
        results = graph.call_function(self.split_op, (*operands, list(out_features), activation))
        return [graph.call_function(operator.getitem, (results, j)) for j in range(len(out_features))]
