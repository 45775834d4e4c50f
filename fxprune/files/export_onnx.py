"""export_onnx: an ExportedProgram -> an ONNX file."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxprune.capture.entry import EntryCheck, TensorInput
from fxprune.check.calls import Call
from fxprune.check.compare import refuse
from fxprune.emit.compiled import returned
from fxprune.emit.pruned import Result, emit
from fxprune.errors import FxPruneError, InputError, warn_once
from fxprune.graph import compat
from fxprune.graph.environment import words_of
from fxprune.graph.program import copy_program
from fxprune.lower.unpack import unpack

from .exported import held


def plain(result: Result) -> Result:
    """The result without packed weights: dense ones stand in their place, zeros included.

    Raises FxPruneError where onnx is not installed, and InputError for outputs that are no tensors.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise FxPruneError(
            "cannot export to ONNX",
            why=f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            do="pip install fxprune[onnx]",
        )
    _refuse_outputs(result)
    if not _own_ops(result):
        return result
    program = unpack(copy_program(result))
    warn_once(
        "ONNX has no packed weights: the zeros of the result's are stored and multiplied as other numbers, so that the "
        'file is as large and as slow as a dense one. format="aoti" keeps them packed.'
    )
    return emit(program, result.meta["entry"], None)


def write_onnx(program: ExportedProgram, path: Path, result: Result, calls: Sequence[Call]) -> None:
    """Translates a program to ONNX, in one file unless it is larger than ONNX allows (2 GB).

    Raises FxPruneError with torch's own error as its cause, and CheckError where onnxruntime is installed and computes
    something else.
    """
    # What the translation raises may be anything.
    try:
        with compat.alone(), compat.quiet_export(), torch.no_grad():
            translated: Any = torch.onnx.export(
                program, dynamo=True, verbose=False, external_data=False, output_names=_output_names(result)
            )
    except Exception as error:
        raise FxPruneError(
            "cannot export to ONNX",
            why=f"torch.onnx says {words_of(error)}",
            do="Export it as .pt2, or write the op that is named in others.",
        ) from error
    places = _places(program, result)
    _name_sizes(translated.model, result, places)
    translated.save(path, external_data=False)
    if importlib.util.find_spec("onnxruntime") is None:
        return
    # What it does not implement, others may.
    try:
        rows = [*held("onnxruntime = graph", result, list(calls), _session(path, result, places))]
    except Exception as error:
        warn_once(f"an ONNX file was written and not checked, for onnxruntime does not run it: {words_of(error)}")
        return
    for row in rows:
        if not row.ok:
            raise refuse(row, "Please report it.")


def _own_ops(program: torch.fx.GraphModule) -> list[str]:
    """The ops of fxprune that a graph calls."""
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("fxprune.")]


def _refuse_outputs(result: Result) -> None:
    constants = [value for value in returned(result) if not isinstance(value, torch.fx.Node)]
    if constants:
        raise InputError(
            "cannot export to ONNX",
            why=f"an output of the model is {constants[0]!r}, and ONNX has tensors",
            do="Leave it out of what the model returns, or export it as .pt2.",
        )


def _output_names(result: Result) -> list[str]:
    """Names of the flat outputs: keys of dicts and fields, `output` where there is one tensor, else places."""
    info = getattr(result.graph._codegen, "pytree_info", None)
    leaves = returned(result)
    spec = info.out_spec if info is not None else pytree.tree_structure(result.graph.output_node().args[0])
    tree = pytree.tree_unflatten(list(range(len(leaves))), spec)
    names = []
    for path, _ in pytree.tree_leaves_with_path(tree):
        name = "_".join(re.findall(r"\w+", pytree.keystr(path)))
        names.append(f"output_{name}" if name[:1].isdigit() else name or "output")
    return names


def _places(program: ExportedProgram, result: Result) -> dict[str, int]:
    """The name of each tensor among the inputs, and its place among the flat ones."""
    wants, names = result.meta["entry"].inputs, program.graph_signature.user_inputs
    pairs = enumerate(zip(names, wants, strict=True))
    return {str(name): place for place, (name, want) in pairs if isinstance(want, TensorInput)}


def _name_sizes(model: Any, result: Result, places: Mapping[str, int]) -> None:
    """Gives dynamic sizes names to be read: `batch` for dim 0 of the first input, `<input>_dim_1` and so on for others.

    Sizes that are computed from these keep what torch wrote.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        want = result.meta["entry"].inputs[places[value.name]]
        for dim, size in enumerate(want.sizes):
            old = getattr(value.shape[dim], "value", None)
            if isinstance(size, str) and isinstance(old, str) and old not in names:
                is_batch = dim == 0 and "batch" not in names.values()
                names[old] = "batch" if is_batch else f"{value.name}_dim_{dim}"
    for value in [*model.graph.inputs, *model.graph.outputs, *_values(model)]:
        if value.shape is not None:
            sizes = [getattr(size, "value", size) for size in value.shape]
            value.shape = type(value.shape)([names.get(size, size) for size in sizes])


def _values(model: Any) -> Iterator[Any]:
    for node in model.graph:
        yield from node.outputs


def _session(path: Path, result: Result, places: Mapping[str, int]) -> Callable[..., list[Tensor]]:
    """The file in onnxruntime as a function of the result's own arguments."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    entry: EntryCheck = result.meta["entry"]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        flat = entry.flatten(args, kwargs)
        fed = {name: flat[places[name]].detach().cpu().numpy() for name in names}
        device = flat[places[names[0]]].device if names else "cpu"
        return [torch.from_numpy(value).to(device) for value in session.run(None, fed)]

    return run
