"""save: a result, or a selection alone, as one safetensors file without code."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from fxprune.emit.pending import PendingModule
from fxprune.emit.pruned import PrunedModule
from fxprune.emit.trainable.module import TrainableModule
from fxprune.errors import FileError
from fxprune.graph.environment import VERSION
from fxprune.select.selection import Selection

from .container import write
from .graphs import graph_data
from .modules import module_data
from .packaged import write_package
from .plain import Writer
from .portable import portable
from .trees import tree_data

# What a tensor of a selection is called in a file, so that it is none of a result's own.
_ASIDE = "selection:"


def save(
    result: PrunedModule | TrainableModule | Selection,
    path: str | os.PathLike[str],
    *,
    compiled: bool = False,
    progress: bool = True,
) -> Path:
    """Writes what `transform`, `calibrate` or `recover` made to a safetensors file; returns its path.

    It holds the graph, what a call must be like, the selection, the plan, the report and the versions as JSON in the
    header, and weights as they are packed, under their own names: no pickle, no code. `load` needs neither the model's
    class nor example inputs. A selection alone is what to replay on a fresh copy of the model. The file at `path` is
    replaced when all is written.

    With `compiled` a package of AOTInductor, `<path>.aoti.pt2`, is written beside it: `load(path, compiled=True)` runs
    that and has nothing to compile, on a machine with the same processor and torch.

    Raises FileError for a result that has not been called yet, one that holds modules or hooks of the user's own, and
    for a place that cannot be written to.
    """
    writer = Writer(tree_data)
    if isinstance(result, Selection):
        document: dict[str, Any] = {"kind": "selection", "selection": writer.encode(result, _ASIDE)}
    elif isinstance(result, PendingModule):
        raise FileError(
            "cannot save this result yet",
            why="it was made without example inputs and has not been called, so that there is nothing to save",
            do="Call it once, or pass example_inputs= to transform.",
        )
    elif isinstance(result, (PrunedModule, TrainableModule)):
        document = _result(result, writer)
        if compiled:
            document["package"] = write_package(result, path, progress)
    else:
        raise FileError(
            f"cannot save a {type(result).__name__}",
            why="it is neither a result of transform nor a selection",
            do="A model of your own is saved by torch.save(model.state_dict(), path).",
        )
    versions = {"fxprune": VERSION, "torch": torch.__version__, "python": platform.python_version()}
    write(path, {**document, "versions": versions}, writer.tensors)
    return Path(path)


def _result(result: PrunedModule | TrainableModule, writer: Writer) -> dict[str, Any]:
    trains = isinstance(result, TrainableModule)
    program = portable(result)
    # Tensors of the module first, so that they have its names.
    document = {
        "kind": "trainable" if trains else "pruned",
        "modules": module_data(program, writer),
        "graph": graph_data(program.graph, writer),
        "entry": writer.encode(result.meta["entry"], "entry"),
        "report": writer.encode(result.report, "report:"),
        "selection": writer.encode(result.selection, _ASIDE),
        "settings": writer.encode(result.meta["settings"], "settings"),
        "plan": result.meta["plan"],
        "sizes": result.meta["sizes"],
    }
    if not trains:
        options = result.meta["compile"]
        # Options of a compiler are what runs commands, so none are taken from a file: these two say which they are.
        document["compile"] = None if options is None else {"freezing": bool(options.get("freezing"))}
    return document
