"""transform: the stages in order, and the one loop that runs them."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from tqdm import tqdm

from fxprune.calibration.batches import read_calls
from fxprune.calibration.calibrate import calibrate_calls
from fxprune.capture.capture import Capture
from fxprune.capture.several import differing
from fxprune.check.calls import Call, dynamic_sizes
from fxprune.check.capture_checked import capture_checked
from fxprune.check.compare import TOLERANCE, CheckRow, nothing_compared
from fxprune.check.proof import Expected, Proof
from fxprune.couple.coupling import Coupling
from fxprune.emit.deliver import deliver, deliver_trainable
from fxprune.emit.pending import pending
from fxprune.emit.pruned import PrunedModule, emit
from fxprune.emit.report import Report, weight_reports
from fxprune.emit.settings import Settings
from fxprune.emit.trainable.module import TrainableModule
from fxprune.graph.environment import check_level, variable
from fxprune.graph.note import Note
from fxprune.graph.program import Program, copy_program, count_elements, put_values
from fxprune.graph.trace import Trace
from fxprune.graph.verify import verify
from fxprune.lower.attention import lower_attention
from fxprune.lower.fold import fold
from fxprune.lower.layouts.choose import Chooser
from fxprune.lower.lower import Lowered, batches, lower
from fxprune.plan.plan import Plan, plan_text
from fxprune.select.decide import check_values, choose_selection, couple_if_needed, existing_masks, names_asked_for
from fxprune.select.selection import Selection
from fxprune.shrink.computed import compute_proved
from fxprune.shrink.drop.blocks import choose_blocks
from fxprune.shrink.proved import drop_proved, shrink_proved
from fxprune.shrink.subnormal import flush_proved

from .capture import admit
from .errors import InputError
from .graph import compat
from .kernels import native


def transform(
    model: nn.Module | ExportedProgram,
    plan: Plan | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
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
    stays dynamic unless `dynamic_shapes` (as torch.export takes it) says otherwise. A dict is arguments by name. A list
    of calls, [(a,), (b,)], says by example: what differs between them is dynamic too, each is checked, and layouts are
    chosen for all. Without example inputs the result transforms itself at its first call. The result is for inference;
    with `trainable` it is an ordinary module of smaller parameters (and masks held as constants), not compiled.

    `mode` is torch.compile's; `options` are those of `settings.Settings`. With `check` the result is held against the
    pruned model on the example, on a second input and at other sizes. It is timed against the model as it runs best.

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
    (args, keywords), *rest = admit.admit_calls(model, example_inputs, kwargs)
    if rest and dynamic_shapes is not None:
        raise InputError(
            "cannot take dynamic_shapes= beside several example calls",
            why="what differs between the calls is what is dynamic",
            do="Give one of the two.",
        )
    if rest and not isinstance(model, ExportedProgram):
        dynamic_shapes = differing([(args, keywords), *rest])
    job = Job(
        model=model,
        example=Call("example", args, keywords),
        others=tuple(Call(f"example call {number}", *call) for number, call in enumerate(rest, 2)),
        dynamic_shapes=dynamic_shapes,
        calibration=calibration,
        plan=plan,
        asked=None if plan is None else plan_text(plan),
        replay=selection,
        settings=settings,
        trainable=trainable,
        progress=progress,
        check=check,
        report=Report(type(model).__name__),
    )
    return _run(job)


@dataclasses.dataclass
class Job:
    """One transform on its way: what was asked, and what the stages have made of it so far.

    plan, replay  what decides the selection; calibration turns a plan into a selection to replay
    asked         the plan as it was given, in words
    program       as the last stage left it
    selection     the decision; `left` is what of it is still to be applied to `program`
    blocks        paths of the residual blocks that left
    values        tensors that took the place of the model's own
    whole         the program and masks with all dead channels, to go back to where taking them out does not pay
    shrunk        the program and masks as they were before they were folded and packed
    """

    model: nn.Module | ExportedProgram
    example: Call
    others: tuple[Call, ...]
    dynamic_shapes: Any
    calibration: Any
    plan: Plan | None
    asked: str | None
    replay: Selection | None
    settings: Settings
    trainable: bool
    progress: bool
    check: bool
    report: Report
    on_step: Callable[[str], None] = lambda _: None
    captured: Capture = dataclasses.field(init=False)
    proof: Proof | None = dataclasses.field(init=False)
    coupling: Coupling | None = dataclasses.field(init=False)
    blocks: tuple[str, ...] = ()
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    expected: Expected | None = None
    program: Program | None = None
    selection: Selection = dataclasses.field(default_factory=Selection)
    left: Selection = dataclasses.field(default_factory=Selection)
    whole: tuple[Program, Selection] | None = None
    shrunk: tuple[Program, Selection] = dataclasses.field(init=False)
    lowered: list[Lowered] = dataclasses.field(default_factory=list)
    verified: set[tuple[object, ...]] = dataclasses.field(default_factory=set)
    result: PrunedModule | TrainableModule = dataclasses.field(init=False)

    def tell(self, notes: Iterable[Note] = (), checks: Iterable[CheckRow] = ()) -> None:
        """Puts what a stage answered into the report."""
        self.report.notes += notes
        self.report.checks += checks


class Stage(NamedTuple):
    """A step with a name. It reads the job, puts into it what it made, and returns lines that explain it in a trace."""

    name: str
    run: Callable[[Job], Iterable[str]]


def _calibrate(job: Job) -> Iterable[str]:
    if isinstance(job.model, ExportedProgram):
        raise InputError("cannot calibrate an ExportedProgram", do="Pass the model itself.")
    calls = read_calls(job.calibration, argument="calibration")
    shapes = job.dynamic_shapes
    job.replay = calibrate_calls(job.model, job.plan, calls, dynamic_shapes=shapes, progress=job.progress)
    job.plan = None
    return [f"{name}: {fit.method} {fit.note}" for name, fit in job.replay.fits.items()]


def _capture(job: Job) -> Iterable[str]:
    fold_masks = not job.trainable
    given = (job.model, job.example, job.dynamic_shapes, job.others)
    checked = capture_checked(*given, check=job.check, fold_masks=fold_masks)
    job.captured, job.proof, job.program = checked.captured, checked.proof, checked.captured.program
    job.tell(checked.notes, checked.checks)
    return ()


def _couple(job: Job) -> Iterable[str]:
    program = job.captured.program
    blocks = choose_blocks(program, job.plan, job.replay)
    dropped = drop_proved(program, blocks, job.example)
    job.report.dropped, job.blocks = dropped.parameters, blocks
    job.tell(checks=dropped.checks)
    job.values = dict(job.replay.values) if job.replay is not None else {}
    check_values(program, job.values)
    job.program = put_values(dropped.program, job.values)
    if not job.trainable:
        computed = compute_proved(job.program, names_asked_for(job.plan, job.replay), job.proof)
        job.program = computed.program
        # What masked a part of such a weight is no mask of what it comes to.
        existing = job.captured.existing
        job.captured.existing = {name: mask for name, mask in existing.items() if name not in computed.names}
        job.tell(computed.notes, computed.checks)
    flushed = flush_proved(job.program, job.proof)
    job.program = flushed.program
    job.tell(flushed.notes, flushed.checks)
    job.coupling = couple_if_needed(job.program, job.plan, job.replay)
    return str(job.coupling or "no groups were asked for").splitlines()


def _select(job: Job) -> Iterable[str]:
    assert job.program is not None
    decision = choose_selection(job.captured, job.program, job.plan, job.replay, job.coupling)
    # The program has the new values already.
    job.selection = dataclasses.replace(decision.selection, drop=job.blocks, values={})
    if job.trainable:
        # What is zero in an inference result stays so; here only a mask keeps it.
        job.selection.mask = {**existing_masks(job.captured, job.program), **job.selection.mask}
    job.tell(decision.notes)
    return job.selection.words()


def _shrink(job: Job) -> Iterable[str]:
    program, report = job.program, job.report
    assert program is not None
    align = None if job.trainable else job.settings.align
    found = shrink_proved(program, job.coupling, job.selection, job.proof, align)
    job.program, job.left, job.selection, job.expected = found.program, found.left, found.selection, found.expected
    job.tell(found.notes, found.checks)
    report.dead = found.dead
    if found.coupling is not None:
        report.tell_groups(program, found.coupling, found.selection, job.captured.literals)
    if report.groups or report.dropped:
        report.parameters = (count_elements(job.captured.program), count_elements(job.program))
    if found.selection.dead and not found.selection.keep and not report.dropped:
        job.whole = (program, dataclasses.replace(found.selection, dead={}))
    job.shrunk = (job.program, job.left)
    if job.expected is not None:
        job.expected = dataclasses.replace(job.expected, unpacked=job.shrunk)
    return [f"{name}: {len(kept)} stay" for name, kept in job.selection.staying.items()]


def _fold(job: Job) -> Iterable[str]:
    job.program, job.left = fold(*job.shrunk), Selection()
    return ()


def _lower(job: Job) -> Iterable[str]:
    assert job.program is not None
    size = sum(p.nbytes for p in job.program.parameters())
    chooser = Chooser(only=job.settings.layout, model_bytes=size)
    examples = [dynamic_sizes(job.captured, call) for call in (job.example, *job.others)]
    sizes = batches(job.captured, examples, job.settings.tune_for)
    rounds = job.settings.dtype is not None
    job.program, job.lowered = lower(job.program, job.shrunk[1].mask, chooser, sizes, rounds=rounds)
    if gains := lower_attention(job.program) if any(w.choice.layout != "dense" for w in job.lowered) else []:
        job.tell([Note(f"{_attentions(len(gains))} keys and values where they lie, {median(gains):.2f}x torch's")])
    if rounds and all(w.choice.layout == "dense" for w in job.lowered):
        job.tell(
            [Note("products in bfloat16 were asked for, but no weight is packed, so all are in float32", "fallback")]
        )
    elif rounds and job.expected is not None:
        job.expected = dataclasses.replace(job.expected, allowed=TOLERANCE[torch.bfloat16])
    return [f"{w.name}: {w.choice.layout}, {w.choice.why}" for w in job.lowered]


def _attentions(count: int) -> str:
    return "1 attention reads" if count == 1 else f"{count} attentions read"


def _emit(job: Job) -> Iterable[str]:
    assert job.program is not None
    # What was not packed lives on; the dense copies of what was may go.
    dense_bytes = sum(w.dense_bytes for w in job.lowered)
    compat.return_memory(dense_bytes)
    report, (program, left) = job.report, job.shrunk
    found = deliver(
        job.model,
        job.captured,
        program,
        left,
        packed=job.program,
        lowered=job.lowered,
        example=job.example,
        expected=job.expected,
        settings=job.settings,
        whole=job.whole,
        on_step=job.on_step,
    )
    job.result = found.result
    job.tell(found.notes, found.checks)
    report.kernels, report.compiled, report.timing = native.status().detail, found.compiled, found.timing
    if found.is_whole:
        report.groups, report.parameters, report.dead = [], None, None
        job.selection = dataclasses.replace(job.selection, dead={})
    report.weights = weight_reports(left, found.lowered)
    compat.return_memory(dense_bytes)
    return [found.compiled]


def _emit_trainable(job: Job) -> Iterable[str]:
    job.result, notes, checks = deliver_trainable(
        job.model, job.captured, *job.shrunk, job.example, job.dynamic_shapes, job.expected, job.settings
    )
    job.tell(notes, checks)
    job.report.compiled = "eager graph that trains; torch.compile it as any module"
    return ()


CALIBRATE = Stage("calibrate", _calibrate)  # plan, data -> a selection with masks and new values
SPINE = (
    Stage("capture", _capture),  # model, example -> a program that computes what the model computes
    Stage("couple", _couple),  # -> with new values, weights computed, no dropped blocks; which axes are one
    Stage("select", _select),  # plan -> what stays: indices of groups, elements of weights
    Stage("shrink", _shrink),  # -> without what leaves, and without what that left dead
)
INFERENCE = (
    *SPINE,
    Stage("fold", _fold),  # -> masks in the weights, batch-norms in the convolutions
    Stage("lower", _lower),  # -> weights in the layouts that measured fastest
    Stage("emit", _emit),  # -> the fastest form that is right, compiled
)
TRAINING = (*SPINE, Stage("emit", _emit_trainable))  # -> an ordinary module of smaller parameters


def _run(job: Job) -> PrunedModule | TrainableModule:
    """The stages in order: each is timed, traced, and under FXPRUNE_CHECK verified; FXPRUNE_STOP ends after one."""
    stages = TRAINING if job.trainable else INFERENCE
    stop, trace, report = _stop(stages), Trace(), job.report
    if job.calibration is not None:
        stages = (CALIBRATE, *stages)
    with tqdm(total=len(stages), desc="transform", disable=None if job.progress else True, leave=False) as bar:
        for stage in stages:
            bar.set_postfix_str(stage.name)
            job.on_step = lambda what, name=stage.name, bar=bar: bar.set_postfix_str(f"{name}: {what}")
            # Calibration takes long, and takes the lock itself where it captures.
            with contextlib.nullcontext() if stage is CALIBRATE else compat.alone():
                _run_stage(job, stage, trace)
            bar.update()
            if stage.name == stop:
                job.result = _unfinished(job, stage)
                break
    job.selection.values = job.values
    report.fits, report.recovery = job.selection.fits, job.selection.recovery
    idle = job.settings.idle(trainable=job.trainable)
    told = [Note(f"what was asked for by {', '.join(idle)} does nothing for such a result", "warning")] if idle else []
    job.tell([*job.selection.notes, *nothing_compared(report.checks), *told])
    job.result.meta |= {"report": report, "selection": job.selection, "settings": job.settings, "plan": job.asked}
    job.result.meta["sizes"] = dynamic_sizes(job.captured, job.example)
    return job.result


def _run_stage(job: Job, stage: Stage, trace: Trace) -> None:
    report = job.report
    start, told, before = time.perf_counter(), len(report.notes), job.program
    lines = stage.run(job)
    report.seconds[stage.name] = time.perf_counter() - start
    trace.write(stage.name, job.program, [*report.notes[told:], *lines])
    if job.program is not before:
        _verify(job, stage)


def _verify(job: Job, stage: Stage) -> None:
    """Under FXPRUNE_CHECK=1 the promises of a program, under 2 also what it computes."""
    if not check_level() or job.program is None or stage.name == "emit":
        return
    sizes = [getattr(want, "sizes", None) for want in job.captured.entry.inputs]
    verify(job.program, stage.name, origin=job.captured.program, sizes=sizes, known=job.verified)
    if check_level() > 1 and job.expected is not None:
        job.tell(checks=[job.expected.stage(stage.name, job.program, job.left)])


def _stop(stages: Sequence[Stage]) -> str:
    """The stage after which to stop, if one is asked for. Raises InputError where it is none of these."""
    name, names = variable("FXPRUNE_STOP"), [stage.name for stage in stages]
    if name and name not in names:
        raise InputError(f"cannot stop after {name!r}", where="FXPRUNE_STOP", do=f"Name one of {', '.join(names)}.")
    return name


def _unfinished(job: Job, stage: Stage) -> PrunedModule | TrainableModule:
    """The graph as a stage left it, eager, for FXPRUNE_STOP."""
    if stage.name == "emit":
        return job.result
    assert job.program is not None
    why = "FXPRUNE_STOP is set, and nothing after it was done, or checked"
    job.tell([Note(f"transform stopped after {stage.name}: {why}", "warning")])
    job.report.compiled = f"eager graph as {stage.name} left it"
    return emit(copy_program(job.program), job.captured.entry, None)


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
