"""The tiles layout: a bf16 weight by one bit an element and its values, multiplied with a CPU's AMX tiles.

What it saves is bytes, and the time that a weight takes from memory; the arithmetic is that of a dense product. CPUs
without AMX whose AVX-512 expands bf16 (VBMI2) run it for few tokens, where bytes are what a product waits for.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxprune.kernels import native
from fxprune.kernels.native import tiles

from .site import Packed, Site, Verdict

# Seconds of `predict` on one thread: per tile of 512 elements that is expanded, per product of one with 16 tokens, per
# element of y, and per call. Fitted on a Sapphire Rapids server.
_PER_TILE = 20e-9
_PER_PRODUCT = 11e-9
_PER_RESULT = 0.15e-9
_PER_CALL = 5e-6
# Without AMX every token takes the time of a line again; measured to pay up to this many.
_MOST_WITHOUT_AMX = 8
_MOST_COLUMNS = 65536 * tiles.BLOCK


class TilesLayout:
    """Stores bits and values in the order of AMX tiles; expands them into tiles as it multiplies."""

    name = "tiles"
    op = torch.ops.fxprune.tiles_linear.default
    split_op = torch.ops.fxprune.tiles_linear_split.default

    def fits(self, site: Site) -> Verdict:
        """Whether `site` can be stored so, and if not why."""
        why = self._refuses(site)
        return Verdict(not why, why)

    def _refuses(self, site: Site) -> str:
        weight = site.weight
        if weight.dtype != torch.bfloat16:
            return f"{weight.dtype} is not bfloat16"
        if weight.device.type != "cpu":
            return f"the weight is on {weight.device}, the kernel runs on the CPU"
        if weight.dim() != 2 or weight.numel() == 0:
            return f"the weight is {list(weight.shape)}, and no matrix with elements"
        if weight.shape[1] > _MOST_COLUMNS:
            return f"{weight.shape[1]} columns are more than {_MOST_COLUMNS}"
        if site.activation not in native.ACTIVATIONS:
            return f"the kernel has no activation {site.activation!r}"
        if not native.status().available:
            return f"it has no kernel here: {native.status().detail}"
        isa = tiles.isa()
        if not isa:
            return "this CPU has no AMX, and no AVX-512 VBMI2 either"
        if isa != "AMX" and min(site.tokens, default=1) > _MOST_WITHOUT_AMX:
            return f"this CPU has no AMX, and without it the kernel is for up to {_MOST_WITHOUT_AMX} tokens"
        return ""

    def predict(self, site: Site, tokens: int) -> float:
        """Seconds of one call with `tokens` rows of x: expanding all tiles, or multiplying them if that is longer."""
        o, i = site.weight.shape
        count = 2 * -(-o // tiles.PANEL) * -(-i // tiles.BLOCK)
        work = count * max(_PER_TILE, tokens / 16 * _PER_PRODUCT) + tokens * o * _PER_RESULT
        return _PER_CALL + work / torch.get_num_threads()

    def bytes_of(self, weight: Tensor) -> float:
        """A bit for each element, and the values."""
        return weight.numel() / 8 + 2 * int(torch.count_nonzero(weight))

    def pack(self, site: Site) -> Packed:
        """The weight's nonzeros (elements with any bit set, so -0.0 too), ready for the kernel."""
        weight = site.weight.detach()
        return Packed(self.name, (weight.shape[0], weight.shape[1]), tiles.pack(weight)._asdict())

    def unpack(self, packed: Packed) -> Tensor:
        """The weight [o, i], bit for bit as it was packed."""
        return tiles.unpack(tiles.Tiles(**packed.tensors))

    def call(self, x: Tensor, packed: Packed, bias: Tensor | None = None, activation: str = "") -> Tensor:
        """activation(x [..., i] @ W^T + bias) [..., o]."""
        return self.op(x, *tiles.Tiles(**packed.tensors), bias, packed.shape[0], activation)

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
        operands = (x, *(tensors[name] for name in tiles.Tiles._fields), bias)
        if len(out_features) == 1:
            return [graph.call_function(self.op, (*operands, out_features[0], activation))]
        results = graph.call_function(self.split_op, (*operands, list(out_features), activation))
        return [graph.call_function(operator.getitem, (results, j)) for j in range(len(out_features))]
