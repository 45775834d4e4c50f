"""The tiles layout: a bf16 weight by one bit an element and its values, multiplied with a CPU's AMX tiles.

What it saves is bytes, and the time that a weight takes from memory; the arithmetic is that of a dense product. CPUs
without AMX whose AVX-512 expands bf16 (VBMI2) run it for few tokens, where bytes are what a product waits for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.kernels import native
from fxprune.kernels.native import tiles

from .cpu import CpuLayout
from .site import Packed, Site

# Seconds of `predict` on one thread: per tile of 512 elements that is expanded, per product of one with 16 tokens, per
# element of y, and per call. Fitted on a Sapphire Rapids server.
_PER_TILE = 20e-9
_PER_PRODUCT = 11e-9
_PER_RESULT = 0.15e-9
_PER_CALL = 5e-6
# Without AMX every token takes the time of a line again; measured to pay up to this many.
_MOST_WITHOUT_AMX = 8
_MOST_COLUMNS = 65536 * tiles.BLOCK


class TilesLayout(CpuLayout):
    """Stores bits and values in the order of AMX tiles; expands them into tiles as it multiplies."""

    name = "tiles"
    tensors = tiles.Tiles._fields
    dtypes = (torch.bfloat16,)
    op = torch.ops.fxprune.tiles_linear.default
    split_op = torch.ops.fxprune.tiles_linear_split.default

    def refuses(self, site: Site) -> str:
        """Rows too long for 16 bits, and CPUs without the instructions."""
        if site.weight.shape[1] > _MOST_COLUMNS:
            return f"{site.weight.shape[1]} columns are more than {_MOST_COLUMNS}"
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
