"""export: a result as a file that others run: torch.export, AOTInductor in Python or C++, onnxruntime, OpenVINO."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxprune.capture import admit
from fxprune.capture.entry import EntryCheck, TensorInput
from fxprune.check.calls import Call
from fxprune.check.compare import refuse
from fxprune.emit.pending import PendingModule
from fxprune.emit.pruned import PrunedModule, Result
from fxprune.errors import FileError, FxPruneError, InputError
from fxprune.graph import compat

from .export_aoti import write_package
from .export_call import made_call
from .export_onnx import plain, write_onnx
from .exported import calls_to_hold, exported, held
from .writing import written

# format -> the suffix of its files. Without format= the first one of a suffix is meant.
FORMATS = {"pt2": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}


def export(
    result: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Writes what `transform` returned to a file that other runtimes load; returns the file's path.

    Without `format` the suffix says it: `.pt2` is "pt2", `.onnx` is "onnx". Sizes that are dynamic in the result stay
    so in each.

    - "pt2": a program of torch.export. `torch.export.load(path).module()` runs it in a process that has imported
      fxprune, packed weights as they are. It refuses what the result refuses of sizes.
    - "aoti": a package of AOTInductor: nothing is compiled when it starts. `torch._inductor.aoti_load_package(path)`
      runs it in a process that never imports fxprune, and `torch::inductor::AOTIModelPackageLoader` in C++: the
      kernels of packed weights are inside. They and the code are for this machine's processor (-march=native), this
      torch, and Linux. Sizes that it was not made for are not refused.
    - "onnx": for onnxruntime, OpenVINO and others. Inputs have the model's own argument names, outputs their keys or
      places, what is nested lies flat. ONNX has no packed weights: zeros are stored, and multiplied, as other numbers,
      so that only what has left for good makes it smaller; a warning says so. Needs `pip install fxprune[onnx]`.

    What loads a .pt2 file must know the classes of its outputs: import the module of transformers that has them first.

    A call is needed to trace; it is made from what the result knows of its inputs, unless `example_inputs` and `kwargs`
    are one (as for `transform`). What was written is held against the result on that call and at another size before
    it takes its place (ONNX where onnxruntime is installed). A file that was there is replaced whole, or stays.

    Raises InputError, FileError, CaptureError, BuildError or another FxPruneError.
    """
    kind = _format(path, format)
    module = _admitted(result, kind)
    entry: EntryCheck = module.meta["entry"]
    if example_inputs is None and kwargs is None:
        call = made_call(entry, module.meta.get("sizes"))
    else:
        call = Call("example", *admit.admit_call(module, example_inputs, kwargs))
        entry.check(call.args, call.kwargs)
    shown = None if progress else True
    with tqdm(total=2, desc=f"export {kind}", disable=shown, leave=False) as bar, written(path) as temporary:
        _write(module, kind, call, temporary, bar)
    return Path(path)


def _write(module: Result, kind: str, call: Call, temporary: Path, bar: Any) -> None:
    traced = plain(module) if kind == "onnx" else module
    program = exported(traced, call)
    bar.update()
    calls = calls_to_hold(module, call)
    if kind == "aoti":
        options = module.meta.get("compile") or {}
        write_package(program, temporary, options, lambda run: list(held("package = graph", module, calls, run)))
    elif kind == "onnx":
        write_onnx(program, temporary, module, calls)
    else:
        with compat.quiet_export():
            torch.export.save(program, temporary)
            loaded = torch.export.load(temporary).module()
        for row in held("exported = graph", module, calls, loaded):
            if not row.ok:
                raise refuse(row, "Please report it.")
    bar.update()


def _format(path: str | os.PathLike[str], format: str | None) -> str:
    suffix = Path(path).suffix.lower()
    if format is None:
        found = next((name for name, own in FORMATS.items() if own == suffix), None)
        if found is None:
            raise FileError(
                f'cannot tell the format of "{path}"',
                why=f"its suffix is {suffix!r}" if suffix else "it has no suffix",
                do=f"End the name in {' or '.join(dict.fromkeys(FORMATS.values()))}.",
            )
        return found
    if format not in FORMATS:
        near = difflib.get_close_matches(str(format), list(FORMATS), 1)
        raise InputError(
            f"unknown format {format!r}",
            do=f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(FORMATS)}.",
        )
    if FORMATS[format] != suffix:
        raise FileError(
            f'cannot write format {format!r} to "{path}"',
            why=f"what reads it wants a name that ends in {FORMATS[format]}",
            do=f'Name it "{Path(path).with_suffix(FORMATS[format])}".',
        )
    return format


def _admitted(result: Any, kind: str) -> Result:
    """The result, if it can be exported. Raises InputError or FxPruneError."""
    if not isinstance(result, Result):
        raise InputError(
            f"cannot export a {type(result).__name__}",
            why="it is not what fxprune.transform returns",
            do="Transform the model first: fxprune.export(fxprune.transform(model, plan, inputs), path).",
        )
    if isinstance(result, PendingModule):
        raise FxPruneError(
            "cannot export this result yet",
            why="it was made without example inputs and has not been called",
            do="Call it once, or pass example_inputs= to transform.",
        )
    if result.training and not isinstance(result, PrunedModule) and kind != "pt2":
        raise admit.in_training(f"export as {kind}", type(result).__name__)
    _refuse_inputs(result)
    return result


def _refuse_inputs(result: Result) -> None:
    entry: EntryCheck = result.meta["entry"]
    for path, want in zip(entry.paths, entry.inputs, strict=True):
        if isinstance(want, tuple) and want[0] == "type":
            raise InputError(
                "cannot export the result",
                where=path,
                why=f"it is any {want[1].__name__}, and a file takes tensors",
                do="Transform the model again with one value of it, or make it a tensor in the model.",
            )
    wanted = {want.device for want in entry.inputs if isinstance(want, TensorInput)}
    has = {t.device for t in pytree.tree_leaves([[*result.parameters()], [*result.buffers()]])}
    if wanted and has and not wanted & has:
        raise InputError(
            "cannot export the result",
            why=f"its weights are on {_words(has)}, and it was made for inputs on {_words(wanted)}",
            do=f"Move it back, result.to({str(min(wanted, key=str))!r}), or transform the model on the other device.",
        )


def _words(devices: set[torch.device]) -> str:
    return " and ".join(sorted(map(str, devices)))
