"""recover: a pruned model taught by the dense one on unlabelled data, its zeros held."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.calibration.arithmetic import plain
from fxprune.calibration.batches import Batch, batch_of, capture_for
from fxprune.calibration.checkpoint import Checkpoint
from fxprune.calibration.progress import about
from fxprune.capture import admit
from fxprune.capture.capture import Capture
from fxprune.check.calls import Call
from fxprune.check.compare import compare, refuse
from fxprune.check.oracle import Oracle, run_flat
from fxprune.couple.couple import couple
from fxprune.couple.coupling import Coupling
from fxprune.couple.removal import removal
from fxprune.errors import InputError
from fxprune.graph.program import Program, names_of_parameters, put_values
from fxprune.select.decide import check_values, choose_selection
from fxprune.select.selection import Recovery, Selection
from fxprune.shrink.drop.drop import without_blocks

from .feed import Feed
from .matching import Distance, Loss, nodes_to_match, same_shape
from .student import Student, Tapped, make_student, whole_values
from .train import Length, Standing, Trainer


def recover(
    model: nn.Module,
    selection: Selection,
    batches: Any,
    *,
    minutes: float = 5.0,
    steps: int | None = None,
    learning_rate: float = 1e-3,
    loss: Callable[[Any, Any], Tensor] | None = None,
    dynamic_shapes: Any = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """Trains what a selection left of a model to give what the dense model gives on `batches`, which need no labels.

    `batches` is any iterable of inputs, as for `calibrate`, also one without end. A list is gone through again and
    again, shuffled; the first batches (5%, from 1 to 8) are held out to measure by, and never trained on. Positions
    that an `attention_mask` [b, s] among the inputs leaves out do not count.

    The loss is the mean squared difference from the dense model over its variance, at the sums that close residual
    branches and at the outputs; `loss(pruned_outputs, dense_outputs)`, a scalar, takes the place of the outputs' part.
    Channels that leave are cut off first, so that a step is as fast as the smaller model. What a mask zeroes stays
    +0.0. Embeddings and other matrices that the selection leaves alone stay as they are, and so do the statistics of
    batch-norms.

    It runs for about `minutes`, or for so many `steps`, and is then the same every time under `seed`. The answer is the
    selection with the values that measured best: never worse, by this measure, than what was given. With `checkpoint`,
    a file, an interrupted run goes on where it stopped. Neither the model nor the selection is changed. Raises
    InputError, CaptureError, PlanError or CheckError.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; Jiao et al., "TinyBERT: Distilling BERT
    for Natural Language Understanding", 2020 (hidden states).
    """
    _refuse(model, selection, minutes, steps, learning_rate, loss, seed)
    feed = Feed(batches, seed)
    length = Length(60.0 * minutes, steps)
    words = (repr((None if steps else float(minutes), steps, float(learning_rate), seed)), _name(loss))
    file = Checkpoint(
        checkpoint, "recovery", "" if checkpoint is None else _about(model, selection, feed.held_out, words)
    )
    held = file.read()
    if held is not None and "values" in held:
        return _recovered(selection, held["values"], Standing(**held["standing"]), held["note"])
    with plain():
        captured = capture_for(model, feed.head, dynamic_shapes)
        program, coupling = _pruned(captured, selection)
        student = make_student(program, coupling, selection, captured.existing)
        _check_student(program, coupling, selection, student, feed.held_out[0])
        taps = _taps(captured.program, student, selection, batch_of(captured, feed.held_out[0]))
        distance = Distance(captured.program, taps, loss)
        trainer = Trainer(captured, student, taps, distance)
        if held is not None:
            trainer.resume(held)
        best = trainer.run(feed, length, learning_rate, file, progress=progress)
        values = _all_values(program, selection, whole_values(student, best, program))
    file.write(standing=dataclasses.asdict(trainer.standing), values=values, note=distance.note)
    return _recovered(selection, values, trainer.standing, distance.note)


def _all_values(program: Program, selection: Selection, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The selection's values with those that were trained in place of theirs, under any name of a tied one."""
    first = names_of_parameters(program)
    kept = {n: v.detach().clone() for n, v in selection.values.items() if first.get(n, n) not in trained}
    return {**kept, **trained}


