"""Methods that choose single elements: none, random ones, the smallest, those of a given mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from fxprune.select.mask import PackedMask
from fxprune.select.score import magnitude as plain_magnitude
from fxprune.select.threshold import Shard

from .amount import _validate_pruning_amount_init, to_prune
from .errors import MissingError, WrongShapeError, WrongTypeError
from .masked import is_byte_float, masked, packed, unpacked_like, zeroed
from .method import BasePruningMethod


class Identity(BasePruningMethod, torch_prune.Identity):
    """Prunes nothing: the parameter gets its hook and a mask of ones."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask so far."""
        return default_mask

    @classmethod
    def apply(cls, module: nn.Module, name: str, *, model: nn.Module | None = None) -> Any:
        """Put a mask of ones on parameter `name`; see `identity`."""
        return cls._prune(module, name, model=model)


class Drawing(BasePruningMethod):
    """A method that draws what leaves from `generator`, or from torch's own."""

    def _draw_from(self, generator: torch.Generator | None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            why = f"generator={generator!r} is a {type(generator).__name__}, not a torch.Generator"
            raise WrongTypeError("cannot draw", why=why, do="Give torch.Generator().manual_seed(seed).")
        self.generator = generator

    def __getstate__(self) -> dict[str, Any]:
        """Without the generator, which cannot be pickled and which only a new mask needs."""
        return {**vars(self), "generator": None}


class RandomUnstructured(Drawing, torch_prune.RandomUnstructured):
    """Prunes `amount` of the elements at random, from `generator` or torch's own.

    A generator makes the draw that torch.manual_seed with its seed would; it is not kept in copies and saved hooks.
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float, *, generator: torch.Generator | None = None) -> None:
        _validate_pruning_amount_init(amount)
        self.amount = amount
        self._draw_from(generator)

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """t (any shape; its dtype and size matter) -> the mask so far without the elements drawn."""
        count = to_prune(self.amount, t.numel())
        if not count:
            return default_mask.clone()
        gone = torch.zeros(t.numel(), dtype=torch.bool, device=t.device)
        gone[draw(t.shape, t, self.generator).view(-1).topk(count).indices] = True
        return zeroed(default_mask, gone.view(t.shape))

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        amount: float,
        *,
        generator: torch.Generator | None = None,
        model: nn.Module | None = None,
    ) -> Any:
        """Prune `amount` of what remains of parameter `name`; see `random_unstructured`."""
        return cls._prune(module, name, (amount,), given(generator), model=model)


class L1Unstructured(BasePruningMethod, torch_prune.L1Unstructured):
    """Prunes the `amount` of elements that have the smallest magnitude.

    Args:
        amount: a float from 0 to 1, the share of what remains, rounded half to even; or an int, how many.

    NaN counts as the largest. Among equal magnitudes the lowest flat index goes first.
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float) -> None:
        _validate_pruning_amount_init(amount)
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """t (any shape) -> the mask so far without the elements of the smallest |t|."""
        count = to_prune(self.amount, t.numel())
        if not count or t.is_meta:
            return default_mask.clone()
        shard = Shard((t.detach(),), (None,), ranking((t,)))
        keep = shard.keep_all_but(count)[0]
        return zeroed(default_mask, ~keep.unpack())

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        amount: float,
        importance_scores: Tensor | None = None,
        *,
        model: nn.Module | None = None,
    ) -> Any:
        """Prune `amount` of what remains of parameter `name`; see `l1_unstructured`."""
        return cls._prune(module, name, (amount,), None, importance_scores, model=model)


class CustomFromMask(BasePruningMethod, torch_prune.CustomFromMask):
    """Prunes what is 0 in a given mask. A mask of 0 and 1 is held as one bit an element."""

    PRUNING_TYPE = "global"

    def __init__(self, mask: Tensor | PackedMask) -> None:
        self.mask = mask

    @property
    def mask(self) -> Tensor:
        """The mask, in the dtype that it was given in."""
        if isinstance(self._mask, PackedMask):
            return self._mask.unpack().to(self._dtype)
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | PackedMask) -> None:
        self._dtype = mask.dtype if isinstance(mask, Tensor) else torch.bool
        bits = packed(mask) if isinstance(mask, Tensor) else None
        self._mask = mask if bits is None else bits

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask so far times the given one; t is not looked at."""
        self._check(default_mask)
        mask = self.mask.to(default_mask.device)
        if is_byte_float(default_mask):
            return masked(default_mask, mask)
        return default_mask * mask.to(default_mask.dtype)

    @classmethod
    def apply(cls, module: nn.Module, name: str, mask: Tensor, *, model: nn.Module | None = None) -> Any:
        """Prune what is 0 in `mask`; see `custom_from_mask`."""
        return cls._prune(module, name, (mask,), model=model)

    def _mask_for(self, parameter: Tensor, start: Tensor | None) -> Tensor | None:
        self._check(parameter)
        if not isinstance(self._mask, PackedMask) or type(self).compute_mask is not CustomFromMask.compute_mask:
            return None
        return unpacked_like(self._mask, parameter, start)

    def _check(self, t: Tensor) -> None:
        if not isinstance(self._mask, (Tensor, PackedMask)):
            why = f"it is a {type(self._mask).__name__}, not a tensor"
            raise MissingError("cannot use a mask", why=why, do=f"Give a tensor of shape {list(t.shape)}.")
        if tuple(self._mask.shape) != tuple(t.shape):
            why = f"it has shape {list(self._mask.shape)}, the parameter {list(t.shape)}"
            raise WrongShapeError("cannot use a mask", why=why, do="Give a mask of the parameter's shape.")


def magnitude(piece: Tensor) -> Tensor:
    """|piece| [n] of numbers of any dtype, in one that ranks them exactly."""
    if piece.is_complex():
        return piece.abs()
    if not piece.is_floating_point():
        return piece.to(torch.int64).abs()
    return (piece.float() if is_byte_float(piece) else piece).abs()


def ranking(weights: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """What ranks these by magnitude: the plain one, which kernels know, where torch can take it of all of them."""
    plain = all(weight.is_floating_point() and not is_byte_float(weight) for weight in weights)
    return plain_magnitude if plain else magnitude


def draw(shape: tuple[int, ...] | torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers of `shape`, in the dtype and on the device of `like` where it is a float that can be drawn."""
    drawable = like.is_floating_point() and not is_byte_float(like)
    device = like.device if generator is None else generator.device
    dtype = like.dtype if drawable else torch.float32
    return torch.rand(shape, dtype=dtype, device=device, generator=generator).to(like.device)


def given(generator: torch.Generator | None) -> dict[str, Any]:
    """The keyword argument `generator`, passed on only if given: a user's subclass need not know it."""
    return {} if generator is None else {"generator": generator}
