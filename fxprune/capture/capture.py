"""capture: model + example inputs -> Program. The only caller of torch.export.

A Program is a plain torch.fx.GraphModule of ATen ops (export's training IR), parameters as get_attr nodes under the
model's own names, each standing right before its first use, fake values in meta["val"]. It shares its parameters with
the user's model, which is never touched.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from fxprune.errors import CaptureError, InputError
from fxprune.graph import compat
from fxprune.graph.environment import hidden
from fxprune.graph.memory import writes
from fxprune.graph.note import Note
from fxprune.graph.program import Program

from .conditions import ForeignGuard, entry_check
from .entry import EntryCheck, TensorInput
from .hooks import fold_existing
from .own_masks import Held, fold_constant_masks
from .several import Differing


@dataclasses.dataclass
class Capture:
    """A program, what it demands of its inputs, the masks it came with (True = kept), and notes for the report.

    `literals` names tensors of the program that the model's code wrote out and that the model does not own; `holders`
    the model's buffers that held masks of its own code, by weight.
    """

    program: Program
    entry: EntryCheck
    existing: dict[str, Tensor]
    notes: list[Note]
    literals: frozenset[str] = frozenset()
    holders: Mapping[str, Held] = dataclasses.field(default_factory=dict)


def capture(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any = None,
    *,
    static: bool = False,
    fold_masks: bool = True,
) -> Capture:
    """Captures `model(*args, **kwargs)` as a graph of ATen ops.

    Without `dynamic_shapes`, dim 0 of every tensor input is dynamic where the model allows it; `static=True`
    fixes every size. A call of one sample is captured as one of two, for what export learns of a size of 1 is seldom
    true of others. `dynamic_shapes` is handed to torch.export as it is. The weights that the graph multiplies by
    constant masks hold their zeros, and no product is left; without `fold_masks` only where one buffer holds the mask.
    Raises CaptureError with torch's own error as its cause.
    """
    args, kwargs = tuple(args), dict(kwargs)
    if isinstance(model, ExportedProgram):
        return _finish(model, model.module(), None, args, kwargs, {}, [], fold_masks)
    shadow, existing = fold_existing(model)
    compat.register_foreign_outputs()
    if isinstance(dynamic_shapes, ShapesCollection):
        dynamic_shapes = dynamic_shapes.dynamic_shapes(shadow, args, kwargs)
    notes: list[Note] = []
    tries = attempts(args, kwargs, dynamic_shapes, static)
    for index, attempt in enumerate(tries):
        last = index == len(tries) - 1
        own_args, own_kwargs, shapes = attempt.call(args, kwargs)
        # What torch.export raises while it runs the user's code may be anything.
        try:
            exported = export_program(shadow, own_args, own_kwargs, shapes)
            unlifted = exported.module()
        except Exception as error:
            if last:
                raise _capture_error(model, error) from error
            reason = str(error).strip().split("\n", 1)[0][:200]
        else:
            forward = type(shadow).forward.__get__(shadow)
            try:
                return _finish(exported, unlifted, forward, args, kwargs, existing, notes, fold_masks)
            except InputError:
                raise
            except ForeignGuard as error:
                if last:
                    raise _capture_error(model, error) from error
                reason = str(error)
            except Exception as error:
                if last:
                    raise _capture_error(model, error) from error
                reason = hidden(error)[:200]
        if attempt.note:
            notes.append(Note(f"{attempt.note}: {reason}", "fallback"))
    raise AssertionError("unreachable: the last attempt returns or raises")


_ShapesOf = Callable[[tuple[Any, ...], dict[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One way to capture a call: which sizes are dynamic, and what to note when it fails.

    Where it is `doubled`, dynamic sizes of 1 are captured as 2: dim 0, or `dims` of each flat input.
    """

    shapes_of: _ShapesOf
    note: str = ""
    doubled: bool = False
    dims: Sequence[Sequence[int]] | None = None

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """What to capture: arguments, and their dynamic shapes.

        Marks that a failed attempt left would make the next one dynamic as well, so each has tensors of its own.
        """
        args, kwargs = apart(*(_doubled(args, kwargs, self.dims) if self.doubled else (args, kwargs)))
        return args, kwargs, self.shapes_of(args, kwargs)


