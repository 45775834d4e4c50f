"""The bitmap layout: one bit an element and the nonzero values, for few tokens.

What lies beside the bits is another on each device: a GPU's threads want to know where each 64 columns begin, a CPU
reads on from the row's beginning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxprune.kernels.native import bitmap as native
from fxprune.kernels.triton import bitmap, operands

from .cpu import CpuLayout
from .gpu import GpuLayout
from .site import Packed, Site, Verdict

# Seconds of `predict` on one thread: bytes of the weight that a core reads in one, elements of the weight that are
# expanded, products of these with a token, and each call. Fitted on an AVX-512 server.
_BYTES_PER_SECOND = 12e9
_PER_ELEMENT = 0.08e-9
_PER_PRODUCT = 0.02e-9
_PER_CALL = 4e-6


class CpuBitmap(CpuLayout):
    """Pays from a third of zeros; `kernels.native.bitmap` has the format.

    A float32 weight that is one of bfloat16 or float16 in fact, as a model's is that was stored so, is stored so.
    """

    name = "bitmap"
    tensors = ("bits", "values", "rows")
    dtypes = native.DTYPES
    op = torch.ops.fxprune.bitmap_linear.default
    split_op = torch.ops.fxprune.bitmap_linear_split.default
    # With more, where products and not bytes take the time, other kernels have the better rate.
    most = 16

    def refuses(self, site: Site) -> str:
        """Sizes all of which have many tokens."""
        few = min(site.tokens, default=1) <= self.most
        return "" if few else f"its kernel is for up to {self.most} tokens"

    def pack(self, site: Site) -> Packed:
        """Its bits, values and rows."""
        weight = site.weight.detach().contiguous()
        stored = native.narrowed(weight)
        shape = (weight.shape[0], weight.shape[1])
        return Packed(self.name, shape, native.pack(stored)._asdict(), narrow=stored.dtype != weight.dtype)

    def unpack(self, packed: Packed) -> Tensor:
        """The weight [o, i], bit for bit as it was packed."""
        weight = native.unpack(native.Bitmap(*(packed.tensors[name] for name in self.tensors)))
        return native.widened(weight) if packed.narrow else weight

    def predict(self, site: Site, tokens: int) -> float:
        """Seconds of one call: the bytes of the weight, or its expansion and products where these take longer."""
        products = site.weight.numel() * (_PER_ELEMENT + tokens * _PER_PRODUCT)
        seconds = max(self.bytes_of(site.weight) / _BYTES_PER_SECOND, products)
        return _PER_CALL + seconds / torch.get_num_threads()

    def bytes_of(self, weight: Tensor) -> float:
        """A bit an element, 8 bytes a row, and the values."""
        size = native.narrowed(weight.detach().contiguous()).element_size()
        return weight.numel() / 8 + 8 * len(weight) + int(torch.count_nonzero(weight)) * size


class CudaBitmap(GpuLayout):
    """Pays from about half zeros; `triton_kernels.bitmap` has the format."""

    name = "bitmap"
    tensors = ("bits", "values", "starts", "ranks")
    most = 64

    def refuses(self, site: Site) -> str:
        """Rows too long to be ranked by 16 bits."""
        longest = int((operands.as_integers(site.weight) != 0).sum(1).max())
        return f"a row of {longest} nonzeros is too long" if longest > 65535 else ""

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Its bits, values, starts and ranks."""
        packed = bitmap.pack(weight)
        return packed.bits, packed.values, packed.starts, packed.ranks

    def join(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        """The weight."""
        packed = bitmap.Bitmap(shape, *tensors)
        return bitmap.unpack(packed) if tensors[0].is_cuda else bitmap.reference_unpack(packed)

    def launch(
        self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, shape: tuple[int, int], activation: str
    ) -> Tensor:
        """By `triton_kernels.bitmap`."""
        return bitmap.linear(x, bitmap.Bitmap(shape, *tensors), bias, activation)

    def bytes_of(self, weight: Tensor) -> float:
        """A bit an element, 2 bytes each 64 columns, 8 a row, and the values."""
        nonzeros = int(torch.count_nonzero(weight))
        return weight.numel() / 8 + weight.numel() / 32 + 8 * len(weight) + nonzeros * weight.element_size()


class Bitmap:
    """The one for the weight's device."""

    name = "bitmap"

    def __init__(self) -> None:
        self.cpu, self.cuda = CpuBitmap(), CudaBitmap()

    def on(self, device: torch.device) -> CpuBitmap | CudaBitmap:
        """The one whose kernel runs there; of other devices the CPU's says why none does."""
        return self.cuda if device.type == "cuda" else self.cpu

    def _of(self, packed: Packed) -> CpuBitmap | CudaBitmap:
        return self.cpu if set(packed.tensors) == set(self.cpu.tensors) else self.cuda

    def fits(self, site: Site) -> Verdict:
        """Whether `site` can be stored so, and if not why."""
        return self.on(site.weight.device).fits(site)

    def predict(self, site: Site, tokens: int) -> float:
        """Seconds of one call."""
        return self.on(site.weight.device).predict(site, tokens)

    def bytes_of(self, weight: Tensor) -> float:
        """About how many bytes the packed weight has."""
        return self.on(weight.device).bytes_of(weight)

    def pack(self, site: Site) -> Packed:
        """The weight in this layout."""
        return self.on(site.weight.device).pack(site)

    def unpack(self, packed: Packed) -> Tensor:
        """The weight [o, i], bit for bit as it was packed."""
        return self._of(packed).unpack(packed)

    def call(self, x: Tensor, packed: Packed, bias: Tensor | None, activation: str) -> Tensor:
        """activation(x [..., i] @ W^T + bias) [..., o]."""
        return self._of(packed).call(x, packed, bias, activation)

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
        """One call for x, and a node for each result."""
        return self._of(packed).lower(graph, packed, tensors, x, bias, activation, out_features)
