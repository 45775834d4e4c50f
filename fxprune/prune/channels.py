"""Methods that choose whole channels: random ones, those of the lowest norm."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from .amount import _validate_pruning_amount_init, _validate_pruning_dim, _validate_structured_pruning, to_prune
from .bias import bias_places, prune_biases
from .combine import alive
from .elements import Drawing, given
from .errors import located
from .masked import zeroed
from .method import BasePruningMethod
from .norm import _compute_norm, check_norm, lowest
from .place import owners, place, start_mask
from .undo import unchanged_on_failure


class ByChannel(BasePruningMethod):
    """A method that takes `amount` of the channels along `dim`."""

    PRUNING_TYPE = "structured"
    amount: float
    dim: int

    @abstractmethod
    def _scores(self, t: Tensor) -> Tensor:
        """t -> [t.shape[dim]], the lowest of which go."""

    def _without_lowest(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """t (two or more dims) -> the mask so far without the channels of the lowest scores."""
        _validate_structured_pruning(t)
        _validate_pruning_dim(t, self.dim)
        axis = range(t.dim())[self.dim]
        count = to_prune(self.amount, t.shape[axis])
        if not count:
            return default_mask.clone()
        with torch.no_grad():
            scores = self._scores(t.detach()).to(default_mask.device)
        gone = torch.zeros(t.shape[axis], dtype=torch.bool, device=default_mask.device)
        gone[lowest(scores, count)] = True
        return zeroed(default_mask, gone.view([-1 if d == axis else 1 for d in range(t.dim())]))

    @classmethod
    def _prune_channels(
        cls,
        module: nn.Module,
        name: str,
        kwargs: dict[str, Any],
        scores: Tensor | None,
        model: nn.Module | None,
        include_bias: bool,
    ) -> Any:
        if not include_bias:
            return cls._prune(module, name, (), kwargs, scores, model=model)
        first = place(module, name)
        with located(first):
            _validate_structured_pruning(first.value())
            _validate_pruning_dim(first.value(), kwargs["dim"])
        axis = range(first.value().dim())[kwargs["dim"]]
        places = [first] if model is None else owners(first, model)
        biases = bias_places(places, axis)
        with unchanged_on_failure([*places, *biases]):
            before = start_mask(places)
            hook = cls._prune(module, name, (), kwargs, scores, model=model)
            after = first.mask()
            if after is not None:
                gone = ~alive(after, axis)
                prune_biases(biases, gone if before is None else gone & alive(before, axis))
        return hook


class RandomStructured(Drawing, ByChannel, torch_prune.RandomStructured):
    """Prunes `amount` of the channels along `dim` at random, from `generator` or torch's own."""

    def __init__(self, amount: float, dim: int = -1, *, generator: torch.Generator | None = None) -> None:
        _validate_pruning_amount_init(amount)
        self.amount = amount
        self.dim = dim
        self._draw_from(generator)

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """t (two or more dims) -> the mask so far without the channels drawn."""
        return self._without_lowest(t, default_mask)

    def _scores(self, t: Tensor) -> Tensor:
        device = "cpu" if self.generator is None else self.generator.device
        return torch.rand(t.shape[self.dim], generator=self.generator, device=device)

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        amount: float,
        dim: int = -1,
        *,
        generator: torch.Generator | None = None,
        include_bias: bool = False,
        model: nn.Module | None = None,
    ) -> Any:
        """Prune `amount` of the remaining channels of parameter `name`; see `random_structured`."""
        kwargs = {"amount": amount, "dim": dim, **given(generator)}
        return cls._prune_channels(module, name, kwargs, None, model, include_bias)


class LnStructured(ByChannel, torch_prune.LnStructured):
    """Prunes the `amount` of channels along `dim` that have the lowest norm.

    Args:
        amount: a float from 0 to 1, the share of the channels that remain, rounded half to even; or an int, how many.
        n: p of the norm: any number, inf, -inf, 'fro' (the 2-norm), 'nuc' (the sum of singular values; a channel of
            three or more dims is taken as the matrix [first, rest], one of one dim as a matrix of one row).
        dim: along which the channels lie, -1 by default.

    NaN counts as the largest. Among equal norms the lowest index goes first.
    """

    def __init__(self, amount: float, n: float | str, dim: int = -1) -> None:
        _validate_pruning_amount_init(amount)
        self.amount = amount
        self.n = n
        self.dim = dim

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """t (two or more dims) -> the mask so far without the channels of the lowest norm of t."""
        check_norm(self.n)
        return self._without_lowest(t, default_mask)

    def _scores(self, t: Tensor) -> Tensor:
        return _compute_norm(t, self.n, self.dim)

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        amount: float,
        n: float | str,
        dim: int,
        importance_scores: Tensor | None = None,
        *,
        include_bias: bool = False,
        model: nn.Module | None = None,
    ) -> Any:
        """Prune `amount` of the remaining channels of parameter `name`; see `ln_structured`."""
        kwargs = {"amount": amount, "n": n, "dim": dim}
        return cls._prune_channels(module, name, kwargs, importance_scores, model, include_bias)
