"""gpu: what layouts whose kernels are Triton's have in common, and the op that multiplies by any of them.

The op `fxprune::packed_linear` takes the layout's name and its tensors in the layout's order. On CUDA it launches the
layout's kernel; on the CPU it unpacks and multiplies, which is right and slow, and what `fits` never asks for.
"""

from __future__ import annotations

import abc
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from fxprune.errors import InputError
from fxprune.kernels.triton import activation as activations
from fxprune.kernels.triton import cannot_run_on

from .site import Packed, Site, Verdict

FLOATS = (torch.float16, torch.bfloat16)
# Bytes a second that a GPU with tensor cores reads at least; only orders the report's predictions.
_BYTES_PER_SECOND = 2e12
_PER_CALL = 4e-6

_library = torch.library.Library("fxprune", "FRAGMENT")
_SCHEMA = "(Tensor x, Tensor[] packed, Tensor? bias, str layout, int[] shape, str activation) -> Tensor"
_library.define(f"packed_linear{_SCHEMA}", tags=(torch.Tag.needs_fixed_stride_order,))
op = torch.ops.fxprune.packed_linear.default
_known: dict[str, GpuLayout] = {}


class GpuLayout(abc.ABC):
    """A layout with a kernel on CUDA alone. Each says how it packs, unpacks and multiplies."""

    name = ""
    # Its tensors by name, in the order in which the op takes them.
    tensors: tuple[str, ...] = ()
    # With more rows of x than this the weight is unpacked and multiplied densely; None where the kernel takes any.
    most: int | None = None

    def __init__(self) -> None:
        _known[self.name] = self

    def fits(self, site: Site) -> Verdict:
        """Whether `site` can be stored so, and if not why."""
        why = cannot_run(site.weight) or self.refuses(site)
        if not why and self.most is not None and min(site.tokens, default=1) > self.most:
            why = f"its kernel is for up to {self.most} tokens"
        return Verdict(not why, why)

    @abc.abstractmethod
    def refuses(self, site: Site) -> str:
        """Why a weight [o, i] on CUDA cannot be stored so; nothing if it can."""

    def pack(self, site: Site) -> Packed:
        """The weight in this layout."""
        weight = site.weight.detach().contiguous()
        return Packed(self.name, (weight.shape[0], weight.shape[1]), dict(zip(self.tensors, self.split(weight))))

    def unpack(self, packed: Packed) -> Tensor:
        """The weight [o, i], bit for bit as it was packed."""
        return self.join([packed.tensors[name] for name in self.tensors], packed.shape)

    @abc.abstractmethod
    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """weight [o, i] -> its tensors."""

    @abc.abstractmethod
    def join(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        """Its tensors -> weight [o, i], without waiting for the device."""

    @abc.abstractmethod
    def launch(
        self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, shape: tuple[int, int], activation: str
    ) -> Tensor:
        """activation(x [m, i] @ W^T + bias) [m, o] by the kernel."""

    def predict(self, site: Site, tokens: int) -> float:
        """Seconds of one call: the bytes of the packed weight and of the activations, at a GPU's bandwidth."""
        o, i = site.weight.shape
        element = site.weight.element_size()
        return _PER_CALL + (self.bytes_of(site.weight) + tokens * (o + i) * element) / _BYTES_PER_SECOND

    @abc.abstractmethod
    def bytes_of(self, weight: Tensor) -> float:
        """About how many bytes the packed weight has."""

    def call(self, x: Tensor, packed: Packed, bias: Tensor | None, activation: str) -> Tensor:
        """activation(x [..., i] @ W^T + bias) [..., o]."""
        return op(x, [packed.tensors[name] for name in self.tensors], bias, self.name, list(packed.shape), activation)

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
        """One call for x; where the rows make several results, they are split off and made contiguous."""
        given = [tensors[name] for name in self.tensors]
        result = graph.call_function(op, (x, given, bias, self.name, list(packed.shape), activation))
        if len(out_features) == 1:
            return [result]
        aten = torch.ops.aten
        parts = graph.call_function(aten.split_with_sizes_copy.default, (result, list(out_features), -1))
        return [graph.call_function(operator.getitem, (parts, j)) for j in range(len(out_features))]


def cannot_run(weight: Tensor) -> str:
    """Why no Triton kernel can take this weight; nothing if one can."""
    if why := cannot_run_on(weight.device):
        return why
    if weight.dtype not in FLOATS:
        return f"{weight.dtype} is neither float16 nor bfloat16"
    if weight.dim() != 2 or weight.numel() == 0:
        return f"the weight is {list(weight.shape)}, and no matrix with elements"
    return ""


def _multiply(
    x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, layout: str, shape: Sequence[int], activation: str
) -> Tensor:
    """activation(x [..., i] @ W^T + bias) [..., o]."""
    if layout not in _known:
        raise InputError(f"unknown layout {layout!r}", do=f"Use one of {tuple(_known)}.")
    if activation not in activations.NAMES:
        raise InputError(f"unknown activation {activation!r}", do=f"Use one of {activations.NAMES}.")
    o, i = shape
    if x.dim() < 1 or x.shape[-1] != i:
        raise InputError("packed_linear got activations of another size", why=f"x is {list(x.shape)}, i is {i}")
    kind = _known[layout]
    rows = x.reshape(-1, i)
    if rows.stride(1) != 1 and i > 1:
        rows = rows.clone(memory_format=torch.contiguous_format)
    if x.device.type == "cuda" and (kind.most is None or len(rows) <= kind.most):
        y = kind.launch(rows, packed, bias, (o, i), activation)
    else:
        y = activations.reference(F.linear(rows, kind.join(packed, (o, i)), bias), activation)
    return y.view(*x.shape[:-1], o)


def _shape(
    x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, layout: str, shape: Sequence[int], activation: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


_library.impl("packed_linear", _multiply, "CompositeExplicitAutograd")
torch.library.register_fake("fxprune::packed_linear", _shape, lib=_library)
