"""Ops over images and sequences: pooling, padding, resampling, shuffling of pixels and channels, sliding windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxprune.couple.axis import Axis, Conflict, Size, cut, divide

from .relation import Atoms, Dims, Here, Resize, carried, dimension, is_wide, of_self, relation, tensors

_WINDOW = "windows slide over it"


def _tie_leading(here: Here, outs: Any, x: Dims, spatial: int, why: str) -> None:
    """All but the last `spatial` dimensions stay; those freeze."""
    for out in outs if isinstance(outs, list) else [outs]:
        here.tie_or_freeze(x.axes, out.axes, range(len(x) - spatial, len(x)), why)


def _zero_of_pool(here: Here, out: Any, **a: Any) -> Atoms:
    # A second output holds positions, which are not zero.
    return set() if isinstance(out, list) else tensors(a.values())[0].zero & out.atoms()


def _pool(spatial: int, *ops: str) -> None:
    @relation(*ops, zero=_zero_of_pool)
    def pool(here: Here, out: Any, **a: Any) -> None:
        """* . -> * ."""
        _tie_leading(here, out, tensors(a.values())[0], spatial, _WINDOW)


for _n in (1, 2, 3):
    _pool(
        _n,
        *(f"{kind}{_n}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")),
        *(f"max_pool{_n}d_with_indices", f"_adaptive_avg_pool{_n}d")[: 2 if _n > 1 else 1],
    )
_pool(
    1, "upsample_nearest1d", "upsample_linear1d", "_upsample_nearest_exact1d", "reflection_pad1d", "replication_pad1d"
)
_pool(2, "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d",
      "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad2d", "replication_pad2d")  # fmt: skip
_pool(3, "upsample_nearest3d", "upsample_trilinear3d", "_upsample_nearest_exact3d", "reflection_pad3d",
      "replication_pad3d")  # fmt: skip


def _unpool(spatial: int, op: str) -> None:
    @relation(op, zero=of_self)
    def unpool(here: Here, out: Dims, self: Dims, indices: Dims, **_: Any) -> None:
        """* ., * . -> * ."""
        _tie_leading(here, out, self, spatial, _WINDOW)
        _tie_leading(here, out, indices, spatial, _WINDOW)


_unpool(2, "max_unpool2d")
_unpool(3, "max_unpool3d")


@relation(
    "grid_sampler", "grid_sampler_2d", "grid_sampler_3d", zero=lambda here, out, input, **_: input.zero & out.atoms()
)
def grid_sampler(here: Here, out: Dims, input: Dims, grid: Dims, **_: Any) -> None:
    """b c ., b . 2 -> b c ."""
    here.tie(input[0], out[0])
    here.tie(input[1], out[1])
    here.tie(grid[0], out[0])
    here.freeze_each((*input.axes[2:], *out.axes[2:], *grid.axes[1:]), "positions along it matter")


def _padding(self: Dims, pad: Sequence[Any]) -> list[tuple[int, Any, Any]]:
    """(dimension, before, after), as torch lists them from the last dimension backwards."""
    return [(len(self) - 1 - i, pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)]


def _padded(axis: Axis, x: Axis, before: Any, after: Any) -> list[Axis]:
    """`axis` as what stands before, the tensor, and what stands after. Raises Conflict."""
    if not isinstance(before, int) or not isinstance(after, int) or before < 0 or after < 0 or x.root().size.symbols:
        raise Conflict("a padding that is symbolic or negative")
    return cut(axis, [before, x.root().size.number, after])


def _resize_pad(sizes: Resize, out: Dims, self: Dims, pad: Sequence[Any], **_: Any) -> dict[str, Any]:
    new = list(pad)
    for i, (dim, before, after) in enumerate(_padding(self, pad)):
        if (before or after) and sizes.changed(out[dim]):
            left, _middle, right = _padded(out[dim], self[dim], before, after)
            new[2 * i], new[2 * i + 1] = sizes.number(left), sizes.number(right)
    return {"pad": new}


def _zero_of_pad(here: Here, out: Dims, self: Dims, mode: str = "constant", value: Any = None, **_: Any) -> Atoms:
    kept = self.zero & out.atoms()
    if mode != "constant":
        return kept
    # Another value than zero stands beside the indices of every dimension.
    return set() if value else kept | (out.atoms() - self.atoms())


@relation("pad", "constant_pad_nd", zero=_zero_of_pad, resize=_resize_pad)
def pad_(here: Here, out: Dims, self: Dims, pad: Sequence[Any], mode: str = "constant", **_: Any) -> None:
    """a value before and after some dimensions, of which each becomes a concatenation"""
    padded = {dim: (before, after) for dim, before, after in _padding(self, pad)}
    for dim, (x, y) in enumerate(zip(self.axes, out.axes)):
        before, after = padded.get(dim, (0, 0))
        if isinstance(before, int) and isinstance(after, int) and not before and not after:
            here.tie(x, y)
            continue
        try:
            if mode != "constant":
                raise Conflict("a padding that repeats what it pads")
            here.tie(_padded(y, x, before, after)[1], x)
        except Conflict as conflict:
            here.freeze_each((x, y), str(conflict))


def _tie_divided(here: Here, whole: Axis, parts: Sequence[Size], major: Axis) -> None:
    """The outermost part of an axis is `major`, and the inner ones freeze."""
    try:
        first, *rest = divide(whole, parts, here.name)
        here.tie(first, major)
        here.freeze_each(rest, "positions along it matter")
    except Conflict as conflict:
        here.freeze_each((whole, major), str(conflict))


def _tie_pixels(here: Here, wide: Dims, narrow: Dims, factor: int) -> None:
    """The channels of `wide` are those of `narrow`, each as many times as a pixel of it has places."""
    here.tie_rows(wide.axes[:-3], narrow.axes[:-3])
    _tie_divided(here, wide[-3], [narrow[-3].root().size, Size(factor), Size(factor)], narrow[-3])
    here.freeze_each((*wide.axes[-2:], *narrow.axes[-2:]), "positions along it matter")


@relation("pixel_shuffle", zero=carried)
def pixel_shuffle(here: Here, out: Dims, self: Dims, upscale_factor: int, **_: Any) -> None:
    """* (c r r) h w -> * c (h r) (w r)"""
    _tie_pixels(here, self, out, upscale_factor)


@relation("pixel_unshuffle", zero=carried)
def pixel_unshuffle(here: Here, out: Dims, self: Dims, downscale_factor: int, **_: Any) -> None:
    """* c (h r) (w r) -> * (c r r) h w"""
    _tie_pixels(here, out, self, downscale_factor)


def _shuffled(self: Dims, out: Dims, groups: int, where: str) -> tuple[list[Axis], list[Axis]]:
    size = self[1].root().size
    each = Size(size.number // groups)
    return divide(self[1], [Size(groups), each], where), divide(out[1], [each, Size(groups)], where)


def _resize_shuffle(sizes: Resize, out: Dims, self: Dims, groups: int, **_: Any) -> dict[str, Any]:
    return {"groups": sizes.number(_shuffled(self, out, groups, "")[0][0])} if sizes.changed(self[1]) else {}


@relation("channel_shuffle", "native_channel_shuffle", zero=carried, resize=_resize_shuffle)
def channel_shuffle(here: Here, out: Dims, self: Dims, groups: int, **_: Any) -> None:
    """b (g c) * -> b (c g) *"""
    here.tie_rows(self.axes, out.axes, besides=[1])
    try:
        (group, each), (each_out, group_out) = _shuffled(self, out, groups, here.name)
        here.tie(group, group_out)
        here.tie(each, each_out)
    except Conflict as conflict:
        here.freeze_each((self[1], out[1]), str(conflict))


def _tie_columns(here: Here, image: Dims, columns: Dims) -> None:
    """The rows of `columns` are the channels of an image, each as many times as a window has places."""
    here.tie_rows(image.axes[:-3], columns.axes[:-2])
    over = columns[-2].root().size.over(image[-3].root().size)
    _tie_divided(here, columns[-2], [image[-3].root().size, over or Size(1)], image[-3])
    here.freeze_each((*image.axes[-2:], columns[-1]), _WINDOW)


@relation("im2col", zero=of_self)
def im2col(here: Here, out: Dims, self: Dims, **_: Any) -> None:
    """b? c h w -> b? (c k k) l"""
    _tie_columns(here, self, out)


@relation("col2im", zero=of_self)
def col2im(here: Here, out: Dims, self: Dims, **_: Any) -> None:
    """b? (c k k) l -> b? c h w"""
    _tie_columns(here, out, self)


@relation("unfold", zero=of_self)
def unfold(here: Here, out: Dims, self: Dims, **a: Any) -> None:
    """windows along a dimension, which become a last dimension"""
    at = dimension(a["dimension"], self)
    for i, (x, y) in enumerate(zip(self.axes, out.axes)):
        if i != at:
            here.tie(x, y)
        elif is_wide(x):
            here.freeze_each((x, y), _WINDOW)
    here.freeze(out[-1], _WINDOW)
