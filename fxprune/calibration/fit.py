"""fit: what one weight becomes, from what its layer saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fxprune.calibration.solvers import SOLVERS
from fxprune.calibration.solvers.cholesky import factor, solve
from fxprune.calibration.solvers.least_squares import refit
from fxprune.calibration.solvers.problem import Goal, Problem, damped
from fxprune.calibration.solvers.units import Units, choose_units
from fxprune.graph.program import arguments
from fxprune.plan.matrix import from_matrix, to_matrix
from fxprune.plan.patterns import SemiStructured, Unstructured
from fxprune.select.project import keep_highest
from fxprune.select.selection import Fit

from .finite import check_squares, is_finite
from .layer import Layer
from .measure_inputs import Watched
from .stream import Fitted

# Least squares on r rows of n inputs err elsewhere by about n / (r - n) more than on these rows.
_ENOUGH = 8
_SHARED = "it is read at several places, so it was fitted on the dense model's inputs"
_PADDED = "padding could not be told from text in its inputs, so it counts as well"
_UNREAD = "it received no input, so it was pruned by magnitude and not fitted"
_TOO_LARGE = "its best values are too large for its dtype, so it was pruned by magnitude and not fitted"
_UNEVEN = "its pattern does not divide the inputs that stay, so zeros for those that leave count among its zeros"
_FEW = "only {} rows for {} inputs: it fits these closely, and more data would hold better elsewhere"
_ROUTED = "values decide which rows come to it, so it was fitted on the dense model's inputs"


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked of the weight `name`.

    inputs  the weight's dimension that is summed over
    goal    what a solver is to reach; None where the mask is settled, or the weight has none
    keep    bool of the weight's shape: with a goal, what is not zero already; without, the mask (None: it has none)
    zeros   how many elements the plan's mask takes, of all
    staying the inputs that stay where others leave with their groups, int64; None where all do
    units   those of a group that this weight alone reads, some of which leave
    note    what is not as asked, in words
    """

    name: str
    inputs: int = 1
    goal: Goal | None = None
    keep: Tensor | None = None
    zeros: int = 0
    staying: Tensor | None = None
    units: Units | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a weight becomes.

    values  new tensors by name, the weight's own with zeros for the inputs that leave
    keep    the weight's mask, bool of its shape; None where it has none
    units   those that stay of the task's group; None where it has none
    staying the inputs that stay, int64; None where all do
    """

    values: dict[str, Tensor]
    keep: Tensor | None
    fit: Fit
    units: Tensor | None = None
    staying: Tensor | None = None


@torch.no_grad()
def fit_weight(entry: Fitted, task: Task, tensors: Mapping[str, Tensor], method: str) -> Outcome:
    """Solves one weight for what its layer saw. `tensors` are the dense model's by name; they are only read.

    "magnitude" leaves the weights that stay as they are. A weight that received no input, or whose best values its
    dtype cannot hold, keeps its values. Raises InputError where the inputs are too large to be squared.
    """
    whole = tensors[entry.layer.name]
    weight, alive = _matrices(whole, task, entry.windows.groups if entry.windows is not None else 1)
    if not entry.inputs.count:
        return _unfitted(whole, task, weight, alive, _UNREAD)
    problem, scale = _problem(entry, weight, alive, tensors)
    units = None if task.units is None else choose_units(problem, task.units)
    staying = _staying(task, units)
    uneven = ""
    if method == "magnitude":
        found, keep = weight if alive is None else weight * alive, alive
    else:
        found, keep, uneven = _solve_within(problem, task, method, staying, whole)
        found = found / scale
    constants = _constants(entry, found.double(), tensors, method)
    if not all(is_finite(each) for each in (found.to(whole.dtype), *constants.values())):
        return _unfitted(whole, task, weight, alive, _TOO_LARGE)
    few = _few(entry.inputs.count, problem) if method != "magnitude" else ""
    note = _joined(task.note, _ROUTED if entry.routed else "", _PADDED if entry.padded else "", uneven, few)
    fit = Fit(method, _error(entry, found.double()), entry.inputs.count, note)
    mask = _mask(whole, task, keep)
    if method == "magnitude":
        value = whole.clone() if mask is None else torch.where(mask, whole, 0.0)
    else:
        value = _back(whole, task, found.to(whole.dtype))
    return Outcome({task.name: value, **constants}, mask, fit, units, staying)


@torch.no_grad()
def fit_shared(watched: Watched, task: Task, tensors: Mapping[str, Tensor], method: str) -> Outcome:
    """Solves a weight that is read at several places, for the dense model's inputs at all of them together."""
    whole = tensors[task.name]
    gram = None if watched.inputs is None or not watched.inputs.count else watched.inputs.centred_gram()
    weight, alive = _matrices(whole, task, 1 if gram is None else gram.shape[0])
    if gram is None:
        return _unfitted(whole, task, weight, alive, _UNREAD)
    check_squares(task.name, gram)
    hessian = damped(gram, watched.count)[0].float()
    problem = Problem(hessian, weight, weight @ hessian, alive)
    staying = _staying(task, None)
    found, keep, uneven = _solve_within(problem, task, method, staying, whole)
    fit = Fit(
        method, problem.loss(found), watched.count, _joined(task.note, _SHARED, uneven, _few(watched.count, problem))
    )
    values = {task.name: _back(whole, task, found.to(whole.dtype))}
    return Outcome(values, _mask(whole, task, keep), fit, staying=staying)


