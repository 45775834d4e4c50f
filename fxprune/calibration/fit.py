"""fit: what one weight becomes, from what its site saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..fits import Fit
from ..matrix import from_matrix, to_matrix
from .admm import admm
from .cholesky import factor, solve
from .finite import check_squares
from .least_squares import refit
from .measure_inputs import Watched
from .obs import Units, choose_units
from .problem import Goal, Problem, damped
from .site import Site, named
from .sparsegpt import sparsegpt
from .stream import Fitted
from .wanda import wanda


def sparsegpt_refit(problem: Problem, goal: Goal) -> tuple[Tensor, Tensor]:
    """The mask of SparseGPT, then least squares on it: (weight, keep), both [g, r, n]."""
    start, keep = sparsegpt(problem, goal)
    return refit(problem, keep, start), keep


Solver = Callable[[Problem, Goal], tuple[Tensor, Tensor]]
SOLVERS: dict[str, Solver] = {"wanda": wanda, "sparsegpt": sparsegpt, "refit": sparsegpt_refit, "admm": admm}
METHODS = ("magnitude", *SOLVERS)

_SHARED = "it is read at several places, so it was fitted on the dense model's inputs"
_PADDED = "padding could not be told from text in its inputs, so it counts as well"
_ROUTED = "values decide which rows come to it, so it was fitted on the dense model's inputs"


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked of the weight `name`.

    inputs  the weight's dimension that is summed over
    goal    what a solver is to reach; None where the mask is settled, or the weight has none
    keep    bool of the weight's shape: with a goal, what is not zero already; without, the mask (None: it has none)
    units   those of a group that this weight alone reads, some of which leave
    note    what is not as asked, in words
    """

    name: str
    inputs: int = 1
    goal: Goal | None = None
    keep: Tensor | None = None
    units: Units | None = None
    note: str = ""

    @property
    def masks(self) -> bool:
        """Whether the weight gets a mask."""
        return self.goal is not None or self.keep is not None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """New values by name, the weight's mask (bool, of its shape; None where it has none), and the units that stay."""

    values: dict[str, Tensor]
    keep: Tensor | None
    fit: Fit
    units: Tensor | None = None


@torch.no_grad()
def fit_weight(entry: Fitted, task: Task, tensors: Mapping[str, Tensor], method: str) -> Outcome:
    """Solves one weight for what its site saw. `tensors` are the dense model's by name; they are only read.

    "magnitude" leaves the weights that stay as they are. A weight that received no input keeps its values. Raises
    InputError where the inputs are too large to be squared.
    """
    whole = tensors[entry.site.name]
    weight, alive = _matrices(whole, task, entry.windows.groups if entry.windows is not None else 1)
    if not entry.inputs.count:
        return _without_input(whole, task, weight, alive)
    problem, scale = _problem(entry, weight, alive, tensors)
    kept_units = None
    if task.units is not None:
        kept_units, columns = choose_units(problem, task.units)
        living = columns.expand_as(weight)
        problem = dataclasses.replace(problem, alive=living if alive is None else living & alive)
    if method == "magnitude":
        found, keep = weight if alive is None else weight * alive, alive
    else:
        found, keep = _solve(problem, task, method)
        found = found / scale
    constants = _constants(entry, found.double(), tensors, method)
    notes = (task.note, _ROUTED if entry.routed else "", _PADDED if entry.padded else "")
    note = "; ".join(filter(None, notes))
    fit = Fit(method, _error(entry, found.double()), entry.inputs.count, note)
    return _outcome(whole, task, found, keep, fit, constants, kept_units)


@torch.no_grad()
def fit_shared(watched: Watched, task: Task, tensors: Mapping[str, Tensor], method: str) -> Outcome:
    """Solves a weight that is read at several places, for the dense model's inputs at all of them together."""
    whole = tensors[task.name]
    gram = None if watched.inputs is None or not watched.inputs.count else watched.inputs.centred_gram()
    weight, alive = _matrices(whole, task, 1 if gram is None else gram.shape[0])
    if gram is None:
        return _without_input(whole, task, weight, alive)
    check_squares(task.name, gram)
    hessian = damped(gram)[0].float()
    problem = Problem(hessian, weight, weight @ hessian, alive)
    found, keep = _solve(problem, task, method)
    note = "; ".join(filter(None, (task.note, _SHARED)))
    return _outcome(whole, task, found, keep, Fit(method, problem.loss(found), watched.count, note))


