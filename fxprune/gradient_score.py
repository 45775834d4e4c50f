"""Scores from data: what each element of a model's parameters matters to a loss, by its gradient.

    scores = fxprune.gradient_score.taylor(model, loader, torch.nn.functional.cross_entropy)
    plan = Plan([Rule("*", Channels(0.5, score=scores), scope="global")])

Each of the functions here walks once over `batches`, any iterable, a generator included:

    (inputs, target)  loss(model(inputs), target); inputs that are a tuple, list or mapping are the call's arguments
    a mapping         loss(model(**batch), batch)
    a tensor x        loss(model(x), x)

`loss` answers with a scalar tensor. Batches count alike, whatever their size. The model runs in the mode that it is in
(train or eval), frozen parameters are scored too, and nothing of it is changed: no gradient, buffer, flag or mode. The
result covers every floating-point parameter under each of its names, hooks of torch.nn.utils.prune and
parametrizations folded ("fc.weight", not "fc.weight_orig"), in float32 on the parameter's device; a parameter that the
loss does not reach gets zeros. All raise InputError for a model, batch or loss that cannot be used, for no batches, and
for gradients that are NaN or infinite; what the model or the loss raises itself passes through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxprune.capture.admit import untouched
from fxprune.capture.hooks import fold_existing
from fxprune.graph.compat import GroupNormGoesBackward
from fxprune.plan.scores import Scores

from .errors import InputError

Loss = Callable[[Any, Any], Tensor]


def taylor(model: nn.Module, batches: Iterable[Any], loss: Loss, *, progress: bool = True) -> Scores:
    """gradient x weight, signed: the change of the loss, to first order, when an element is set to zero.

    A unit is worth the magnitude of the sum over all its elements, an element its own magnitude. The gradient is the
    mean over the batches.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019 (without its square, which
    changes no order).
    """
    found = _means(model, batches, loss, "taylor", progress, lambda gradient: gradient)
    for weight, mean in found.by_name.values():
        mean.mul_(weight.detach().float())
    return found.scores(signed=True)


def snip(model: nn.Module, batches: Iterable[Any], loss: Loss, *, progress: bool = True) -> Scores:
    """|gradient x weight| over its sum over all parameters of the model: connection sensitivity.

    The gradient is the mean over the batches. A unit is worth the sum over its elements.

    Source: Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2019.
    """
    found = _means(model, batches, loss, "snip", progress, lambda gradient: gradient)
    for weight, mean in found.by_name.values():
        mean.mul_(weight.detach().float()).abs_()
    total = sum(float(mean.sum(dtype=torch.float64)) for _, mean in found.by_name.values())
    for _, mean in found.by_name.values():
        mean.div_(total if total > 0 else 1.0)
    return found.scores()


def fisher(model: nn.Module, batches: Iterable[Any], loss: Loss, *, progress: bool = True) -> Scores:
    """gradient^2 x weight^2 / 2: the change of the loss, to second order, with the diagonal of the empirical Fisher.

    The squared gradient is the mean over the batches. The Fisher information is one of single samples, so batches of
    one are exact; larger ones square the gradient of their mean. A unit is worth the sum over its elements.

    Source: LeCun et al., "Optimal Brain Damage", 1990; Theis et al., "Faster gaze prediction with dense
    networks and Fisher pruning", 2018.
    """
    found = _means(model, batches, loss, "fisher", progress, torch.square)
    for weight, mean in found.by_name.values():
        mean.mul_(weight.detach().float().square()).mul_(0.5)
    return found.scores()


class _Means:
    """Each floating-point parameter by its first name, with the mean of something over the batches, float32."""

    def __init__(self, model: nn.Module, method: str) -> None:
        named = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()]
        first = {id(parameter): name for name, parameter in reversed(named)}
        self.first = {name: first[id(parameter)] for name, parameter in named}
        self.by_name: dict[str, tuple[nn.Parameter, Tensor]] = {
            name: (parameter, torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False))
            for name, parameter in named
            if self.first[name] == name
        }
        self.method = method

    def scores(self, *, signed: bool = False) -> Scores:
        """What they have become, under every name of each parameter."""
        values = {name: self.by_name[first][1] for name, first in self.first.items()}
        return Scores(values, signed=signed, method=self.method)


@torch.inference_mode(False)
def _means(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    method: str,
    progress: bool,
    of: Callable[[Tensor], Tensor],
) -> _Means:
    """The mean over batches of what `of` makes of each gradient."""
    what = f"cannot compute the scores of {method}"
    _check_model(what, model)
    _check_batches(what, batches)
    if not callable(loss):
        why = f"a {type(loss).__name__} cannot be called"
        raise InputError(what, where="loss", why=why, do="Give a function such as torch.nn.functional.cross_entropy.")
    folded, _ = fold_existing(model)
    found = _Means(folded, method)
    count = 0
    with untouched(folded), _all_require_grad(folded):
        _let_recurrent_learn(folded)
        with tqdm(batches, desc=method, unit="batch", disable=None if progress else True, leave=False) as bar:
            for count, batch in enumerate(bar, 1):
                gradients = _gradients(what, f"batch {count}", folded, batch, loss, found)
                for name, gradient in gradients.items():
                    found.by_name[name][1].add_(of(gradient))
    if not count:
        raise InputError(
            what, where="batches", why="there were none", do="Give at least one; a generator gives its batches once."
        )
    for _, total in found.by_name.values():
        total.div_(count)
    return found


def _gradients(what: str, where: str, model: nn.Module, batch: Any, loss: Loss, found: _Means) -> dict[str, Tensor]:
    """The gradients of one batch's loss, dense float32, without parameters that it does not reach."""
    with torch.enable_grad(), GroupNormGoesBackward():
        value = _loss_of(what, where, model, batch, loss)
        parameters = [parameter for parameter, _ in found.by_name.values()]
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    result = {}
    for name, gradient in zip(found.by_name, gradients):
        if gradient is None:
            continue
        dense = gradient.detach().to_dense() if gradient.layout is not torch.strided else gradient.detach()
        result[name] = dense.float()
        if not bool(result[name].isfinite().all()):
            raise InputError(
                what,
                where=f'"{name}" {list(gradient.shape)}, {where}',
                why="its gradient is NaN or infinite",
                do="Look at the loss of this batch; scale it down where a 16-bit gradient overflows.",
            )
    return result