def _few(rows: int, problem: Problem) -> str:
    """What to tell of a weight that was fitted on few rows of inputs, or nothing."""
    inputs = problem.target.shape[-1]
    return _FEW.format(rows, inputs) if rows < _ENOUGH * inputs else ""


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _staying(task: Task, units: Tensor | None) -> Tensor | None:
    """The inputs that stay, where units left before and some of the task's own leave now."""
    if units is None or task.units is None:
        return task.staying
    mine = task.units.inputs_of(units)
    return mine if task.staying is None else mine[torch.isin(mine, task.staying.to(mine.device))]


def _solve_within(
    problem: Problem, task: Task, method: str, staying: Tensor | None, whole: Tensor
) -> tuple[Tensor, Tensor | None, str]:
    """`_solve` for the inputs that stay, of whose weights the same share becomes zero as of all; and what to tell.

    Those of the others get zeros; of these the mask takes the smallest, so that in all it is as large as asked.
    """
    columns = None if staying is None else _columns(whole, task, staying, problem.target.shape[-1])
    if columns is None:
        return *_solve(problem, task.goal, method), ""
    if not _divides(task.goal, len(columns)):
        stays = torch.zeros_like(problem.target, dtype=torch.bool).index_fill_(-1, columns, True)
        alive = stays if problem.alive is None else stays & problem.alive
        return *_solve(dataclasses.replace(problem, alive=alive), task.goal, method), _UNEVEN
    goal = task.goal
    if goal is not None and goal.count is not None:
        goal = dataclasses.replace(goal, count=round(goal.count * len(columns) / problem.target.shape[-1]))
    part, kept = _solve(problem.within(columns), goal, method)
    found = torch.zeros_like(problem.target).index_copy_(-1, columns, part)
    if kept is None:
        return found, None, ""
    keep = torch.ones_like(found, dtype=torch.bool) if problem.alive is None else problem.alive.clone()
    if goal is not None:
        sizes, _ = _matrices(whole, task, found.shape[0])
        sizes = sizes.abs().masked_fill(~keep, -torch.inf).index_fill_(-1, columns, torch.inf)
        left = task.zeros - int((~kept).sum())
        keep &= keep_highest(sizes, min(max(0, left), found.numel() - kept.numel()))
    return found, keep.index_copy_(-1, columns, kept), ""


def _columns(whole: Tensor, task: Task, staying: Tensor, columns: int) -> Tensor | None:
    """The columns of a weight's matrix that read the inputs that stay; None where these are all."""
    inputs = whole.shape[task.inputs]
    if len(staying) == inputs:
        return None
    first = torch.arange(0, columns, inputs, device=whole.device)
    return (first.unsqueeze(1) + staying.to(whole.device)).flatten()


def _divides(goal: Goal | None, columns: int) -> bool:
    """Whether a pattern can be laid over so many columns."""
    if goal is None or isinstance(goal.pattern, Unstructured):
        return True
    return columns % (goal.pattern.m if isinstance(goal.pattern, SemiStructured) else goal.pattern.shape[1]) == 0


def _solve(problem: Problem, goal: Goal | None, method: str) -> tuple[Tensor, Tensor | None]:
    if goal is not None:
        return SOLVERS[method].solve(problem, goal)
    if problem.alive is None:
        return problem.target, None
    if method in SOLVERS and not SOLVERS[method].refits:
        return problem.target * problem.alive, problem.alive
    return refit(problem, problem.alive), problem.alive


