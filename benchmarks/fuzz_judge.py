"""One case run and judged: what fxprune answered, held against the oracle on every call that the model itself takes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from benchmarks.fuzz_case import Case, Inputs
from benchmarks.fuzz_gradients import compare_gradients
from benchmarks.fuzz_oracle import Told, distance, relative, wide, widened, zeroed
from benchmarks.fuzz_pool import OWN
from benchmarks.fuzz_prune import BACKEND, CALIBRATE, LATER, REPLAY, TRAIN
from fxprune.errors import CheckError, FxPruneError
from fxprune.graph.note import Note

# From good to bad. "not a case": the model does not run or is not finite. "caught": fxprune's own checks found a fault.
OUTCOMES = ("ok", "not a case", "refused", "needless", "caught", "changed", "wrong", "crash", "time limit", "died")
FAULTS = ("caught", "changed", "wrong", "crash", "time limit", "died")
# What a report says where fxprune's own checks turned down what it made, and something slower stands in.
TURNED_DOWN = (
    "keeps all its indices: ",
    "nothing was shrunk: ",
    "nothing dead left: ",
    "and was dropped",
    "torch.compile failed",
    "every size is fixed: ",
)
# What it says beside that where the model's own answer is nothing but rounding, so that none can be right.
NO_DIGITS = "the model's own answer has no digit to compare"
# Further than this from the unpruned model, or the oracle says little.
FAR = 1e-3

Row = dict[str, Any]


@dataclasses.dataclass
class Models:
    """The user's model, which fxprune gets, and others alike: for our own calls, and as oracles in both precisions."""

    user: nn.Module
    own: nn.Module
    plain: nn.Module | None = None
    exact: nn.Module | None = None


def run_case(case: Case, say: Callable[[str], None] = lambda at: None) -> Row:
    """The row of a case; `say` is told whose code runs, for whoever must explain a crash."""
    begun = time.perf_counter()
    row: Row = {"seed": case.seed, "kind": case.pruning.kind, "way": case.pruning.way, "dtype": str(case.dtype)[6:]}
    row |= {"ops": sorted({step.op for step in case.sketch.steps}), "compiled": "compile" not in case.options}
    row["checked"] = case.is_checked
    torch._dynamo.reset()
    with _environment(case.is_strict), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row |= _run(case, say)
    return row | {"seconds": round(time.perf_counter() - begun, 3)}


@contextlib.contextmanager
def _environment(is_strict: bool) -> Iterator[None]:
    before = os.environ.get("FXPRUNE_CHECK")
    os.environ["FXPRUNE_CHECK"] = str(int(is_strict))
    try:
        yield
    finally:
        os.environ.pop("FXPRUNE_CHECK")
        if before is not None:
            os.environ["FXPRUNE_CHECK"] = before


def _run(case: Case, say: Callable[[str], None]) -> Row:
    say(OWN)
    try:
        models = Models(case.model(), case.model())
        dense = case.model()
        answer = call(dense, case, case.inputs(case.batch, 0), case.form)
    except Exception as error:
        return {"outcome": "not a case", "why": f"the model: {_line(error)}"}
    if not all(bool(v.isfinite().all()) and float(v.abs().max()) < 1e5 for v in floats(answer)):
        return {"outcome": "not a case", "why": "not finite"}
    before = state(models.user)
    say("transform")
    try:
        result = transform(case, models.user)
        first = call(result, case, case.inputs(case.batch, 0), case.form)
    except FxPruneError as error:
        changed = differences(before, state(models.user))
        outcome = "changed" if changed else "caught" if _is_own_fault(error) else "refused"
        return {"outcome": outcome, "why": changed or normal(str(error)), "raw": str(error)[:500]}
    except Exception as error:
        return {"outcome": "crash", "why": _line(error), "traceback": traceback.format_exc()[-5000:]}
    told = Told() if case.pruning.way == BACKEND else Told.of(result)
    models.plain, models.exact = zeroed(case.model(), told), zeroed(widened(case.model()), told)
    row: Row = {"pruned": told.is_something or case.pruning.way == BACKEND, "notes": _notes(result)}
    hidden = [str(n) for n in _told(result) if any(words in n for words in TURNED_DOWN) and NO_DIGITS not in n]
    found = _compare(case, models, told, result, first, say)
    say(OWN)
    masked = call(zeroed(case.model(), told), case, case.inputs(case.batch, 0), case.form)
    row["far"] = relative(masked, _unpruned(case)) > FAR
    if found.get("outcome") in (None, "needless") and case.pruning.way == TRAIN:
        found = compare_gradients(case, result, told, say) or found
    if hidden and found.get("outcome") in (None, "needless"):
        found = {"outcome": "caught", "why": normal(hidden[0]), "raw": hidden[0][:500]}
    # Dynamo itself leaves marks on the modules that it compiles.
    changed = "" if case.pruning.way == BACKEND else differences(before, state(models.user))
    if changed:
        found = {"outcome": "changed", "why": changed}
    return row | {"outcome": "ok"} | found


