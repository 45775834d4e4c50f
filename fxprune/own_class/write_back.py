"""write_back: a smaller model of the user's own class, equal to what `transform` makes of the same selection."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from tqdm import tqdm

from fxprune.capture import admit
from fxprune.capture.hooks import fold_existing, separate
from fxprune.capture.several import differing
from fxprune.check.calls import Call
from fxprune.errors import CheckError, FxPruneError, InputError, warn_once
from fxprune.graph import compat
from fxprune.graph.note import some
from fxprune.select.selection import Selection

from .attributes import kinds_of
from .cache import miscounted
from .config import FOLDER, LostLayers, follow_configs
from .copying import copy_smaller, names_held
from .deci import check_format, to_deci
from .follow import Outcome, follow
from .known_modules import settle_known
from .sizes import Literal, Sizes
from .target import Target, find_targets
from .trial import try_out
from .without_blocks import Answer, WayOut, answers, sizes_kept, take_out, ways_out

_INSTEAD = "transform(..., selection=selection, trainable=True) takes it as a graph that trains."


def write_back(
    model: nn.Module,
    selection: Selection,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    format: str | None = None,
    progress: bool = True,
) -> nn.Module:
    """A smaller model of the user's own class, by the selection of a result, of `calibrate` or of `recover`.

    It is a deep copy of the model whose parameters and buffers are sliced, zeroed and replaced under their own names,
    without the blocks that were dropped, and whose attributes that remember sizes follow: which these are is read off
    the graph, not off a list of classes. So it has the model's methods, trains as the model does, and in transformers
    generates, and where one width fits all layers its config says so and `from_pretrained` loads what `save_pretrained`
    wrote; elsewhere an FxPruneWarning says which layers differ, and `fxprune.save_pretrained` writes a folder that
    `fxprune.from_pretrained` loads. With `format="deci"` a decoder is filled up with zeros to the widths that
    `save_pretrained(..., format="deci")` can say.

    It is held against the model with zeros in place of what left, on the example, on a second input and at other
    sizes, and returned only if it is equal. Masks become zeros of plain weights, parametrized weights plain ones. Dead
    channels (`selection.dead`) leave where the class has a place for the constants that stand in for them. Every module
    is in the mode that the model's is in, and every parameter asks for gradients as the model's does.

    `example_inputs`, `kwargs` and `dynamic_shapes` are those of `transform`. The user's model is never changed. Raises
    InputError, PlanError, CaptureError or CheckError as `transform` does, and FxPruneError where the class cannot
    follow: where its code has a size written out, or computes one from a width that stayed.
    """
    check_format(format)
    if not isinstance(selection, Selection):
        raise InputError(
            f"cannot use a {type(selection).__name__} as a selection",
            why="it is not an fxprune.Selection",
            do="Pass the selection of a result: selection=result.selection.",
        )
    if isinstance(model, ExportedProgram):
        raise InputError(
            "cannot write back to an ExportedProgram",
            why="it is a graph and has no class of its own",
            do="Pass the nn.Module that it was made from.",
        )
    if example_inputs is None and kwargs is None:
        raise InputError(
            "cannot write back without example inputs",
            why="what is smaller is held against the model on a call",
            do="Pass example_inputs= or kwargs= of one call.",
        )
    quiet = model
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        # Only modes are another's: the copy shares the model's storage.
        quiet = separate(fold_existing(model)[0]).eval()
    admit.admit_model(quiet)
    (args, keywords), *rest = admit.admit_calls(quiet, example_inputs, kwargs)
    if rest:
        dynamic_shapes = differing([(args, keywords), *rest])
    example = Call("example", args, keywords)
    others = [Call(f"example call {number}", *call) for number, call in enumerate(rest, 2)]
    with tqdm(total=3, desc="write_back", disable=None if progress else True, leave=False) as bar, compat.alone():
        bar.set_postfix_str("shrink")
        targets = find_targets(quiet, selection, example, others, dynamic_shapes)
        bar.update()
        bar.set_postfix_str("follow")
        own, target = _first_right(model, quiet, targets, selection, example)
        bar.update()
        bar.set_postfix_str("configs")
        blocks = [path for path in selection.drop if path not in target.branches]
        sizes, lost = Sizes(target.before, target.after), _lost(model, blocks)
        notes = [*target.notes, *follow_configs(own, model, sizes, lost, target.expected)]
        if target is not targets[0]:
            notes.append("channels that masks left dead stay, for the class has no place for what stands in for them")
        notes += miscounted(own, quiet, example) if selection.drop else []
        bar.update()
    if format is not None:
        # This form is for layers that differ.
        own, notes = to_deci(own), [note for note in notes if FOLDER not in note]
    for note in [*notes, *_unreached(model, target, selection.drop)]:
        warn_once(f"write_back, {type(model).__name__}: {note}")
    return own


def _first_right(
    model: nn.Module, quiet: nn.Module, targets: list[Target], selection: Selection, example: Call
) -> tuple[nn.Module, Target]:
    """The first copy that is right: without dead channels before with them, blocks deleted before they are bypassed."""
    failure: FxPruneError | None = None
    answered = _answered(quiet, [*selection.drop, *targets[0].idle], example)
    for target in targets:
        held = names_held(fold_existing(model)[0])
        if foreign := [name for name in target.changed if name not in held]:
            failure = _no_place(model, target, foreign)
            continue
        for way in ways_out(model, selection.drop, target.branches, target.idle):
            own, outcome = _written(model, target, way, answered)
            if outcome.right:
                return own, target
            failure = _cannot(own, target, outcome)
    assert failure is not None
    raise failure


def _answered(quiet: nn.Module, paths: Sequence[str], example: Call) -> dict[str, Answer]:
    """What the modules that leave answer in the example."""
    if not paths:
        return {}
    with admit.untouched(quiet):
        return answers(quiet, paths, example)


def _written(
    model: nn.Module, target: Target, way: WayOut, answered: Mapping[str, Answer]
) -> tuple[nn.Module, Outcome]:
    """A copy of the model whose attributes follow as well as any were found to, and how it came out."""
    own = copy_smaller(model, target)
    settle_known(own, target.after)
    sizes, modules = Sizes(target.before, target.after), dict(own.named_modules(remove_duplicate=False))
    kinds = take_out(own, way, answered)
    left = {id(module) for module in own.modules()}
    kinds += kinds_of({path: module for path, module in modules.items() if id(module) in left}, sizes)
    kinds += sizes_kept(own, way, sizes)
    outcome = follow(kinds, lambda: try_out(own, target.expected, everywhere=False))
    if outcome.right:
        outcome = try_out(own, target.expected, everywhere=True)
    return own, outcome


def _lost(model: nn.Module, paths: Sequence[str]) -> list[LostLayers]:
    """The lists of modules that lose elements."""
    gone: dict[str, list[int]] = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        gone.setdefault(parent, []).append(list(model.get_submodule(parent)._modules).index(leaf))
    return [LostLayers(len(model.get_submodule(parent)._modules), tuple(places)) for parent, places in gone.items()]


def _unreached(model: nn.Module, target: Target, dropped: Sequence[str]) -> list[str]:
    """A note on modules with parameters that the example does not reach: they keep their sizes."""
    if not target.cuts:
        return []
    folded = fold_existing(model)[0]
    reached = {id(tensor) for name, tensor in folded.named_parameters(remove_duplicate=False) if name in target.tensors}
    paths = []
    for path, module in folded.named_modules():
        ids = {id(tensor) for tensor in module._parameters.values() if tensor is not None}
        inside = any(f"{path}.".startswith(f"{gone}.") for gone in (*dropped, *target.idle))
        if ids and not ids & reached and not inside:
            paths.append(path or "the model")
    return [f"the example does not reach these, which keep their sizes: {some(paths)}"] if paths else []


def _no_place(model: nn.Module, target: Target, foreign: list[str]) -> FxPruneError:
    literals = [name for name in foreign if name in target.captured.literals]
    why = "its code makes this tensor itself, at its old size" if literals else "the class has no place for it"
    return FxPruneError(
        "cannot write a smaller model of its own class",
        where=f'{type(model).__name__}, tensor "{foreign[0]}"',
        why=why,
        do=f"Leave its group out of the plan; {_INSTEAD}",
    )


def _cannot(own: nn.Module, target: Target, outcome: Outcome) -> FxPruneError:
    """The error for a class that cannot follow: the module, the number in its code, and the line of the op."""
    if outcome.path is None and not target.cuts:
        return CheckError(
            "the model of its own class does not compute what it should",
            where=type(own).__name__,
            why=outcome.why,
            do=_INSTEAD,
        )
    blamed = _blamed(own, Sizes(target.before, target.after), outcome)
    path = outcome.path if blamed is None else blamed.path
    module = own.get_submodule(path or "")
    where = f'"{path}" ({type(module).__name__})' if path else type(module).__name__
    why = f"with smaller weights {outcome.why}"
    if blamed is not None:
        place = f" ({blamed.place})" if blamed.place else ""
        said = f"its code{place} has the size {blamed.old}, which is {blamed.new} now, and no attribute makes it follow"
        why = f"{said}; {why}"
    line = "Let that line read the size off a tensor or an attribute, or leave" if blamed is not None else "Leave"
    return FxPruneError(
        "cannot write a smaller model of its own class",
        where=where,
        why=why,
        do=f"{line} its group out of the plan; {_INSTEAD}",
    )


def _blamed(own: nn.Module, sizes: Sizes, outcome: Outcome) -> Literal | None:
    """The number in an op's arguments that most likely kept the class from following.

    Where the failure is known it is one of that module, and one that the error itself names. The convolutions and norms
    of torch have their numbers set, so they are not to blame.
    """
    found = [literal for literal in sizes.literals if not _is_torchs(own, literal.path)]
    near = [literal for literal in found if literal.path == outcome.path]
    said = {int(number) for number in re.findall(r"\d+", outcome.why)}
    named = [literal for literal in near if literal.old in said and literal.new not in said]
    return next(iter([*named, *near, *found]), None)


def _is_torchs(own: nn.Module, path: str) -> bool:
    try:
        return type(own.get_submodule(path)).__module__.startswith("torch.nn.")
    except AttributeError:
        return True
