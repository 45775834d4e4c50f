"""The nonzeros layout: a weight stored by its nonzero values and their 16-bit columns, for fp32 on the CPU.

Its tensors are those of `kernels.native.segments`, where `blocks` holds o, i, NB, Kb before the starts.

Kb is chosen for the number of tokens the site is tuned for; the result is right for any number. Few tensors and fewer
integers: at a call each costs 0.1 to 0.4 us, which small linears feel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.kernels import native
from fxprune.kernels.native import segments

from .cpu import CpuLayout
from .site import Packed, Site

# Seconds of `predict` on one thread: per nonzero and 8 tokens, per nonzero and tile of up to 64 tokens, per
# nonzero for a single token, per element of x and y transposed, and per call. Fitted on an AVX-512 server.
_PER_NONZERO_8 = 0.175e-9
_PER_NONZERO_TILE = 0.2e-9
_PER_NONZERO_1 = 0.28e-9
_PER_ELEMENT = 0.2e-9
_PER_CALL = 5e-6
_ROWS = 256


class Nonzeros(CpuLayout):
    """Stores every nonzero with its column; multiplies by broadcasting nonzeros over tokens."""

    name = "nonzeros"
    tensors = ("values", "columns", "order", "counts", "blocks")
    op = torch.ops.fxprune.nonzeros_linear.default
    split_op = torch.ops.fxprune.nonzeros_linear_split.default

    def predict(self, site: Site, tokens: int) -> float:
        """Seconds of one call with `tokens` rows of x: nonzeros at the kernel's rate, plus the transposes."""
        o, i = site.weight.shape
        nonzeros = int(torch.count_nonzero(site.weight))
        threads = torch.get_num_threads()
        if tokens == 1:
            return _PER_CALL + nonzeros * _PER_NONZERO_1 / threads
        per_nonzero = -(-tokens // 8) * _PER_NONZERO_8 + -(-tokens // 64) * _PER_NONZERO_TILE
        return _PER_CALL + (nonzeros * per_nonzero + tokens * (o + i) * _PER_ELEMENT) / threads

    def bytes_of(self, weight: Tensor) -> float:
        """A value and a column for each nonzero."""
        return 6 * int(torch.count_nonzero(weight))

    def pack(self, site: Site) -> Packed:
        """The weight's nonzeros (elements with any bit set, so -0.0 too), ready for the kernel."""
        weight = site.weight.detach().contiguous()
        o, i = weight.shape
        rows, k_block = _row_block(o), _k_block(weight, site.tokens)
        tensors = segments.pack(weight, rows, k_block)._asdict()
        tensors["blocks"] = torch.cat([torch.tensor([o, i, rows, k_block]), tensors.pop("starts")])
        return Packed(self.name, (o, i), tensors)

    def unpack(self, packed: Packed) -> Tensor:
        """The weight [o, i], bit for bit as it was packed."""
        return native.to_dense(*(packed.tensors[name] for name in self.tensors))


def _row_block(o: int) -> int:
    """Rows per block: about 256, and an even number of equal blocks, for two threads to share them."""
    if o < 32:
        return o
    blocks = 2 * -(-o // (2 * _ROWS))
    return _round_up(-(-o // blocks), 8)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _k_block(weight: Tensor, tokens: tuple[int, ...]) -> int:
    """Columns per block such that the activations of one tile stay near L1, for the largest number of tokens.

    Each block reads and writes every sum once more: a sparser weight, with less work per sum, takes larger
    blocks.
    """
    i = weight.shape[1]
    most = max(tokens, default=64)
    density = int(torch.count_nonzero(weight)) / weight.numel()
    if most <= 1:
        target = 32760  # The whole row, where its columns have 16 bits and a sign.
    elif most <= 8:
        target = 1024
    elif most <= 16:
        target = 512
    elif most <= 32:
        target = 256
    else:
        target = 128 if density > 0.25 else 192 if density > 0.07 else 384
    blocks = -(-i // target)
    return min(i, _round_up(-(-i // blocks), 8))
