"""tiles: how wide the tiles of a map are, and how a weight is cut into blocks, for the CPU at hand."""

from __future__ import annotations

from functools import cache
from math import ceil

from fxprune.kernels import native
from fxprune.kernels.native.net import TILES, Taps

# Bytes of a block of activations: what a core's nearest cache holds beside the weights that stream through it.
BLOCK_BYTES = 40 << 10
_LANES = {"AVX-512": 16, "AVX2": 8, "NEON": 4}


def lanes() -> int:
    """Floats of a vector of the kernels; that of AVX2 where none run."""
    return _LANES.get(native.status().isa, 8)


@cache
def tile_for(height: int, width: int) -> int:
    """The width of tiles on which a map of one image costs least.

    A nonzero costs two loads, its own and its offset, and one for each vector of the tile, of which a core does two at
    a time. Where two widths cost the same within a twentieth, that whose rows are finer is taken: fewer bytes are kept
    where steps are run depth first.
    """

    def cost(tile: int) -> tuple[float, int]:
        return min(
            (ceil(height / ly) * ceil(ceil(width / lx) / tile) * (tile + 2), -ceil(height / ly)) for ly, lx in _grids()
        )

    least = min(cost(tile)[0] for tile in TILES)
    alike = [tile for tile in TILES if cost(tile)[0] <= least * 1.05]
    return min(alike, key=lambda tile: (cost(tile)[1], cost(tile)[0], -tile))


def _grids() -> list[tuple[int, int]]:
    return [(ly, lx) for ly in range(1, lanes() + 1) for lx in range(1, lanes() // ly + 1)]


def k_block(taps: Taps, tile: int, channels: int) -> int:
    """Channels whose block stays near the core, in equal parts."""
    most = max(1, BLOCK_BYTES // (taps.places(tile) * lanes() * 4))
    parts = -(-channels // most)
    return -(-channels // parts)


def row_block(rows: int) -> int:
    """Rows of a weight that go together: few enough for threads to share them, enough to be sorted by their counts."""
    return min(256, max(16, -(-rows // 32) * 8), rows)
