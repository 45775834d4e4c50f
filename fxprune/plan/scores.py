"""Scores as a plan knows them: their names, functions, and values that were computed beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from fxprune.errors import InputError

Score = Callable[[Tensor], Tensor]

# What a plan can name and save; `fxprune.select.score` and `unit_score` have the arithmetic. Of elements, and of units.
SCORE_NAMES = ("l1", "l2", "random", "lamp")
UNIT_SCORE_NAMES = ("norm", "random", "bn_scale", "fpgm", "lamp")


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


def score_name(score: str | Score | Scores) -> str:
    """What a plan and messages call a score."""
    if isinstance(score, str):
        return score
    return score.method if isinstance(score, Scores) else getattr(score, "__name__", "a function")


def _where(name: str, weight: Tensor) -> str:
    return f'"{name}" {list(weight.shape)}'