def _loss_of(what: str, where: str, model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    if isinstance(batch, Tensor):
        value = loss(model(batch), batch)
    elif isinstance(batch, Mapping):
        value = loss(model(**batch), batch)
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        value = loss(_call(model, batch[0]), batch[1])
    else:
        held = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise InputError(
            what,
            where=where,
            why=f"it is a {type(batch).__name__}{held}",
            do="Give pairs (inputs, target), mappings of the call's arguments, or tensors.",
        )
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        shown = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            what, where=where, why=f"the loss is {shown}, not a scalar", do="Return one float: loss.mean(), say."
        )
    if not value.requires_grad:
        raise InputError(
            what,
            where=where,
            why="the loss does not depend on any parameter through gradients",
            do="Compute it from the model's output, with nothing detached and no torch.no_grad inside.",
        )
    return value


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


@contextlib.contextmanager
def _all_require_grad(model: nn.Module) -> Iterator[None]:
    """Gradients for frozen parameters as well, and frozen again afterwards."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _let_recurrent_learn(model: nn.Module) -> None:
    # cuDNN has no gradients for a recurrent layer in evaluation, which differs from training by its dropout only
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and not module.training:
            module.dropout, module.training = 0.0, True


def _check_model(what: str, model: object) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch._dynamo.OptimizedModule):
        raise InputError(
            what,
            where=type(model).__name__,
            why="it is not a plain torch.nn.Module",
            do="Pass the model itself, before torch.compile; of an ExportedProgram pass .module().",
        )
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise InputError(
            what,
            where=f'"{meta[0]}"',
            why="it is on the meta device and has no values",
            do="Load the model's weights first.",
        )


def _check_batches(what: str, batches: object) -> None:
    # A tensor, a mapping and a tuple (inputs, target) are iterable, but each is one batch.
    one = isinstance(batches, tuple) and len(batches) == 2 and all(isinstance(part, Tensor) for part in batches)
    if one or isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise InputError(
            what,
            where="batches",
            why=f"a {type(batches).__name__} is no series of batches",
            do="Give a DataLoader, a list or a generator; a single batch goes into a list: [batch].",
        )
