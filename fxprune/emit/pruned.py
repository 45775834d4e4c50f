"""pruned: Program -> PrunedModule, the compiled torch.fx.GraphModule that transform returns."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxprune.capture.entry import EntryCheck
from fxprune.errors import FxPruneError
from fxprune.graph.program import Program, replace_tensors
from fxprune.select.selection import Selection

from .report import Report


class Result(torch.fx.GraphModule):
    """What is made of a model: the same call signature and output structure.

    Calls are checked against what the model was captured for; `forward` is the bare graph, without the check. `report`
    and `selection` live in `meta`, where they survive a deepcopy.
    """

    @property
    def report(self) -> Report:
        """What happened to every weight and group, why, how exact the result is and how fast."""
        return self.meta["report"]

    @property
    def selection(self) -> Selection:
        """What was kept, masked and replaced; `transform(model, selection=...)` replays it."""
        return self.meta["selection"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.meta["entry"].check(args, kwargs)
        return super().__call__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with warnings.catch_warnings():
            # torch deep-copies its own tree specs through a name it has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            return super().__deepcopy__(memo)


class PrunedModule(Result):
    """A pruned, compiled model, which runs under no_grad and in the captured precision, whatever stands outside."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), _without_autocast():
            return super().__call__(*args, **kwargs)

    def train(self, mode: bool = True) -> PrunedModule:
        if mode:
            raise FxPruneError(
                "cannot train this result",
                why="its masks are folded, its weights packed and its graph frozen for inference",
                do="Train the original model and transform again.",
            )
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedModule:
        result = super().__deepcopy__(memo)
        _compile(result)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, (state, *rest) = super().__reduce__()
        # What torch.compile made does not pickle; the loaded module compiles anew.
        state.pop("_compiled_call_impl", None)
        return _rebuild, (rebuild, (state, *rest))


def _without_autocast() -> contextlib.AbstractContextManager[object]:
    """Switches torch.autocast off where it is on: dense ops would follow it, and packed ones know float32 only."""
    active = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    if not active:
        return _NOTHING
    stack = contextlib.ExitStack()
    for device in active:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


_NOTHING = contextlib.nullcontext()


def _rebuild(rebuild: Callable[..., torch.fx.GraphModule], arguments: tuple[Any, ...]) -> PrunedModule:
    plain = rebuild(*arguments)
    result = PrunedModule(plain, plain.graph, class_name="PrunedModule")
    result.meta = arguments[0]["meta"]
    result.eval()
    _compile(result)
    return result


def emit(program: Program, entry: EntryCheck, compile_options: Mapping[str, Any] | None) -> PrunedModule:
    """A PrunedModule over the program's tensors, compiled lazily with torch.compile's arguments `compile_options`.

    None leaves it eager. The first call compiles.
    """
    for node in program.graph.nodes:
        # Fake values hold the capture's shape environment, which neither pickles nor is of use after emission.
        node.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    result = PrunedModule(program, program.graph, class_name="PrunedModule")
    result.graph._tracer_cls = None
    result._tracer_cls = None
    result.eval()
    # Parameters with gradients may be the user's own: over the same storage others without take their place.
    replace_tensors(
        result, lambda t: nn.Parameter(t.detach(), False) if isinstance(t, nn.Parameter) and t.requires_grad else t
    )
    result.meta = {"entry": entry, "compile": dict(compile_options) if compile_options is not None else None}
    _compile(result)
    return result


def own_storage(program: Program, theirs: set[int]) -> None:
    """Clones the parameters and buffers whose storage is among `theirs` (data pointers), once per tied tensor."""

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in theirs:
            return tensor
        clone = tensor.detach().clone()
        return nn.Parameter(clone, requires_grad=False) if isinstance(tensor, nn.Parameter) else clone

    replace_tensors(program, own)


def _compile(module: PrunedModule) -> None:
    if module.meta["compile"] is not None:
        # torch.compile takes entries out of the options it is given.
        module.compile(**copy.deepcopy(module.meta["compile"]))