def _recovered(selection: Selection, values: dict[str, Tensor], standing: Standing, note: str) -> Selection:
    return dataclasses.replace(
        selection,
        keep=dict(selection.keep),
        mask=dict(selection.mask),
        asked=dict(selection.asked),
        fits=dict(selection.fits),
        values=values,
        dead={},
        recovery=Recovery(standing.step, standing.seconds, standing.before, standing.best, note),
    )


def _pruned(captured: Capture, selection: Selection) -> tuple[Program, Coupling | None]:
    """The program without the blocks that leave and with new values, and its groups where channels leave."""
    check_values(captured.program, selection.values)
    program = put_values(without_blocks(captured.program, selection.drop), selection.values)
    coupling = couple(program) if selection.keep else None
    choose_selection(captured, program, None, selection, coupling)  # refuses one of another model
    return program, coupling


def _check_student(
    program: Program, coupling: Coupling | None, selection: Selection, student: Student, call: Call
) -> None:
    """Raises CheckError where the program without the channels that leave is not the one with zeros for them."""
    if coupling is None:
        return
    masked = dataclasses.replace(selection, values={}, keep={}, dead={})
    leaving = removal(coupling, selection.keep)
    wanted = run_flat(Oracle(program, masked, leaving, wide=torch.float32), call)
    runner = Tapped(student.program, ())
    runner.values = student.values()
    row = compare("shrunk = zeroed", call, wanted, run_flat(runner, call))
    if not row.ok:
        raise refuse(row, "transform(selection=...) says which group it is: take it out of selection.keep.")


@torch.no_grad()
def _taps(program: Program, student: Student, selection: Selection, batch: Batch) -> list[str]:
    """The nodes to match that have one shape in the dense program and in the student."""
    names = nodes_to_match(program, [*selection.mask, *student.cuts])
    runner = Tapped(student.program, names)
    runner.values = student.values()
    return same_shape(runner.forward(batch)[0], Tapped(program, names).forward(batch)[0])


def _about(model: nn.Module, selection: Selection, held_out: list[Call], words: tuple[str, ...]) -> str:
    """A digest of the model, the selection, the data held out and the arguments."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for kind, table in (("keep", selection.keep), ("value", selection.values)):
        tensors |= {f"{kind} {name}": tensor for name, tensor in table.items()}
    tensors |= {f"mask {name}": mask.bits for name, mask in selection.mask.items()}
    batches = [Batch(tuple(pytree.tree_leaves((call.args, call.kwargs)))) for call in held_out]
    return about(tensors, batches, "recover", repr(selection.drop), *words)


def _name(loss: Loss | None) -> str:
    return "" if loss is None else getattr(loss, "__qualname__", type(loss).__qualname__)


def _refuse(
    model: object, selection: object, minutes: object, steps: object, rate: object, loss: object, seed: object
) -> None:
    admit.admit_model(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"cannot train an {type(model).__name__}", do="Pass the model itself.")
    if not isinstance(selection, Selection):
        raise InputError(
            f"cannot use a {type(selection).__name__} as a selection",
            where="selection=",
            why="it is not an fxprune.select.Selection",
            do="Pass what calibrate returned, or result.selection of a transform.",
        )
    if not selection.keep and not selection.drop and all(m.kept() == m.numel() for m in selection.mask.values()):
        raise InputError(
            "cannot recover a model that is not pruned",
            where="selection=",
            why="it masks nothing, and nothing leaves",
            do="Pass what calibrate(model, plan, batches) returned for a plan that prunes.",
        )
    for name, value in (("minutes", minutes), ("learning_rate", rate)):
        if not _is_number(value) or not 0 < float(value) < math.inf:  # pyright: ignore[reportArgumentType]
            raise InputError(f"cannot train with {name}={value!r}", why="it is a finite number above 0")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InputError(f"cannot train for steps={steps!r}", why="it is a whole number, 1 or more, or None")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"cannot shuffle with seed={seed!r}", why="it is a whole number")
    if loss is not None and not callable(loss):
        raise InputError(
            f"cannot train with a {type(loss).__name__} as loss",
            where="loss=",
            why="it cannot be called",
            do="Write loss(student_outputs, teacher_outputs) that returns a scalar tensor.",
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