def _solve(problem: Problem, task: Task, method: str) -> tuple[Tensor, Tensor | None]:
    if task.goal is not None:
        return SOLVERS[method](problem, task.goal)
    if problem.alive is None:
        return problem.target, None
    if method == "wanda":
        return problem.target * problem.alive, problem.alive
    return refit(problem, problem.alive), problem.alive


def _matrices(whole: Tensor, task: Task, groups: int) -> tuple[Tensor, Tensor | None]:
    """The weight as [g, r, n] float32, and what of it is not zero already, bool."""
    matrix = to_matrix(whole.detach(), task.inputs)
    shape = (groups, matrix.shape[0] // groups, matrix.shape[1])
    alive = None if task.keep is None else to_matrix(task.keep.to(whole.device), task.inputs).reshape(shape)
    return matrix.reshape(shape).float(), alive


def _outcome(
    whole: Tensor,
    task: Task,
    found: Tensor,
    keep: Tensor | None,
    fit: Fit,
    constants: Mapping[str, Tensor] | None = None,
    units: Tensor | None = None,
) -> Outcome:
    def back(matrices: Tensor) -> Tensor:
        return from_matrix(matrices.flatten(0, 1), whole.shape, task.inputs).contiguous()

    values = {task.name: back(found.to(whole.dtype)), **(constants or {})}
    return Outcome(values, back(keep) if task.masks and keep is not None else None, fit, units)


def _without_input(whole: Tensor, task: Task, weight: Tensor, alive: Tensor | None) -> Outcome:
    """The weight as it is, masked by magnitude where that is asked."""
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device).expand(weight.shape[0], -1, -1)
    problem = Problem(eye, weight, weight, alive)
    keep = alive if task.goal is None else problem.keep(weight.abs(), task.goal)
    units = None if task.units is None else choose_units(problem, task.units)[0]
    note = "it received no input, so it was pruned by magnitude and not fitted"
    return _outcome(
        whole, task, weight if keep is None else weight * keep, keep, Fit("magnitude", note=note), units=units
    )


def _problem(
    entry: Fitted, weight: Tensor, alive: Tensor | None, tensors: Mapping[str, Tensor]
) -> tuple[Problem, Tensor]:
    """The least squares of a weight [g, r, n], and the factor [g, r, 1] that its rows were multiplied by."""
    gram, added = damped(entry.inputs.centred_gram())
    cross = entry.outputs.centred_cross(entry.inputs)
    check_squares(entry.site.name, gram, cross)
    # The damping pulls towards the weight as it is, so that what the data do not tell stays.
    scale = _scale(entry.site, weight, tensors)
    linear = (cross + added[:, None, None].to(cross.dtype) * weight.to(cross.dtype)) * scale
    target = solve(factor(gram.double()), linear.double())
    return Problem(gram.float(), target.float(), linear.float(), alive), scale


def _scale(site: Site, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """What a batch-norm multiplies each output by, [g, r, 1]: rows are compared as what reads them sees them."""
    if site.norm is None:
        return weight.new_ones(*weight.shape[:2], 1)
    given = named(site.norm)
    scale = (tensors[str(given["running_var"].target)].double() + float(given["eps"])).rsqrt()
    if given["weight"] is not None:
        scale = scale * tensors[str(given["weight"].target)].double().abs()
    # A channel that the norm silences still needs a factor to divide by.
    largest = float(scale.max())
    return scale.clamp(min=1e-6 * largest if largest > 0 else 1.0).float().reshape(*weight.shape[:2], 1)


def _constants(entry: Fitted, weight: Tensor, tensors: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """The new bias or running mean, and for "magnitude" the running variance."""
    shift = entry.site.shift
    if shift is None:
        return {}
    moved = entry.outputs.mean(entry.inputs) - (weight @ entry.inputs.mean.unsqueeze(-1)).squeeze(-1)
    old = tensors[shift.name]
    value = moved.reshape(-1) if shift.sign > 0 else old.double() - moved.reshape(-1)
    values = {shift.name: value.to(old.dtype)}
    if entry.site.norm is not None and method == "magnitude":
        name = str(named(entry.site.norm)["running_var"].target)
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
