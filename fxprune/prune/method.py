"""What every pruning method is, and the container of those applied to one parameter in turn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from .attach import attach
from .combine import check_scores, combined
from .errors import InputError, MissingError, WrongShapeError, WrongTypeError, located
from .masked import is_byte_float, masked
from .place import Place, owners, place
from .undo import unchanged_on_failure


class BasePruningMethod(torch_prune.BasePruningMethod):
    """A way to choose a mask; an instance is the forward pre-hook that keeps one parameter pruned.

    A subclass sets PRUNING_TYPE ("unstructured", "structured" or "global") and computes the mask:

        class Threshold(prune.BasePruningMethod):
            PRUNING_TYPE = "unstructured"

            def __init__(self, least):
                self.least = least

            def compute_mask(self, t, default_mask):
                return default_mask * (t.abs() >= self.least)

        Threshold.apply(layer, "weight", 0.1)

    "unstructured": `t` is what remains, one dimension; "structured": the channels along self.dim that remain;
    "global": all of the parameter. On a parameter that was never pruned, `t` is the whole parameter in any case.
    """

    PRUNING_TYPE: str
    _tensor_name: str

    @abstractmethod
    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scores t and the mask so far (one shape) -> the mask, in that shape; subclasses say which."""

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The pruned parameter: `name_mask` times `name_orig` of the module, with its gradient."""
        name = self._name(module)
        return masked(getattr(module, f"{name}_orig"), getattr(module, f"{name}_mask"))

    @classmethod
    def apply(
        cls, module: nn.Module, name: str, *args: Any, importance_scores: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Prune parameter `name` of `module` by cls(*args, **kwargs); returns the hook that does it.

        importance_scores, of the parameter's shape, are ranked in its place. The module is as it was if this raises.
        """
        return cls._prune(module, name, args, kwargs, importance_scores)

    @classmethod
    def _prune(
        cls,
        module: nn.Module,
        name: str,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        scores: Tensor | None = None,
        *,
        model: nn.Module | None = None,
    ) -> torch_prune.BasePruningMethod:
        """As `apply`, at every place in `model` that holds the same (tied) parameter."""
        first = place(module, name)
        with located(first):
            method = cls(*args, **(kwargs or {}))
            return attach(method, [first] if model is None else owners(first, model), join, scores)

    def _mask_for(self, parameter: Tensor, start: Tensor | None) -> Tensor | None:
        """The mask in the layout of `parameter` after the mask `start`, from a method that needs no scores; or None."""
        return None

    def prune(self, t: Tensor, default_mask: Tensor | None = None, importance_scores: Tensor | None = None) -> Tensor:
        """A bare tensor t -> t times the mask of this method, from `default_mask` on (ones if None)."""
        if not isinstance(t, Tensor):
            raise WrongTypeError(_WHAT, why=f"it is a {type(t).__name__}, not a tensor", do="Give a tensor.")
        scores = t if importance_scores is None else importance_scores
        check_scores(scores, t, "the tensor")
        mask = torch.ones_like(t) if default_mask is None else default_mask
        mask = self.compute_mask(scores, default_mask=mask)
        return masked(t, mask) if is_byte_float(t) else t * mask

    def remove(self, module: nn.Module) -> None:
        """Make the pruning of `module` permanent: the parameter takes its name again, with zeros where masked.

        The hook itself stays; the function `remove` takes it away too.
        """
        name = self._name(module)
        with unchanged_on_failure([Place(module, name)]):
            value = self.apply_mask(module).detach()
            if hasattr(module, name):
                delattr(module, name)
            parameter = module._parameters.pop(f"{name}_orig")
            del module._buffers[f"{name}_mask"]
            if parameter is None:
                raise MissingError("cannot remove pruning", where=str(Place(module, name)), why="it has no parameter")
            before, parameter.data = parameter.data, value
            try:
                setattr(module, name, parameter)
            except BaseException:
                parameter.data = before
                raise

    def _name(self, module: nn.Module) -> str:
        name = getattr(self, "_tensor_name", _UNSET)
        if isinstance(name, str):
            return name
        kind = MissingError if name is _UNSET else WrongShapeError
        why = f"this {type(self).__name__} was not applied to any parameter"
        raise kind("cannot use a mask", where=type(module).__name__, why=why, do=f"Call {type(self).__name__}.apply.")


class PruningContainer(BasePruningMethod, torch_prune.PruningContainer):
    """The methods applied to one parameter, first to last; the newest decides about what the others left."""

    def __init__(self, *args: torch_prune.BasePruningMethod) -> None:
        self._pruning_methods: tuple[torch_prune.BasePruningMethod, ...] = ()
        if args:
            if not hasattr(args[0], "_tensor_name"):
                why = f"{args[0]!r} was not applied to any parameter"
                raise MissingError("cannot fill a container", why=why, do="Give methods that have a _tensor_name.")
            self._tensor_name = args[0]._tensor_name
        for method in args:
            self.add_pruning_method(method)

    def add_pruning_method(self, method: torch_prune.BasePruningMethod | None) -> None:
        """Put `method` last. A TypeError for what is no pruning method, a ValueError for another parameter's."""
        what = "cannot add to a container"
        if method is not None:
            if not isinstance(method, torch_prune.BasePruningMethod):
                why = f"{method!r} is a {type(method).__name__}, not a pruning method"
                raise WrongTypeError(what, why=why, do="Subclass BasePruningMethod.")
            for one, name in ((self, "the container"), (method, "the method")):
                if not hasattr(one, "_tensor_name"):
                    raise MissingError(what, why=f"{name} has no _tensor_name", do="Set it to the parameter's name.")
            if method._tensor_name != self._tensor_name:
                why = f'it prunes "{self._tensor_name}", the method "{method._tensor_name}"'
                raise InputError(what, why=why, do="A container holds the methods of one parameter.")
        self._pruning_methods += (method,)  # pyright: ignore[reportAttributeAccessIssue]

    def __len__(self) -> int:
        return len(self._pruning_methods)

    def __iter__(self) -> Iterator[torch_prune.BasePruningMethod]:
        return iter(self._pruning_methods)

    def __getitem__(self, idx: Any) -> Any:
        return self._pruning_methods[idx]

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Scores t and the mask so far (one shape) -> the mask with what the newest method takes of what remains.

        The result has the dtype of t; default_mask stays as it is.
        """
        return combined(self._pruning_methods[-1], t, default_mask)


def join(old: torch_prune.BasePruningMethod | None, method: torch_prune.BasePruningMethod) -> Any:
    """The hook for `method` after the hook `old`: alone, or last in a container, the old one if there was one."""
    if old is None:
        return method
    if not isinstance(old, torch_prune.PruningContainer):
        container = PruningContainer(old)
    elif type(old) is torch_prune.PruningContainer:
        container = PruningContainer()
        container._tensor_name, container._pruning_methods = old._tensor_name, old._pruning_methods
    else:
        container = old
    container.add_pruning_method(method)
    return container


_WHAT = "cannot prune a tensor"
_UNSET = object()
