"""admit: what transform accepts. Everything is looked at before anything is done, and nothing is changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxprune.errors import InputError
from fxprune.graph.environment import words_of

from .hooks import mask_hooks
from .several import Arguments, is_several
from .state import State, random_streams


def admit_model(model: object) -> None:
    """Raises InputError for what is no model, is in training mode, on meta, or has weights that are not finite."""
    if isinstance(model, ExportedProgram):
        _finite(dict(model.named_parameters()))
        return
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "cannot transform a model of TorchScript",
            where=model.original_name,
            why="torch.export takes no script or trace of a model",
            do="Pass the nn.Module that it was made from.",
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise InputError(
            "cannot transform a compiled model",
            where=type(model._orig_mod).__name__,
            why="torch.compile has wrapped it",
            do="Pass the model itself; fxprune compiles the result.",
        )
    if not isinstance(model, nn.Module):
        raise InputError(
            f"cannot transform a {type(model).__name__}",
            why="it is not a torch.nn.Module, GraphModule or ExportedProgram",
            do="Wrap a function in an nn.Module.",
        )
    # A parametrization registered after eval() says it is in training, and nobody thinks of it.
    training = [n or "the model" for n, module in model.named_modules() if module.training and not _parametrizes(n)]
    if training and not isinstance(model, torch.fx.GraphModule):
        more = f" and {len(training) - 3} more" if len(training) > 3 else ""
        raise in_training("transform", ", ".join(training[:3]) + more)
    _finite(dict(model.named_parameters()))


def in_training(do: str, where: str) -> InputError:
    """The error for a model in training mode, which nobody can `do` that to."""
    return InputError(
        f"cannot {do} a model in training mode",
        where=where,
        why="dropout and batch-norm would be captured as they behave in training",
        do="Call model.eval() first.",
    )


def _parametrizes(path: str) -> bool:
    return "parametrizations" in path.split(".")


def _finite(parameters: Mapping[str, Tensor]) -> None:
    meta = [name for name, p in parameters.items() if p.is_meta]
    if meta:
        raise InputError(
            "cannot transform a model on the meta device",
            where=f'"{meta[0]}"' + (f" and {len(meta) - 1} more" if len(meta) > 1 else ""),
            why="its weights have no values",
            do="Materialise it first: model.to_empty(device=...) and load a state_dict.",
        )
    for name, p in parameters.items():
        if p.is_floating_point() and p.numel() and p.dtype.itemsize > 1:
            low, high = torch.aminmax(p.detach())
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                bad = int((~torch.isfinite(p.detach())).sum())
                raise InputError(
                    "cannot transform a model with non-finite weights",
                    where=f'"{name}" {list(p.shape)}',
                    why=f"{bad} of {p.numel()} elements are NaN or infinite, and have no magnitude to rank",
                    do="Repair the checkpoint, or replace them: torch.nan_to_num.",
                )


def admit_calls(model: Any, args: Any, kwargs: Any) -> list[Arguments]:
    """The example calls as (args, kwargs): one, or those of a list. Raises InputError where something is no call."""
    return [admit_call(model, each, kwargs) for each in args] if is_several(args) else [admit_call(model, args, kwargs)]


def admit_call(model: Any, args: Any, kwargs: Any) -> Arguments:
    """The example call as (args, kwargs). Raises InputError where it is none."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputError("cannot read the example kwargs", why=f"they are a {type(kwargs).__name__}", do="Pass a dict.")
    if isinstance(args, Mapping):
        if not all(isinstance(name, str) for name in args) or args.keys() & (kwargs or {}).keys():
            raise InputError(
                "cannot read the example inputs",
                why="a dict holds arguments by name, and these are no names, or names that kwargs= has as well",
                do="A dict that is itself the first argument goes into a tuple: example_inputs=(inputs,).",
            )
        return (), {**args, **(kwargs or {})}
    if isinstance(args, Tensor):
        raise InputError(
            "cannot read the example inputs",
            why="they are one tensor, not a tuple of the call's arguments",
            do="Write example_inputs=(x,).",
        )
    if args is not None and not isinstance(args, (tuple, list)):
        raise InputError(
            "cannot read the example inputs",
            why=f"they are a {type(args).__name__}",
            do="Pass a tuple of arguments, a dict of them by name, or a list of several such calls.",
        )
    if args is None and kwargs is None and isinstance(model, ExportedProgram) and model.example_inputs is not None:
        args, kwargs = model.example_inputs
    return tuple(args or ()), dict(kwargs or {})


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[State]:
    """Puts back what calls of the model inside change: what is reached from it, global settings, random streams.

    The state, which is all but the streams, can be restored in between as well. Raises InputError where a weight
    changed that is too large to have been copied. Masks of torch.nn.utils.prune and of parametrizations, as large as
    weights, are taken for weights.
    """
    masks = set()
    for path, module in model.named_modules():
        names = {f"{hook._tensor_name}_mask" for hook in mask_hooks(module).values()}
        for name, buffer in module._buffers.items():
            if buffer is not None and (name in names or (buffer.dim() > 1 and _parametrizes(path))):
                masks.add(id(buffer))
    state, put_back = State(model, masks), random_streams()
    try:
        yield state
    finally:
        state.restore()
        put_back()
        state.check()


def runnable(model: Any) -> Any:
    """What runs a model: itself, or the module of an ExportedProgram."""
    return model.module() if isinstance(model, ExportedProgram) else model


def run_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The user's model on the example. Raises InputError with the model's own error as cause where it fails."""
    function = runnable(model)
    try:
        with torch.no_grad():
            return function(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(
            f"{list(t.shape)} {t.dtype} on {t.device}"
            for t in pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        )
        raise InputError(
            "cannot run the model on the example inputs",
            where=f"{type(model).__name__}({shapes or 'no tensors'})",
            why=f"it raises {words_of(error)}",
            do="Pass example_inputs= and kwargs= with which model(*example_inputs, **kwargs) works.",
        ) from error
