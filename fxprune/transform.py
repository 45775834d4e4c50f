"""transform: the stages in order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.export import ExportedProgram
from tqdm import tqdm

from fxprune.calibration.batches import read_calls
from fxprune.calibration.calibrate import calibrate_calls
from fxprune.graph.program import count_elements
from fxprune.graph.trace import Trace
from fxprune.layouts.choose import Chooser
from fxprune.passes.fold import fold
from fxprune.passes.lower import lower
from fxprune.passes.values import put_values
from fxprune.plan.plan import Plan

from . import admit
from .check import Call
from .decide import batches, check_values, choose_blocks, choose_selection, couple_if_needed
from .deliver import deliver, deliver_trainable
from .emit import PrunedModule
from .errors import InputError
from .graph import compat
from .pending import pending
from .prove import capture_checked
from .report import Report, weight_reports
from .select import Selection
from .settings import Settings
from .structure import drop_proved, shrink_or_keep
from .trainable import TrainableModule


def transform(
    model: nn.Module | ExportedProgram,
    plan: Plan | None = None,
    example_inputs: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    selection: Selection | None = None,
    calibration: Any = None,
    dynamic_shapes: Any = None,
    trainable: bool = False,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
    check: bool = True,
) -> PrunedModule | TrainableModule:
    """Prunes a model by `plan` and compiles what is left; returns a GraphModule with the model's own call signature.

    Without a plan, the pruning that the model carries (torch.nn.utils.prune hooks, parametrizations, zeros) is taken as
    it is; `selection` replays an earlier result's, or takes what `calibrate` or `recover` made. With `calibration`, any
    iterable of inputs, the plan is calibrated on them first (see `calibrate`).

    `example_inputs` and `kwargs` are one call of the model: layouts are chosen for its sizes, and dim 0 of every tensor
    stays dynamic unless `dynamic_shapes` (as torch.export takes it) says otherwise. Without them the result transforms
    itself at its first call. The result is for inference; with `trainable` it is an ordinary module of smaller
    parameters (and masks held as constants), not compiled.

    `mode` is torch.compile's; `options` are those of `settings.Settings`. With `check` the result is held against the
    pruned model on the example, on a second input and at a second size, and against dense torch.compile in time.

    The user's model is never changed. Raises PlanError, InputError, CaptureError or CheckError.
    """
    settings = Settings.read(mode, options)
    _refuse(plan, selection, calibration)
    admit.admit_model(model)
    if example_inputs is None and kwargs is None and not isinstance(model, ExportedProgram):
        if calibration is not None:
            raise InputError(
                "cannot calibrate without example inputs",
                why="the result is to be made for a call of a size of its own",
                do="Pass example_inputs= or kwargs= of one call, or calibrate first and pass selection=.",
            )
        if trainable:
            raise InputError(
                "cannot make a trainable result without example inputs",
                why="its parameters only exist once the model is captured",
                do="Pass example_inputs=.",
            )
        later = dict(selection=selection, dynamic_shapes=dynamic_shapes, mode=mode, options=options)
        return pending(model, plan, {**later, "progress": progress, "check": check}, transform)
    args, keywords = admit.admit_call(model, example_inputs, kwargs)
    report, trace, stages = Report(type(model).__name__), Trace(), _Stages(progress)

    if calibration is not None:
        with stages("calibrate"):
            if isinstance(model, ExportedProgram):
                raise InputError("cannot calibrate an ExportedProgram", do="Pass the model itself.")
            calls = read_calls(calibration, argument="calibration")
            selection = calibrate_calls(model, plan, calls, dynamic_shapes=dynamic_shapes, progress=progress)
            plan = None
    with stages("capture"):
        captured, proof = capture_checked(
            model, args, keywords, dynamic_shapes, report, check=check, fold_masks=not trainable
        )
        trace.write("capture", captured.program, captured.notes)
    with stages("couple"):
        blocks = choose_blocks(captured.program, plan, selection)
        program = drop_proved(captured.program, blocks, proof.example, report)
        values = dict(selection.values) if selection is not None else {}
        check_values(captured.program, values)
        program = put_values(program, values)
        coupling = couple_if_needed(program, plan, selection)
        if coupling is not None or blocks:
            trace.write("couple", program, str(coupling or "no groups were asked for").splitlines())
    with stages("select"):
        selection = choose_selection(captured, program, report, plan, selection, coupling)
        selection.drop, selection.values = blocks, {}
        if coupling is None:
            proof.expect(selection, program)
    with stages("shrink"):
        align = None if trainable else settings.align
        shrunk, selection = shrink_or_keep(program, coupling, selection, proof, report, align, captured.literals)
        whole = (program, selection) if selection.dead and not selection.keep and not blocks else None
        program, left = shrunk.program, shrunk.selection
        if report.groups or blocks:
            report.parameters = (count_elements(captured.program), count_elements(program))
            trace.write("shrink", program)
    selection.values = values
    if trainable:
        with stages("emit"):
            call = Call("example", args, keywords)
            training = deliver_trainable(model, captured, program, left, call, dynamic_shapes, proof, settings, report)
        return _told(training, report, selection, stages)
    with stages("fold"):
        folded = fold(program, left)
        proof.stage("fold", folded)
        trace.write("fold", folded)
    with stages("lower"):
        chooser = Chooser(only=settings.layout)
        packed, lowered = lower(folded, left.mask, chooser, batches(captured, settings.tune_for))
        proof.stage("lower", packed)
        trace.write("lower", packed, [f"{w.name}: {w.choice.layout}, {w.choice.why}" for w in lowered])
        # What was not packed lives on in `packed`; the dense copies of what was may go.
        del folded
        dense_bytes = sum(w.dense_bytes for w in lowered)
        compat.return_memory(dense_bytes)
    with stages("emit"):
        result, lowered = deliver(captured, program, left, packed, lowered, proof, settings, report, whole)
        if report.dead is None:
            selection.dead = {}
    compat.return_memory(dense_bytes)
    report.weights = weight_reports(left, lowered)
    return _told(result, report, selection, stages)


_Result = TypeVar("_Result", PrunedModule, TrainableModule)


def _told(result: _Result, report: Report, selection: Selection, stages: _Stages) -> _Result:
    """The result with its report and selection in its meta, where they survive a deepcopy."""
    stages.close()
    report.seconds = stages.seconds
    report.fits, report.recovery = selection.fits, selection.recovery
    report.notes += selection.notes
    result.meta["report"], result.meta["selection"] = report, selection
    return result


def _refuse(plan: Plan | None, selection: Selection | None, calibration: Any) -> None:
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(
            f"cannot use a {type(plan).__name__} as a plan",
            do='Write Plan([Rule("encoder.*.weight", Unstructured(0.9))]).',
        )
    if selection is not None and not isinstance(selection, Selection):
        raise InputError(
            f"cannot use a {type(selection).__name__} as a selection",
            why="it is not an fxprune.select.Selection",
            do="Pass the selection of an earlier result: selection=result.selection.",
        )
    if plan is not None and selection is not None:
        raise InputError(
            "cannot take a plan and a selection at once",
            why="a selection is the outcome of a plan",
            do="Pass one of them.",
        )
    if calibration is not None and selection is not None:
        raise InputError(
            "cannot take a selection and calibrate at once",
            why="calibration makes a selection",
            do="Pass one of them.",
        )


class _Stages:
    """Times the stages, and shows them as a progress bar that is silent when not on a terminal."""

    def __init__(self, progress: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._bar = tqdm(total=8, desc="transform", disable=None if progress else True, leave=False)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._bar.set_postfix_str(name)
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self._bar.close()
            raise
        self.seconds[name] = time.perf_counter() - start
        self._bar.update()

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()