def attempts(args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, static: bool) -> list[Attempt]:
    """What to try, in order."""
    sizes = {t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()} - {0}
    if isinstance(dynamic_shapes, Differing):
        noted = "dim 0 could not stay dynamic where the example calls have one size"
        both = [partial(dynamic_shapes.shapes, with_batch=with_batch) for with_batch in (True, False)]
        dims = dynamic_shapes.dims
        with_first = [(0, *own) for own in dims] if sizes == {1} else dims
        return [Attempt(both[0], noted, True, with_first), Attempt(both[1], "", True, dims)]
    if dynamic_shapes is not None:
        return [Attempt(lambda *_: dynamic_shapes)]
    fixed = Attempt(lambda *_: None)
    if static or not sizes:
        return [fixed]
    tries = [Attempt(_batches(1), "dim 0 could not stay dynamic everywhere")]
    if sizes == {1}:
        tries.insert(0, Attempt(_batches(1), doubled=True))
    elif 1 in sizes:
        # A size of 1 beside larger ones is more often there to be broadcast than a batch.
        tries.append(Attempt(_batches(2), "dim 0 could not stay dynamic where it is larger than 1"))
    return [*tries, fixed]


def _doubled(
    args: tuple[Any, ...], kwargs: dict[str, Any], dims: Sequence[Sequence[int]] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with what has size 1 in these dimensions of each flat input, or in dim 0, held twice."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    grown = []
    for leaf, own in zip(leaves, dims if dims is not None else [(0,)] * len(leaves), strict=True):
        for dim in own:
            if isinstance(leaf, Tensor) and dim < leaf.dim() and leaf.shape[dim] == 1:
                leaf = _twice(leaf.detach(), dim)
        grown.append(leaf)
    return pytree.tree_unflatten(grown, spec)


def _twice(tensor: Tensor, dim: int) -> Tensor:
    """A tensor of size 1 in a dimension with size 2 there, the others laid out as they were."""
    sample = tensor.select(dim, 0)
    if tensor.layout is not torch.strided or any(n > 1 and s == 0 for n, s in zip(sample.shape, sample.stride())):
        return torch.cat([tensor, tensor], dim)
    strides = list(sample.stride())
    strides.insert(dim, 1 + sum((size - 1) * stride for size, stride in zip(sample.shape, strides)))
    shape = [*tensor.shape[:dim], 2, *tensor.shape[dim + 1 :]]
    return tensor.new_empty_strided(shape, strides).copy_(tensor)


def _batches(least: int) -> _ShapesOf:
    """Dim 0 is dynamic in every tensor where it is `least` or more."""

    def shapes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShapesCollection:
        shapes = ShapesCollection()
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] >= least:
                shapes[leaf] = {0: Dim.AUTO}
        return shapes

    return shapes_of


def apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with a new tensor object for every leaf, over the same storage.

    Export takes two arguments that are one tensor for one input, which is wrong for every call where they differ, and
    it leaves marks on the tensors that it is given.
    """
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))


def export_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, *, gradients: bool = False
) -> ExportedProgram:
    """torch.export's own capture. With `gradients` its regions without gradients stand in the graph as such."""
    quietly = compat.quiet_export()
    with compat.alone(), torch.set_grad_enabled(gradients), compat.sizes_of_one_stay_dynamic(), quietly:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _finish(
    exported: ExportedProgram,
    unlifted: torch.fx.GraphModule,
    forward: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    existing: dict[str, Tensor],
    notes: list[Note],
    fold_masks: bool,
) -> Capture:
    entry = entry_check(unlifted, exported, forward, args, kwargs)
    program = _rewrap(unlifted)
    _refuse_state(program)
    _refuse_training_ops(program)
    fixed = [
        path
        for path, want in zip(entry.paths, entry.inputs, strict=True)
        if isinstance(want, TensorInput) and want.sizes and isinstance(want.sizes[0], int)
    ]
    if fixed and not notes:
        notes.append(Note(f"dim 0 is fixed by the model in {', '.join(fixed)}", "fallback"))
    masks, holders = fold_constant_masks(program, only_held=not fold_masks)
    count = len({id(keep) for keep in masks.values()})
    existing = existing | {name: keep & existing[name] if name in existing else keep for name, keep in masks.items()}
    if masks:
        notes.append(Note(f"weights that hold the zeros of constant masks in the model: {count}"))
    literals = exported.graph_signature.inputs_to_lifted_tensor_constants.values()
    return Capture(program, entry, existing, notes, frozenset(map(str, literals)), holders)


def _rewrap(unlifted: torch.fx.GraphModule) -> Program:
    """A plain GraphModule: no guard module (EntryCheck has its conditions), parameters fetched where they are used.

    Ops that nobody reads leave: the mean over heads that nn.MultiheadAttention makes for its weights would hold them.
    """
    graph = unlifted.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
    graph.eliminate_dead_code(lambda node: node.op != "call_function" or (node.is_impure() and not _only_draws(node)))
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.users:
            order = {n: i for i, n in enumerate(graph.nodes)} if len(node.users) > 1 else {}
            first = min(node.users, key=lambda n: order.get(n, 0))
            first.prepend(node)
    graph.lint()
    graph._tracer_cls = None
    program = torch.fx.GraphModule(unlifted, graph, class_name="Program")
    program._tracer_cls = None
    program.eval()
    return program


def _only_draws(node: torch.fx.Node) -> bool:
    """Whether an op is only impure because it moves the random stream, which is the user's."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded in op.tags


def _refuse_state(program: Program) -> None:
    for node in program.graph.nodes:
        for written in writes(node):
            if written.op == "get_attr":
                raise InputError(
                    "cannot transform a model that keeps state",
                    where=f'"{written.target}" (node {node.name})',
                    why="each call of the model writes to this tensor, so a call does not depend on its inputs alone",
                    do="Take the state out of forward, or hand it in and out as arguments.",
                )


def _refuse_training_ops(program: Program) -> None:
    for node in program.graph.nodes:
        training = None
        if node.target is torch.ops.aten.dropout.default:
            training = node.args[2] if node.args[1] else False
        elif node.target is torch.ops.aten.batch_norm.default:
            # Without running statistics a batch-norm takes those of the batch in evaluation too.
            training = node.args[5] and node.args[3] is not None
        if training:
            op = "dropout" if node.target is torch.ops.aten.dropout.default else "batch_norm"
            raise InputError(
                "cannot transform a model in training mode",
                where=f"node {node.name}",
                why=f"{op} runs with training=True",
                do=f"Call model.eval() before; where the model calls F.{op} itself, pass training=self.training.",
            )


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    """torch's failure with the user's own line, where the traceback has one."""
    package = Path(torch.__file__).parent
    own = Path(__file__).parent
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if package not in Path(f.filename).parents and own not in Path(f.filename).parents
    ]
    where = type(model).__name__
    if frames:
        where += f", {frames[-1].filename}:{frames[-1].lineno} ({(frames[-1].line or '').strip()})"
    text = str(error).strip().split("\n\n", 1)[0].replace("\n", " ")
    return CaptureError(
        "cannot capture the model as a graph",
        where=where,
        why=f"torch.export says {type(error).__name__}: {text[:600]}",
        do="Change that line to something torch.export can trace (its full error is the cause of this one), or pass an "
        "ExportedProgram of your own.",
    )
