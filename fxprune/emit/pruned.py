"""emit: Program -> PrunedModule, the compiled torch.fx.GraphModule that transform returns."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from fxprune.capture.entry import EntryCheck
from fxprune.errors import FxPruneError
from fxprune.graph.program import Program
from fxprune.select.selection import Selection

from .report import Report


class PrunedModule(torch.fx.GraphModule):
    """A pruned, compiled model: the same call signature and output structure as the model it came from.

    Calls are checked against what the model was captured for, and run under no_grad and in the captured precision,
    whatever torch.autocast says outside. `report` and `selection` live in `meta`, where they survive a deepcopy.
    `forward` is the bare graph, without the check.
    """

    @property
    def report(self) -> Report:
        """What happened to every weight, why, how exact the result is and how fast."""
        return self.meta["report"]

    @property
    def selection(self) -> Selection:
        """The masks (and values) that were applied; `transform(model, selection=...)` replays them."""
        return self.meta["selection"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.meta["entry"].check(args, kwargs)
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
        with warnings.catch_warnings():
            # torch deep-copies its own tree specs through a name it has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            result = cast(PrunedModule, super().__deepcopy__(memo))
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
    _drop_gradients(result)
    result.meta = {"entry": entry, "compile": dict(compile_options) if compile_options is not None else None}
    _compile(result)
    return result


def _drop_gradients(module: nn.Module) -> None:
    """Puts parameters without gradients in place of those with, over the same storage: they may be the user's own."""
    fresh: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and old.requires_grad:
                if id(old) not in fresh:
                    fresh[id(old)] = nn.Parameter(old.detach(), requires_grad=False)
                part._parameters[name] = fresh[id(old)]


def own_storage(program: Program, theirs: set[int]) -> None:
    """Clones the parameters and buffers whose storage is among `theirs` (data pointers), once per tied tensor."""
    clones: dict[int, torch.Tensor] = {}
    for module in program.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or tensor.data_ptr() not in theirs:
                    continue
                if id(tensor) not in clones:
                    own = tensor.detach().clone()
                    parameter = isinstance(tensor, nn.Parameter)
                    clones[id(tensor)] = nn.Parameter(own, requires_grad=False) if parameter else own
                table[name] = clones[id(tensor)]  # pyright: ignore[reportArgumentType]


def _compile(module: PrunedModule) -> None:
    if module.meta["compile"] is not None:
        # torch.compile takes entries out of the options it is given.
        module.compile(**copy.deepcopy(module.meta["compile"]))
