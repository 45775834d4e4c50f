"""pending: transform without example inputs. A GraphModule whose first call does the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxprune.errors import FxPruneError
from fxprune.graph import compat
from fxprune.plan.plan import Plan
from fxprune.select.candidates import candidates_without_graph
from fxprune.select.selection import Selection

from .pruned import PrunedModule
from .report import Report


class PendingModule(PrunedModule):
    """Becomes the transformed model at its first call, for that call's inputs; until then its report says pending."""

    @property
    def selection(self) -> Selection:
        """Nothing is selected yet: raises FxPruneError."""
        raise _refuse("read the selection of")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _become_result(self, args, kwargs)  # pyright: ignore[reportCallIssue]
        return self(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PendingModule:
        raise _refuse("copy")

    def __reduce__(self) -> tuple[Any, ...]:
        raise _refuse("save")


@torch.compiler.disable  # Inside a model that is compiled, Dynamo would trace the transform.
def _become_result(shell: PrunedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with compat.alone():
        if not isinstance(shell, PendingModule):
            return  # Another thread has done the work while this one waited.
        state = vars(shell)
        if state["_is_busy"]:
            raise FxPruneError(
                "cannot call this result inside its own first call",
                why="the model that it is made of calls it",
                do="Transform a model that does not hold the result.",
            )
        state["_is_busy"] = True
        try:
            result = state["_finish"](args, kwargs)
        finally:
            state["_is_busy"] = False
        # The object that the user holds turns into the result itself, so that nothing stays of the detour.
        object.__setattr__(shell, "__dict__", vars(result))
        object.__setattr__(shell, "__class__", type(result))


def pending(
    model: nn.Module,
    plan: Plan | None,
    later: Mapping[str, Any],
    transform: Callable[..., nn.Module],
) -> PendingModule:
    """A shell around `transform(model, plan, args, kwargs, **later)`. Errors in the plan's names surface here."""
    if plan is not None:
        plan.bind(candidates_without_graph(model))
    root = nn.Module()
    shell = PendingModule(root, torch.fx.Graph(), class_name="PendingModule")
    vars(shell)["_is_busy"] = False
    vars(shell)["_finish"] = lambda args, kwargs: transform(model, plan, args, kwargs, **later)
    shell.meta["report"] = Report(type(model).__name__, pending=True)
    return shell


def _refuse(what: str) -> FxPruneError:
    return FxPruneError(
        f"cannot {what} this result yet",
        why="it was made without example inputs and has not been called",
        do="Call it once, or pass example_inputs= to transform.",
    )