def transform(case: Case, model: nn.Module) -> Any:
    """What fxprune makes of the model, asked as the case says."""
    args, kwargs = case.split(case.inputs(case.batch, 0), case.form)
    plan, way = case.pruning.plan(model), case.pruning.way
    common: dict[str, Any] = {"options": case.options, "progress": False, "check": case.is_checked}
    torch.manual_seed(2)
    if way == BACKEND:
        options = {k: v for k, v in case.options.items() if k in ("compile", "layout")}
        return torch.compile(model, backend="fxprune", options=options)
    if way == LATER:
        return fxprune.transform(model, plan, **common)
    if way == CALIBRATE:
        common["calibration"] = [case.inputs(4, seed) for seed in (7, 8)]
        args, kwargs = (), case.inputs(case.batch, 0)
    given = exported(model, args, kwargs) if case.is_exported else model
    example: Any = [case.inputs(case.batch + more, more) for more in (0, 1)] if case.is_several else args
    kwargs = None if case.is_several else kwargs
    result = fxprune.transform(given, plan, example, kwargs, trainable=way == TRAIN, **common)
    if way == REPLAY:
        result = fxprune.transform(model, None, args, kwargs, selection=result.selection, **common)
    return pickle.loads(pickle.dumps(result)) if case.is_pickled else result


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> Any:
    """The model as an ExportedProgram with its first dimensions dynamic; the model itself where torch refuses that."""
    shapes: Any = torch.export.ShapesCollection()
    args, kwargs = pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs))
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim():
            shapes[leaf] = {0: torch.export.Dim.AUTO}
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception:
        return model


@torch.no_grad()
def call(model: Any, case: Case, inputs: Inputs, form: str) -> Any:
    """The answer, and the inputs as they are after the call."""
    args, kwargs = case.split(inputs, form)
    answer = model(*args, **kwargs)
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, (answer, inputs))


def floats(values: Any) -> list[Tensor]:
    """The tensors of floats that hold anything."""
    leaves = pytree.tree_leaves(values)
    return [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]


def _compare(case: Case, models: Models, told: Told, result: Any, first: Any, say: Callable[[str], None]) -> Row:
    """The first answer and those at other inputs, sizes and forms: the worst that is found."""
    found: Row = {}
    # An ExportedProgram takes calls as it was exported.
    other = case.form if case.is_exported else {"args": "kwargs", "kwargs": "both", "both": "args"}[case.form]
    calls = [(case.batch, 0, case.form), (case.batch, 1, other)]
    least = 2 if case.is_exported else 1
    calls += [(batch, 2, case.form) for batch in (1, 2, 4, 7) if batch != case.batch and batch >= least]
    for batch, seed, form in calls:
        label = f"batch {batch}, input {seed}, by {form}"
        say(OWN)
        try:
            call(models.own, case, case.inputs(batch, seed), form)
        except Exception:
            continue
        say(f"a call at {label}")
        try:
            got = first if seed == 0 else call(result, case, case.inputs(batch, seed), form)
        except FxPruneError as error:
            found = found or {"outcome": "needless", "why": normal(str(error)), "raw": f"{label}: {error}"[:500]}
            continue
        except Exception as error:
            trace = traceback.format_exc()[-5000:]
            return {"outcome": "crash", "why": f"call: {_line(error)}", "raw": label, "traceback": trace}
        say(OWN)
        plain = call(models.plain, case, case.inputs(batch, seed), form)
        exact = call(models.exact, case, wide(case.inputs(batch, seed)), form)
        d = distance(got, plain, exact, lambda batch=batch, seed=seed: _coarse(case, told, batch, seed))
        if d is not None and d.is_wrong:
            said = d.why or f"off by {d.error:.1e}, {d.allowed:.0e} is allowed"
            return {"outcome": "wrong", "why": normal(said), "raw": f"{label}: {said}", "error": d.error}
    return found


def _coarse(case: Case, told: Told, batch: int, seed: int) -> Any:
    """What the oracle answers in float32."""
    inputs = pytree.tree_map(lambda v: v.float() if floats(v) else v, case.inputs(batch, seed))
    return call(zeroed(case.model(), told).float(), case, inputs, case.form)


def _unpruned(case: Case) -> Any:
    """What the model answers without any pruning, the user's included."""
    bare = dataclasses.replace(case, pruning=dataclasses.replace(case.pruning, edits=()))
    return call(bare.model(), case, case.inputs(case.batch, 0), case.form)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that must stay as it was."""
    seen: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        content = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        seen[name] = (id(value), value.requires_grad, value.dtype, value.stride(), content)
        seen[f"gradient of {name}"] = value.grad is None
    for path, module in model.named_modules():
        hooks = (list(module._forward_pre_hooks.values()), list(module._forward_hooks.values()))
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
        seen[f"module {path}"] = (type(module), hooks, plain, list(vars(module)))
    return seen


def differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Names whose entries differ, in words."""
    return ", ".join(key for key in {**before, **after} if before.get(key) != after.get(key))


def _is_own_fault(error: FxPruneError) -> bool:
    return isinstance(error, CheckError) or "report" in error.do


def _notes(result: Any) -> list[str]:
    """The kinds of what the report warns of."""
    return sorted({normal(str(note)) for note in _told(result) if note.level in ("fallback", "warning")})


def _told(result: Any) -> list[Note]:
    report = getattr(result, "report", None)
    return [] if report is None else list(report.notes)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {normal(str(error).strip().splitlines()[0] if str(error).strip() else '')}"


def normal(text: str) -> str:
    """A message without its names and numbers: what messages of one kind share."""
    text = text.strip().splitlines()[0] if text.strip() else ""
    text = re.sub(r'"[^"]*"|\'[^\']*\'', '"..."', text)
    text = re.sub(r"\b\w*\d[\w.]*\b", "#", text)
    return re.sub(r"\[[^\]]*\]", "[...]", text)[:220]
