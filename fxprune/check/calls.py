"""The calls that a result is tried on: the user's example, and others made from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.capture.capture import Capture
from fxprune.capture.entry import TensorInput


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of one call, with words that say what it is."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def copy(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that a model may write to: the tensors are copies with the same strides."""
        return pytree.tree_map(lambda leaf: _copy(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs))


def _copy(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return tensor.clone()
    # Elements of an expanded tensor share memory, so the memory is copied, not the elements.
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((span,), (1,)).clone()
    return memory.as_strided(tensor.shape, tensor.stride())


def second_call(call: Call, seed: int = 0) -> Call:
    """Another input of the same sizes: floats drawn anew around the example's mean and spread, other tensors shuffled.

    Each tensor is drawn by itself, also where the example hands in one tensor twice.
    """
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = pytree.tree_map(
        lambda leaf: _redraw(leaf, generator) if isinstance(leaf, Tensor) else leaf, (call.args, call.kwargs)
    )
    return Call("second input", args, kwargs)


def _redraw(leaf: Tensor, generator: torch.Generator) -> Tensor:
    if leaf.numel() == 0 or leaf.is_complex():
        return leaf
    if leaf.is_floating_point():
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        old = leaf.detach().double().cpu()
        # Infinities say where to look (an attention mask), so they stay.
        finite = old[torch.isfinite(old)]
        spread = float(finite.std()) if finite.numel() > 1 else 1.0
        drawn = noise * (spread or 1.0) + (float(finite.mean()) if finite.numel() else 0.0)
        fresh = torch.where(torch.isfinite(old), drawn, old).to(leaf.dtype).to(leaf.device)
        return _laid_out_as(leaf, fresh)
    order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
    return _laid_out_as(leaf, leaf.reshape(-1)[order].reshape(leaf.shape))


def turned_call(call: Call, seed: int = 0) -> Call | None:
    """The call with other values where a flag or a 0/1 mask has one value throughout; None where there is none.

    Shuffling such a tensor changes nothing, and whatever hangs on its other value would go unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    turned = False

    def turn(leaf: Any) -> Any:
        nonlocal turned
        if not isinstance(leaf, Tensor) or leaf.is_floating_point() or leaf.is_complex() or leaf.numel() < 2:
            return leaf
        if leaf.dtype != torch.bool and leaf.device.type != "cpu":
            # An index that a table does not have is an error on a CPU, and the end of the process on a GPU.
            return leaf
        first = int(leaf.flatten()[0])
        if first not in (0, 1) or bool((leaf != first).any()):
            return leaf
        turned = True
        coins = torch.rand(leaf.shape, generator=generator).to(leaf.device) < 0.5
        return _laid_out_as(leaf, torch.where(coins, 1 - first, first).to(leaf.dtype))

    args, kwargs = pytree.tree_map(turn, (call.args, call.kwargs))
    return Call("flags turned", args, kwargs) if turned else None


def _laid_out_as(example: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with its dimensions in memory in the order of the example's."""
    if example.layout is not torch.strided:
        return tensor
    order = sorted(range(example.dim()), key=lambda dim: -example.stride(dim))
    back = sorted(range(example.dim()), key=lambda place: order[place])
    return tensor.permute(order).contiguous().permute(back)


def restrided_call(call: Call) -> Call:
    """The same values in other strides: contiguous tensors transposed in memory, others contiguous."""

    def restride(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided or leaf.dim() == 0:
            return leaf
        if not leaf.is_contiguous():
            return leaf.contiguous()
        if leaf.dim() == 1:
            return torch.stack([leaf, leaf], dim=1)[:, 0]
        return leaf.transpose(-1, -2).contiguous().transpose(-1, -2)

    args, kwargs = pytree.tree_map(restride, (call.args, call.kwargs))
    return Call("other strides", args, kwargs)


def resized_call(capture: Capture, call: Call, only: str | None = None) -> Call | None:
    """The call at another size in every dynamic dimension, or in one, or None where no other size is allowed."""
    sizes = {symbol: size for symbol, size in dynamic_sizes(capture, call).items() if only in (None, symbol)}
    for change in (lambda n: n + 1, lambda n: 2 * n, lambda n: n - 1, lambda n: n // 2, lambda n: 4 * n):
        new = {symbol: change(size) for symbol, size in sizes.items()}
        if new and min(new.values()) >= 1 and new != sizes:
            resized = sized_call(capture, call, new, "second size")
            if resized is not None:
                return resized
    return None


def dynamic_sizes(capture: Capture, call: Call) -> dict[str, int]:
    """Symbol -> size, of every dynamic dimension of a call."""
    flat = capture.entry.flatten(call.args, call.kwargs)
    sizes: dict[str, int] = {}
    for want, got in zip(capture.entry.inputs, flat, strict=True):
        if isinstance(want, TensorInput):
            sizes.update({s: got.shape[d] for d, s in enumerate(want.sizes) if isinstance(s, str)})
    return sizes


def sized_call(capture: Capture, call: Call, sizes: Mapping[str, int], label: str) -> Call | None:
    """The call with other sizes in dynamic dimensions (symbol -> size), or None where they are not allowed."""
    resized = with_sizes(capture, call, sizes, label)
    return resized if capture.entry.takes(resized.args, resized.kwargs) else None


def with_sizes(capture: Capture, call: Call, sizes: Mapping[str, int], label: str) -> Call:
    """The call with other sizes in dynamic dimensions (symbol -> size), allowed or not."""
    flat = capture.entry.flatten(call.args, call.kwargs)
    leaves = iter(zip(capture.entry.inputs, flat, strict=True))

    def resize(_: Any) -> Any:
        want, example = next(leaves)
        if not isinstance(want, TensorInput):
            return example
        got = example
        for dim, size in enumerate(want.sizes):
            if isinstance(size, str) and size in sizes:
                got = got.index_select(dim, torch.arange(sizes[size], device=got.device) % got.shape[dim])
        return _laid_out_as(example, got)

    args, kwargs = pytree.tree_map(resize, (call.args, call.kwargs))
    shapes = ", ".join(str(list(t.shape)) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    return Call(f"{label} {shapes}", args, kwargs)