def _matrices(whole: Tensor, task: Task, groups: int) -> tuple[Tensor, Tensor | None]:
    """The weight as [g, r, n] float32, and what of it is not zero already, bool."""
    matrix = to_matrix(whole.detach(), task.inputs)
    shape = (groups, matrix.shape[0] // groups, matrix.shape[1])
    alive = None if task.keep is None else to_matrix(task.keep.to(whole.device), task.inputs).reshape(shape)
    return matrix.reshape(shape).float(), alive


def _back(whole: Tensor, task: Task, matrices: Tensor) -> Tensor:
    return from_matrix(matrices.flatten(0, 1), whole.shape, task.inputs).contiguous()


def _mask(whole: Tensor, task: Task, keep: Tensor | None) -> Tensor | None:
    return None if keep is None or (task.goal is None and task.keep is None) else _back(whole, task, keep)


def _unfitted(whole: Tensor, task: Task, weight: Tensor, alive: Tensor | None, why: str) -> Outcome:
    """The weight as it is, masked by magnitude where that is asked."""
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device).expand(weight.shape[0], -1, -1)
    problem = Problem(eye, weight, weight, alive)
    keep = alive if task.goal is None else problem.keep(weight.abs(), task.goal)
    units = None if task.units is None else choose_units(problem, task.units)
    mask = _mask(whole, task, keep)
    value = whole.clone() if mask is None else torch.where(mask, whole, 0.0)
    staying = _staying(task, units)
    if staying is not None:
        gone = torch.ones(whole.shape[task.inputs], dtype=torch.bool, device=whole.device)
        gone[staying.to(whole.device)] = False
        value.index_fill_(task.inputs, gone.nonzero().squeeze(1), 0.0)
    return Outcome({task.name: value}, mask, Fit("magnitude", note=why), units, staying)


def _problem(
    entry: Fitted, weight: Tensor, alive: Tensor | None, tensors: Mapping[str, Tensor]
) -> tuple[Problem, Tensor]:
    """The least squares of a weight [g, r, n], and the factor [g, r, 1] that its rows were multiplied by."""
    gram, added = damped(entry.inputs.centred_gram(), entry.inputs.count)
    cross = entry.outputs.centred_cross(entry.inputs)
    check_squares(entry.layer.name, gram, cross)
    # The damping pulls towards the weight as it is, so that what the data do not tell stays.
    scale = _scale(entry.layer, weight, tensors)
    linear = (cross + added[:, None, :].to(cross.dtype) * weight.to(cross.dtype)) * scale
    target = solve(factor(gram.double()), linear.double())
    return Problem(gram.float(), target.float(), linear.float(), alive), scale


def _scale(layer: Layer, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """What a batch-norm multiplies each output by, [g, r, 1]: rows are compared as what reads them sees them."""
    if layer.norm is None:
        return weight.new_ones(*weight.shape[:2], 1)
    given = arguments(layer.norm)
    scale = (tensors[str(given["running_var"].target)].double() + float(given["eps"])).rsqrt()
    if given["weight"] is not None:
        scale = scale * tensors[str(given["weight"].target)].double().abs()
    # A channel that the norm silences still needs a factor to divide by.
    largest = float(scale.max())
    return scale.clamp(min=1e-6 * largest if largest > 0 else 1.0).float().reshape(*weight.shape[:2], 1)


def _constants(entry: Fitted, weight: Tensor, tensors: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """The new bias or running mean, and for "magnitude" the running variance."""
    shift = entry.layer.shift
    if shift is None:
        return {}
    moved = entry.outputs.mean(entry.inputs) - (weight @ entry.inputs.mean.unsqueeze(-1)).squeeze(-1)
    old = tensors[shift.name]
    value = moved.reshape(-1) if shift.sign > 0 else old.double() - moved.reshape(-1)
    values = {shift.name: value.to(old.dtype)}
    if entry.layer.norm is not None and method == "magnitude":
        name = str(arguments(entry.layer.norm)["running_var"].target)
        values[name] = _variance(entry, weight, tensors[name])
    return values


def _variance(entry: Fitted, weight: Tensor, old: Tensor) -> Tensor:
    """A batch-norm's running variance, by as much smaller as the variance of its input became.

    Source: Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", 2020.
    """
    gram = entry.inputs.centred_gram().double()
    now = (weight @ gram * weight).sum(-1)
    before = entry.outputs.centred_squares(entry.inputs)
    share = torch.where((before > 0) & (now > 0), now / before, 1.0).reshape(-1)
    return (old.double() * share).to(old.dtype)


def _error(entry: Fitted, weight: Tensor) -> float:
    """The squared difference of the outputs from the wanted ones, over the variance of these."""
    gram = entry.inputs.centred_gram().double()
    cross = entry.outputs.centred_cross(entry.inputs).double()
    squares = float(entry.outputs.centred_squares(entry.inputs).sum())
    off = squares - 2 * float((weight * cross).sum()) + float((weight @ gram * weight).sum())
    return max(0.0, off) / squares if squares > 0 else 0.0
