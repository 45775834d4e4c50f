"""How important each element of a weight is: the least important go first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .errors import InputError
from .mask import chunks
from .threshold import magnitude

Score = Callable[[Tensor], Tensor]


class Scores(Mapping[str, Tensor]):
    """Importances that were computed beforehand: parameter name -> a float tensor of the parameter's shape.

    `signed` says that the values are contributions with a sign: a set of elements is worth the magnitude of their sum,
    one element its own magnitude. Without it they are importances, which must not be negative. `method` is the name
    that plans and messages call them by. Two Scores are equal where they are one object. Raises InputError for anything
    but names and float tensors.
    """

    def __init__(self, values: Mapping[str, Tensor], *, signed: bool = False, method: str = "given scores") -> None:
        given = dict(values) if isinstance(values, Mapping) else None
        wrong = f"they are a {type(values).__name__}"
        for name, value in (given or {}).items():
            if not isinstance(name, str) or not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                given, wrong = None, f"under {name!r} they hold {kind}"
                break
        if given is None:
            raise InputError(
                "cannot use these as scores",
                where="Scores(...)",
                why=wrong,
                do="Give a mapping from parameter names to float tensors of the parameters' shapes.",
            )
        self._values = {name: value.detach() for name, value in given.items()}
        self.signed, self.method = signed, method

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    # A plan compares its rules and hashes them; tensors answer == with a tensor.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"Scores({self.method}, {len(self)} parameters)"

    def of(self, name: str, weight: Tensor) -> Tensor:
        """The values of parameter `name`, on the device of `weight`. Raises InputError where none fit."""
        found = self._values.get(name)
        why = f"they have none of this name; they have {len(self)} others"
        if found is not None:
            if found.shape == weight.shape:
                return found.to(weight.device)
            why = f"they have shape {list(found.shape)}, the weight {list(weight.shape)}"
        raise InputError(
            f"cannot use the scores of {self.method}",
            where=_where(name, weight),
            why=why,
            do="Compute them on this model, for every parameter that the rule binds.",
        )

    def by_module(self, model: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
        """The importance of each element by (module, parameter name), as `importance_scores` of global_unstructured.

        `model` is the one that they were computed on. Raises InputError where it has no such module.
        """
        result: dict[tuple[nn.Module, str], Tensor] = {}
        for name, value in self._values.items():
            path, _, own = name.rpartition(".")
            try:
                module = model.get_submodule(path)
            except AttributeError as error:
                raise InputError(
                    f"cannot use the scores of {self.method}",
                    where=f'"{name}" {list(value.shape)}',
                    why=f'{type(model).__name__} has no module "{path}"',
                    do="Pass the model that they were computed on.",
                ) from error
            result[module, own] = value.abs() if self.signed else value
        return result


def random(weight: Tensor) -> Tensor:
    """Scores drawn evenly from [0, 1), float32, in the weight's shape.

    They come from torch's own generator of the weight's device, so torch.manual_seed decides them.

    Source: Gale et al., "The State of Sparsity in Deep Neural Networks", 2019 (random pruning as the baseline).
    """
    return torch.rand(weight.shape, dtype=torch.float32, device=weight.device)


def lamp(weight: Tensor) -> Tensor:
    """w^2 over the sum of the squares that are not smaller, in the weight's shape, float64, from 0 to 1.

    Within one weight the order is that of the magnitude; it is made for scope="global", where it settles how much each
    weight loses: the largest element of every weight has score 1.

    Source: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021.
    """
    return shares_of_the_rest(weight.detach().double().abs().reshape(-1)).view(weight.shape)


def shares_of_the_rest(magnitudes: Tensor) -> Tensor:
    """LAMP of magnitudes [n], float64: each one's square over the sum of its own and of all that come after it.

    They are in ascending order, equal ones by index.
    """
    if not magnitudes.numel():
        return magnitudes
    largest = magnitudes.max()
    # Only proportions matter, and a square over the largest neither overflows nor loses what counts.
    ascending, order = torch.sort(magnitudes / largest.where(largest > 0, 1.0), stable=True)
    squares = ascending.square_()
    rest = squares.flip(0).cumsum(0).flip(0)
    return torch.empty_like(magnitudes).index_put_((order,), squares / rest.where(rest > 0, 1.0))


# Scores of elements that a plan can name and save. The Lp norm of a single number is its magnitude for every p.
SCORES: dict[str, Score] = {"l1": magnitude, "l2": magnitude, "random": random, "lamp": lamp}
# Those of them that may be computed piece by piece; the others look at a weight as a whole, once.
PIECEWISE = frozenset({"l1", "l2"})


def score_name(score: str | Score | Scores) -> str:
    """What a plan and messages call a score."""
    if isinstance(score, str):
        return score
    return score.method if isinstance(score, Scores) else getattr(score, "__name__", "a function")


def check_weight(name: str, weight: Tensor) -> None:
    """Raise InputError unless `weight` (any shape) holds finite floating-point values that can be read."""
    if not weight.is_floating_point():
        raise InputError(
            "cannot score a weight",
            where=_where(name, weight),
            why=f"{weight.dtype} is not floating point",
            do=f'Exclude it: Plan(..., exclude=["{name}"]).',
        )
    if weight.is_meta:
        raise InputError(
            "cannot score a weight",
            where=_where(name, weight),
            why="it is on the meta device and has no values",
            do="Load the model's weights first.",
        )
    if not _bounds_are_finite(weight):
        raise InputError(
            "cannot score a weight",
            where=_where(name, weight),
            why="it holds NaN or infinity",
            do="Repair the weight: a threshold among such values means nothing.",
        )


def scores(name: str, weight: Tensor, score: str | Score | Scores) -> Tensor:
    """The scores of `weight`, by name, by function or given -> finite non-negative floats, its shape and device.

    Raises InputError where a function answers with anything else, and where given scores do not fit.
    """
    with torch.no_grad():
        if isinstance(score, Scores):
            found = score.of(name, weight).abs() if score.signed else score.of(name, weight)
        else:
            found = (SCORES[score] if isinstance(score, str) else score)(weight)
    where = _where(name, weight)
    what = f"cannot use the scores of {score_name(score)}"
    if not isinstance(found, Tensor):
        why = f"it returned {type(found).__name__}, not a tensor"
        raise InputError(what, where=where, why=why, do=_CONTRACT)
    if found.shape != weight.shape:
        why = f"they have shape {list(found.shape)}, the weight {list(weight.shape)}"
        raise InputError(what, where=where, why=why, do=_CONTRACT)
    if not found.is_floating_point():
        raise InputError(what, where=where, why=f"they are {found.dtype}", do=_CONTRACT)
    if found.device != weight.device:
        why = f"they are on {found.device}, the weight on {weight.device}"
        raise InputError(what, where=where, why=why, do=_CONTRACT)
    if not _bounds_are_finite(found):
        raise InputError(what, where=where, why="some are NaN or infinite", do=_CONTRACT)
    if any(bool((piece < 0).any()) for piece in chunks(found)):
        raise InputError(what, where=where, why="some are negative", do=_CONTRACT)
    return found.detach()


_CONTRACT = "A score maps a weight to one finite, non-negative float for each element; the smallest go first."


def _bounds_are_finite(tensor: Tensor) -> bool:
    # min and max carry NaN along, so two numbers speak for a piece; torch has neither for fp8
    for piece in chunks(tensor.detach()):
        low, high = (piece.float() if piece.dtype.itemsize == 1 else piece).aminmax()
        if not (bool(low.isfinite()) and bool(high.isfinite())):
            return False
    return True


def _where(name: str, weight: Tensor) -> str:
    return f'"{name}" {list(weight.shape)}'
