"""transposed: a transposed convolution as a plain one whose channels become places.

Row y * s + a of the result reads the inputs i with i * s - p + t * d = y * s + a, for taps t: of each remainder a the
taps t with a + p - t * d divisible by s, at i = y + (a + p - t * d) / s. So each remainder is a convolution of its own,
all over one window; where that has no tap for a remainder stands a zero, which costs nothing.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from fxprune.kernels.native.net import Taps


@dataclasses.dataclass(frozen=True)
class Transposed:
    """The plain convolution: its taps, into how many places its channels go, and how many of the last are left out.

    `taps_at[d]` has for dimension d (remainder, tap of the plain kernel, tap of the transposed one).
    """

    taps: Taps
    times: tuple[int, int]
    cut: tuple[int, int]
    taps_at: tuple[tuple[tuple[int, int, int], ...], ...]


def plain(taps: Taps, more: tuple[int, int]) -> Transposed | None:
    """The plain convolution for a transposed one of these taps and this output padding; None where there is none."""
    kernel, around, cut, taps_at = [], [], [], []
    for d in range(2):
        size, step, before, apart = taps.kernel[d], taps.stride[d], taps.padding[2 * d], taps.dilation[d]
        found = [(a, (a + before - t * apart) // step, t)
                 for a in range(step) for t in range(size) if (a + before - t * apart) % step == 0]  # fmt: skip
        first, last = min(at for _, at, _ in found), max(at for _, at, _ in found)
        # The result has `rest` more rows than step times those of the input; that is `rows` whole steps, less the cut.
        rest = apart * (size - 1) + 1 + more[d] - 2 * before - step
        rows = -(-rest // step)
        above, below = -first, rows + last
        if above < 0 or below < 0:
            return None
        kernel.append(last - first + 1)
        around += [above, below]
        cut.append(rows * step - rest)
        taps_at.append(tuple((a, at - first, t) for a, at, t in found))
    whole = Taps((kernel[0], kernel[1]), padding=(around[0], around[1], around[2], around[3]))
    return Transposed(whole, taps.stride, (cut[0], cut[1]), tuple(taps_at))


def plain_weight(weight: Tensor, groups: int, how: Transposed) -> Tensor:
    """The weight [o * th * tw, i, kh, kw] of the plain convolution, for a transposed one's [i, o / groups, kh, kw]."""
    i, each = weight.shape[:2]
    th, tw = how.times
    whole = weight.new_zeros(groups, each, th, tw, i, *how.taps.kernel)
    rows, columns = how.taps_at
    for group in range(groups):
        own = slice(group * (i // groups), (group + 1) * (i // groups))
        for a, down, t in rows:
            for b, right, u in columns:
                whole[group, :, a, b, own, down, right] = weight[own, :, t, u].t()
    return whole.reshape(groups * each * th * tw, i, *how.taps.kernel)
